import random

import pytest

from router.prefix_index import PrefixIndex, bits


def chain(rng: random.Random, length: int) -> list[int]:
    """Chained hashes over a tiny vocabulary, so that chains share prefixes."""
    hashes, parent = [], 0
    for _ in range(length):
        parent = hash((parent, rng.randrange(2)))
        hashes.append(parent)
    return hashes


def matched(index: PrefixIndex, hashes: list[int]) -> dict[int, int]:
    found = index.match(hashes)
    assert [length for length, _ in found] == sorted({length for length, _ in found})
    assert all(mask for _, mask in found)
    return {slot: length for length, mask in found for slot in bits(mask).tolist()}


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


def stored_masks(index: PrefixIndex) -> list[int]:
    return [mask for shard in index._shards for mask in shard.values()]


def test_blocks_of_the_same_workers_share_one_mask() -> None:
    index = PrefixIndex()
    slots = [index.open() for _ in range(100)]  # masks of more than one machine word are objects of their own
    for slot in slots:
        for start in range(0, 400, 20):  # in several events: the sharing goes beyond one call
            index.apply(slot, range(start, start + 20))
    assert {id(mask) for mask in stored_masks(index)} == {id(stored_masks(index)[0])}
    index.apply(slots[99], (), range(399, 199, -1))
    assert len({id(mask) for mask in stored_masks(index)}) == 2
    for slot in slots[1:]:
        index.apply(slot, (), range(399, -1, -1))
    assert {id(mask) for mask in stored_masks(index)} == {id(index._bits[slots[0]])}


def test_a_forgotten_table_of_masks_changes_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.prefix_index._MAX_KNOWN", 2)
    index, held = PrefixIndex(), {}
    for length in range(40, 0, -1):
        slot = index.open()
        index.apply(slot, range(1, length + 1))
        held[slot] = set(range(1, length + 1))
        assert len(index._known) <= 2
    assert matched(index, list(range(1, 50))) == brute_force(held, list(range(1, 50)))


def test_hashes_and_slots_stay_bounded_while_workers_come_and_go():
    index = PrefixIndex()
    slots = [index.open() for _ in range(16)]
    for life in range(300):
        index.close(slots[life % 16])
        slot = slots[life % 16] = index.open()
        index.apply(slot, [hash((life, i)) for i in range(2000)])
        assert index.num_hashes <= 2 * 16 * 2000
        assert index.num_slots <= 3 * 16


def test_bits_are_the_numbers_of_the_set_ones_in_order() -> None:
    for expected in ([], [0], [7], [1023], [0, 8, 63, 64, 1000], list(range(70))):
        assert bits(sum(1 << number for number in expected)).tolist() == expected


def test_closing_everyone_leaves_nothing_once_swept():
    index = PrefixIndex()
    for blocks in (range(100), range(50)):
        index.apply(index.open(), blocks)
    index.close(0)
    assert index.match([1]) == [(1, 0b10)]
    index.close(1)
    assert index.match([1]) == index.match([]) == []
    for _ in range(8):
        index.close(index.open())
    assert index.num_hashes == 0


def test_a_long_match_takes_few_probes():
    class Counting(list):
        probes = 0

        def __getitem__(self, item):
            Counting.probes += 1
            return super().__getitem__(item)

    index = PrefixIndex()
    index.apply(index.open(), range(4096))
    index.apply(index.open(), range(1000))
    index._shards = Counting(index._shards)
    assert index.match(range(4096)) == [(1000, 0b10), (4096, 0b01)]
    assert Counting.probes < 60
