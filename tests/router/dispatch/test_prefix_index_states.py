"""Wild histories of the prefix index: whatever its table is doing, it holds what a brute-force twin holds."""

import random

import numpy as np
import pytest

from router.block_table import MOVED
from router.prefix_index import PrefixIndex, _table_for


class Twin:
    """Random events for an index, and what it should know."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.index = PrefixIndex()
        self.held: dict[int, set[int]] = {}
        self.max_slots = rng.choice((3, 8, 70, 200))
        length, crowded = rng.choice((8, 60, 500)), rng.random() < 0.4
        self.chains: list[list[int]] = []
        for _ in range(rng.choice((2, 5, 30))):
            start = rng.choice(self.chains)[: rng.randrange(length)] if self.chains and rng.random() < 0.6 else []
            self.chains.append(start + [self.block(crowded=crowded) for _ in range(rng.randrange(1, length + 1))])
        self.chains.append([0])

    def block(self, *, crowded: bool) -> int:
        """Crowded ones would have the same few places, at both ends of the smallest table."""
        return (
            self.rng.getrandbits(54) << 10 | self.rng.choice((1022, 1023, 0)) if crowded else self.rng.getrandbits(64)
        )

    def turn(self) -> None:
        match self.rng.randrange(10):
            case 0 | 1:
                for _ in range(self.rng.choice((1, 1, self.max_slots // 2))):
                    if len(self.held) < self.max_slots:
                        self.open(set())
            case 2 if self.held:
                for slot in self.rng.sample(sorted(self.held), self.rng.choice((1, 1, len(self.held) // 2))):
                    self.index.close(slot)
                    blocks = self.held.pop(slot)
                    if self.rng.random() < 0.5:
                        self.open(blocks)
            case 3 if self.held:  # much at once, and away again
                slot = self.rng.choice(sorted(self.held))
                many = [self.rng.getrandbits(64) for _ in range(self.rng.choice((100, 3000)))]
                self.apply(slot, many, [])
                for _ in range(self.rng.randrange(6)):
                    self.apply(slot, [0], [])
                self.apply(slot, [], many)
            case 4:
                self.index._num_changes = len(self.index._changes)  # the next one is one too many
            case _ if self.held:
                slot, chain = self.rng.choice(sorted(self.held)), self.rng.choice(self.chains)
                length = self.rng.randrange(len(chain) + 1)
                mine = [other for other in self.chains if self.held[slot].issuperset(other[:1]) and other[0] != 0]
                removed = []
                if mine and self.rng.random() < 0.5:
                    other = self.rng.choice(mine)
                    keep = self.rng.randrange(len(other) + 1)
                    gone = set(other[keep:])
                    removed = [b for each in self.chains if gone & set(each) for b in reversed(each[keep:])]
                self.apply(slot, chain[:length] * self.rng.choice((1, 1, 2)), removed)

    def open(self, blocks: set[int]) -> None:
        slot = self.index.open()
        assert slot not in self.held
        self.held[slot] = set()
        self.apply(slot, self.rng.sample(sorted(blocks), len(blocks)), [])

    def apply(self, slot: int, stored: list[int], removed: list[int]) -> None:
        self.index.apply(slot, stored, removed)
        self.held[slot] = self.held[slot].difference(removed).union(stored)

    def check(self) -> None:
        index, held = self.index, self.held
        places = np.concatenate((index._table, index._old))
        places = places[(places[:, 1] != 0) & (places[:, 1] != MOVED)]
        sets = dict(places.tolist())
        assert len(sets) == len(places) == index.num_hashes, "a block stands twice, or is not counted"
        assert np.count_nonzero(index._table[:, 1]) < 0.75 * len(index._table)
        masks = {number: int.from_bytes(index._sets[number].tobytes(), "little") for number in set(sets.values())}
        live = int.from_bytes(index._live.tobytes(), "little")
        owners: dict[int, int] = {}
        for slot, blocks in held.items():
            assert index.num_blocks(slot) == len(blocks)
            for block in blocks:
                owners[block] = owners.get(block, 0) | 1 << slot
        assert {block: mask for block, number in sets.items() if (mask := masks[number] & live)} == owners
        assert not any(mask >> slot & 1 for slot in index._free for mask in masks.values()), "it may be another's soon"
        used = np.bincount(np.array(list(sets.values()), np.int64), minlength=len(index._uses))
        for slot in held:
            used[int(index._alone[slot])] += 1
        assert used.tolist() == index._uses.tolist()
        for chain in self.chains:
            found = np.zeros(index.num_slots)
            index.find(chain, found)
            for slot, blocks in held.items():
                length = next((place for place, block in enumerate(chain) if block not in blocks), len(chain))
                assert found[slot] == length


@pytest.mark.parametrize("seed", range(12))
def test_it_holds_what_a_twin_holds_whatever_its_table_is_doing(seed: int) -> None:
    twin = Twin(seed)
    for turn in range(400):
        twin.turn()
        if turn % (1 if twin.max_slots < 10 else 10) == 0:
            twin.check()
    twin.check()


def test_a_slot_that_is_given_out_again_stays_in_sets_it_had_left() -> None:
    index = PrefixIndex()
    one, gone, other = (index.open() for _ in range(3))
    index.apply(one, [1, 2])
    index.apply(gone, [1])
    index.close(gone)
    index.apply(one, [3])
    assert len(index._old)
    index.apply(other, [1])  # while it is rebuilt: who holds 1 are `one` and, no more, `gone`; `other` joins them
    while len(index._old):
        index.apply(one, [3])
    assert index.open() == gone
    index.apply(gone, [2])
    index.apply(other, [2])
    found = np.zeros(3)
    index.find([2], found)
    assert found.tolist() == [1, 1, 1]


def test_a_table_that_shrinks_has_room_for_what_comes_meanwhile() -> None:
    index = PrefixIndex()
    slot = index.open()
    index.apply(slot, range(1, 2001))
    for _ in range(20):
        index.apply(slot, [1])
    index.apply(slot, (), range(2000, 100, -1))
    assert len(index._fresh) < 2500 < len(index._table)
    index.apply(slot, range(1, 2501))
    index.apply(slot, [9999])
    assert index.num_blocks(slot) == 2501


def test_memory_returns_when_blocks_are_gone() -> None:
    index = PrefixIndex()
    slot = index.open()
    index.apply(slot, range(1, 100_001))
    assert len(index._table) >= 100_000
    index.apply(slot, (), range(100_000, 10, -1))
    for _ in range(600):
        index.apply(slot, [1])
    assert len(index._table) == len(_table_for(10))
    assert not len(index._old)


def test_what_an_event_removes_and_stores_is_held() -> None:
    index = PrefixIndex()
    slot = index.open()
    index.apply(slot, [1, 2])
    index.apply(slot, [2, 3], [2])
    assert index.num_blocks(slot) == 3
