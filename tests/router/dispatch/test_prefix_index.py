import random

import numpy as np
import pytest

from router.block_table import place_of
from router.prefix_index import PrefixIndex

UINT64 = (1 << 64) - 1


def chain(rng: random.Random, length: int) -> list[int]:
    """Chained hashes over a tiny vocabulary, so that chains share prefixes."""
    hashes, parent = [], 0
    for _ in range(length):
        parent = hash((parent, rng.randrange(2))) & UINT64
        hashes.append(parent)
    return hashes


def matched(index: PrefixIndex, hashes: list[int]) -> dict[int, int]:
    found = np.zeros(index.num_slots)
    index.find(hashes, found)
    return {slot: int(found[slot]) for slot in np.flatnonzero(found).tolist()}


def brute_force(held: dict[int, set[int]], hashes: list[int]) -> dict[int, int]:
    lengths = {
        slot: next((i for i, each in enumerate(hashes) if each not in blocks), len(hashes))
        for slot, blocks in held.items()
    }
    return {slot: length for slot, length in lengths.items() if length}


@pytest.mark.parametrize("seed", range(5))
def test_it_agrees_with_brute_force_while_workers_store_evict_leave_and_return(seed):
    rng = random.Random(seed)
    index, held = PrefixIndex(), {}
    parents: dict[int, int] = {}
    for _ in range(3000):
        if len(held) < 7:
            slot = index.open()
            assert slot not in held
            held[slot] = set()
        slot = rng.choice(sorted(held))
        match rng.randrange(8):
            case 0 | 1 | 2 | 3:
                hashes = chain(rng, rng.randrange(1, 24))
                parents.update(zip(hashes[1:], hashes, strict=False))
                index.apply(slot, hashes)
                held[slot].update(hashes)
            case 4 | 5:  # leaves first
                for _ in range(rng.randrange(1, 10)):
                    leaves = sorted(held[slot] - {parents.get(each) for each in held[slot]})
                    if leaves:
                        leaf = rng.choice(leaves)
                        index.apply(slot, (), [leaf])
                        held[slot].remove(leaf)
            case 6:  # a snapshot
                index.close(slot)
                blocks = held.pop(slot)
                slot = index.open()
                assert slot not in held
                held[slot] = blocks
                index.apply(slot, sorted(blocks))
            case 7 if rng.random() < 0.1:
                index.close(slot)
                del held[slot]
        query = chain(rng, rng.randrange(0, 30))
        assert matched(index, query) == brute_force(held, query)
        assert {slot: index.num_blocks(slot) for slot in held} == {slot: len(each) for slot, each in held.items()}


