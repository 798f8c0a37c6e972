import random

import pytest

from router.prefix_index import PrefixIndex


class BruteForce:
    """The same answers by walking every chain for every worker."""

    def __init__(self) -> None:
        self.held: dict[str, set[int]] = {}

    def match(self, hashes: list[int]) -> dict[str, int]:
        found = {}
        for worker, held in self.held.items():
            length = next((i for i, each in enumerate(hashes) if each not in held), len(hashes))
            if length:
                found[worker] = length
        return found


def chain(rng: random.Random, length: int) -> list[int]:
    """Chained hashes over a tiny vocabulary, so that chains share prefixes."""
    hashes, parent = [], 0
    for _ in range(length):
        parent = hash((parent, rng.randrange(2)))
        hashes.append(parent)
    return hashes


def check_invariants(index: PrefixIndex) -> None:
    for worker, held in index._held.items():
        bit = 1 << index._slots[worker]
        assert {each for each, mask in index._masks.items() if mask & bit} == held
    assert all(index._masks.values())
    assert sorted([*index._slots.values(), *index._free_slots]) == list(range(len(index._workers)))


@pytest.mark.parametrize("seed", range(5))
def test_it_agrees_with_brute_force_while_workers_store_evict_leave_and_return(seed):
    rng = random.Random(seed)
    index, twin = PrefixIndex(), BruteForce()
    workers = [f"w{i}" for i in range(7)]
    parents: dict[int, int] = {}
    for step in range(3000):
        worker = rng.choice(workers)
        held = twin.held.setdefault(worker, set())
        match rng.randrange(8):
            case 0 | 1 | 2 | 3:
                hashes = chain(rng, rng.randrange(1, 24))
                parents.update(zip(hashes[1:], hashes, strict=False))
                index.apply(worker, hashes, ())
                held.update(hashes)
            case 4 | 5:  # leaves first
                for _ in range(rng.randrange(1, 10)):
                    leaves = sorted(held - {parents.get(each) for each in held})
                    if leaves:
                        leaf = rng.choice(leaves)
                        index.apply(worker, (), [leaf])
                        held.remove(leaf)
            case 6:
                index.replace(worker, sorted(held))
            case 7 if rng.random() < 0.1:
                index.remove(worker)
                del twin.held[worker]
            case 7 if rng.random() < 0.1:
                index.apply(worker, [1], (), cleared=True)
                twin.held[worker] = {1}
        query = chain(rng, rng.randrange(0, 30))
        assert dict(index.match(query)) == twin.match(query)
        if step % 100 == 0:
            check_invariants(index)
    check_invariants(index)


def test_the_slot_of_a_worker_that_left_serves_the_next_one():
    index = PrefixIndex()
    index.replace("a", [1, 2])
    index.replace("b", [1])
    index.remove("a")
    index.replace("c", [1, 2, 3])
    assert sorted(index.match([1, 2, 3])) == [("b", 1), ("c", 3)]
    assert len(index._workers) == 2


def test_removing_everyone_leaves_nothing():
    index = PrefixIndex()
    index.replace("a", range(100))
    index.replace("b", range(50))
    index.remove("a")
    index.remove("b")
    index.remove("b")
    assert index.num_hashes == index.num_blocks("a") == 0
    assert index.match([1]) == index.match([]) == []


def test_a_long_match_takes_few_probes():
    class Counting(dict):
        probes = 0

        def get(self, *args):
            Counting.probes += 1
            return super().get(*args)

    index = PrefixIndex()
    index.replace("a", range(4096))
    index.replace("b", range(1000))
    index._masks = Counting(index._masks)
    assert index.match(range(4096)) == [("b", 1000), ("a", 4096)]
    assert Counting.probes < 60