def test_it_agrees_with_brute_force_over_1024_workers() -> None:
    rng = random.Random(0)
    index, held = PrefixIndex(), {}
    chains = [chain(rng, 300) for _ in range(3)]
    for life in range(3):
        for slot in rng.sample(sorted(held), len(held) // 3):
            index.close(slot)
            del held[slot]
        while len(held) < 1024:
            slot = index.open()
            assert slot not in held
            hashes = rng.choice(chains)[: rng.randrange(301)]
            index.apply(slot, hashes)
            held[slot] = set(hashes)
        for slot in rng.sample(sorted(held), 300):
            hashes = next((each for each in chains if each[0] in held[slot]), [])
            left = rng.randrange(len(held[slot]) + 1)
            gone = [each for each in hashes[left:] if each in held[slot]]
            index.apply(slot, (), gone[::-1])
            held[slot].difference_update(gone)
        for hashes in chains:
            query = hashes[: rng.randrange(200, 301)] + chain(rng, 5)
            assert matched(index, query) == brute_force(held, query), life
    assert index.num_slots < 2 * 1024


def sets_of(index: PrefixIndex) -> list[int]:
    """Of all its blocks, while nothing is rebuilt."""
    assert not len(index._old)
    return [number for number in index._table[:, 1].tolist() if number]


def test_blocks_of_the_same_workers_share_one_set() -> None:
    index = PrefixIndex()
    slots = [index.open() for _ in range(100)]
    for slot in slots:
        for start in range(0, 400, 20):  # in several events: the sharing goes beyond one call
            index.apply(slot, range(start, start + 20))
    (number,) = set(sets_of(index))
    assert index._uses[number] == 400
    index.apply(slots[99], (), range(399, 199, -1))
    assert sorted(index._uses[list(set(sets_of(index)))].tolist()) == [200, 200]
    for slot in slots[1:]:
        index.apply(slot, (), range(399, -1, -1))
    assert set(sets_of(index)) == {index._alone[slots[0]]}
    assert len(index._numbers) - len(index._unused) < 300  # of passing ones there are no more than there were at once


def test_forgotten_changes_and_reused_numbers_of_sets_change_no_answer() -> None:
    index, held = PrefixIndex(), {}
    rng, blocks = random.Random(0), list(range(1, 41))
    for _ in range(80):
        slot = index.open()
        held[slot] = set()
    sizes = set()
    for _ in range(4000):
        slot = rng.choice(list(held))
        length = rng.randrange(41)
        index.apply(slot, blocks[:length], blocks[length:][::-1])
        held[slot] = set(blocks[:length])
        if not rng.randrange(50):
            index._num_changes = len(index._changes)  # the next one is one too many
        sizes.add(len(index._sets))
    assert matched(index, blocks) == brute_force(held, blocks)
    assert len(sizes) > 1
    assert len(index._sets) <= 1024  # 120 live ones, at most
    used = np.bincount(np.array(sets_of(index)), minlength=len(index._uses))
    for slot in held:
        used[index._alone[slot]] += 1
    used[0] = index._uses[0]
    assert used.tolist() == index._uses.tolist()


def test_hashes_and_slots_stay_bounded_while_workers_come_and_go():
    index = PrefixIndex()
    slots = [index.open() for _ in range(16)]
    for life in range(300):
        index.close(slots[life % 16])
        slot = slots[life % 16] = index.open()
        index.apply(slot, [hash((life, i)) & UINT64 for i in range(2000)])
        assert index.num_hashes <= 2 * 16 * 2000
        assert index.num_slots <= 3 * 16


def test_closing_everyone_leaves_nothing_once_rebuilt():
    index = PrefixIndex()
    for blocks in (range(100), range(50)):
        index.apply(index.open(), blocks)
    index.close(0)
    assert matched(index, [1]) == {1: 1}
    index.close(1)
    assert matched(index, [1]) == matched(index, []) == {}
    for _ in range(8):
        index.close(index.open())
    assert index.num_hashes == 0


@pytest.mark.parametrize("seed", range(3))
def test_no_event_waits_for_the_whole_table_while_it_grows_shrinks_and_loses_a_worker(seed):
    """Blocks are found wherever they are, and all of them are in the new table before it is full."""
    rng = random.Random(seed)
    index = PrefixIndex()
    slots = [index.open(), index.open()]
    held: dict[int, list[int]] = {slot: [] for slot in slots}
    grown = 0
    for turn in range(6000):
        slot = rng.choice(slots)
        if turn % 3000 < 1800:
            hashes = [rng.getrandbits(64) for _ in range(rng.randrange(1, 40))]
            index.apply(slot, hashes)
            held[slot] += hashes
        else:
            count = min(len(held[slot]), rng.randrange(1, 80))
            index.apply(slot, (), held[slot][: -count - 1 : -1])
            del held[slot][len(held[slot]) - count :]
        grown += len(index._old) > 0 and index._next_place < len(index._old)
        assert index.num_hashes == sum(map(len, held.values()))
        for each in slots:
            some = rng.choice(held[each]) if held[each] else 0  # random, so nobody else has it
            assert matched(index, [some]) == ({each: 1} if held[each] else {})
        if turn in (1500, 4500):
            index.close(slot)
            slots.remove(slot)
            left = held.pop(slot)
            slots.append(index.open())
            assert slots[-1] != slot
            held[slots[-1]] = left
            index.apply(slots[-1], left)
    assert grown > 100


def test_places_behind_an_erased_one_are_found() -> None:
    """Blocks whose places would be the same ones, at the table's end too."""
    rng = random.Random(0)
    index, held = PrefixIndex(), {}
    slot = index.open()
    held[slot] = set()
    hashes = [(high << 32) + low for high in range(12) for low in (1021, 1022, 1023, 0, 1)]
    for _ in range(3000):
        block = rng.choice(hashes)
        if block in held[slot]:
            index.apply(slot, (), [block])
            held[slot].remove(block)
        else:
            index.apply(slot, [block])
            held[slot].add(block)
        assert index.num_hashes == len(held[slot])
        assert {each for each in hashes if matched(index, [each])} == held[slot]


def test_a_long_match_takes_few_probes() -> None:
    """Whoever changes a block that was not looked at changes nothing."""
    index = PrefixIndex()
    index.apply(index.open(), range(1, 4097))
    index.apply(index.open(), range(1, 1001))
    hashes = list(range(1, 4097))
    assert matched(index, hashes) == {0: 4096, 1: 1000}
    kept, looked_at = index._table.copy(), 0
    for block in hashes:
        index._table[place_of(index._table, np.uint64(block)), 1] = (
            index._alone[1] + 1
        )  # a set that stands nowhere else
        looked_at += matched(index, hashes) != {0: 4096, 1: 1000}
        index._table[:] = kept
    assert 0 < looked_at < 30
