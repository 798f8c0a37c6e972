"""The KV cache: exact block ids, eviction order, collisions, duplicates, events."""

from collections.abc import Sequence

import pytest

from engine.kv.block_hash import block_hashes
from engine.kv.cache import KvCache
from engine.kv.events import KvEvent
from engine.kv.layout import BlockId

SIZE = 2


def hashes_of(tokens: Sequence[int]) -> list[int]:
    return block_hashes(tokens, SIZE, 0)


def fill(kv: KvCache, tokens: Sequence[int]) -> list[BlockId]:
    """Blocks for `tokens`, matched where possible, computed and stored; referenced by the caller."""
    hashes = hashes_of(tokens)
    held = kv.match(tokens, hashes)
    fresh = kv.allocate(-(-len(tokens) // SIZE) - len(held))
    assert fresh is not None
    kv.release(kv.store(tokens, hashes, held + fresh, len(tokens)))
    kv.check_invariants()
    return held + fresh


def matched(kv: KvCache, tokens: Sequence[int]) -> list[BlockId]:
    blocks = kv.match(tokens, hashes_of(tokens))
    kv.release(blocks)
    kv.check_invariants()
    return blocks


def test_allocation_is_all_or_nothing() -> None:
    kv = KvCache(4, SIZE)
    assert kv.allocate(5) is None
    assert kv.num_free == 4
    assert kv.allocate(3) == [0, 1, 2]
    assert kv.allocate(2) is None
    assert kv.allocate(1) == [3]
    assert kv.allocate(0) == []
    kv.check_invariants([BlockId(i) for i in range(4)])


def test_a_released_prefix_is_found_again_in_the_same_blocks() -> None:
    kv = KvCache(8, SIZE)
    blocks = fill(kv, [1, 2, 3, 4, 5])
    kv.release(blocks)
    assert matched(kv, [1, 2, 3, 4, 5, 6]) == blocks[:2]
    assert matched(kv, [1, 2, 9, 9]) == blocks[:1]
    assert matched(kv, [2, 1]) == []
    assert (kv.num_free, kv.num_cached) == (8, 2)


def test_a_matched_block_is_retained_for_the_caller() -> None:
    kv = KvCache(2, SIZE)
    kv.release(fill(kv, [1, 2]))
    held = kv.match([1, 2], hashes_of([1, 2]))
    assert kv.num_free == 1
    assert kv.allocate(2) is None
    kv.check_invariants(held)
    kv.release(held)
    assert kv.num_free == 2


def test_leaves_are_evicted_before_their_parents_and_the_longest_idle_first() -> None:
    kv = KvCache(6, SIZE)
    old, new = fill(kv, [1, 1, 2, 2, 3, 3]), fill(kv, [7, 7, 8, 8, 9, 9])
    kv.release(old)
    kv.release(new)
    matched(kv, [1, 1])  # used again: only its own blocks become young
    kv.drain_events()
    assert kv.allocate(3) is not None
    gone = hashes_of([1, 1, 2, 2, 3, 3])[2:0:-1] + hashes_of([7, 7, 8, 8, 9, 9])[2:]
    assert kv.drain_events() == [KvEvent(removed=tuple(gone))]
    kv.check_invariants()


def test_a_referenced_block_is_never_evicted() -> None:
    kv = KvCache(3, SIZE)
    held = fill(kv, [1, 1])
    kv.release(fill(kv, [2, 2, 3, 3]))
    assert kv.allocate(3) is None
    assert kv.allocate(2) is not None
    assert matched(kv, [1, 1]) == held


def test_a_collision_is_a_miss() -> None:
    kv = KvCache(4, SIZE)
    blocks = kv.allocate(2)
    assert blocks is not None
    kv.release(kv.store([1, 1, 2, 2], [10, 11], blocks, 4))
    assert kv.match([1, 1, 3, 3], [10, 11]) == blocks[:1]
    assert kv.match([9, 9, 2, 2], [10, 11]) == []
    assert kv.match([2, 2], [11]) == []  # the same tokens in the middle of another chain


def test_what_collides_is_not_cached_nor_is_what_follows() -> None:
    kv = KvCache(6, SIZE)
    first, second = kv.allocate(2), kv.allocate(3)
    assert first is not None
    assert second is not None
    kv.release(kv.store([1, 1, 2, 2], [10, 11], first, 4))
    kv.release(kv.store([5, 5, 6, 6, 7, 7], [20, 11, 22], second, 6))
    assert kv.snapshot() == [10, 11, 20]
    kv.check_invariants(first + second)


def test_of_two_blocks_with_the_same_content_one_is_kept() -> None:
    kv = KvCache(6, SIZE)
    hashes = hashes_of([1, 1, 2, 2])
    first, second = kv.allocate(2), kv.allocate(3)
    assert first is not None
    assert second is not None
    kv.release(kv.store([1, 1, 2, 2], hashes, first, 4))
    kv.release(kv.store([1, 1, 2, 2, 3], hashes, second, 5))
    assert second[:2] == first
    assert (kv.num_cached, kv.num_free) == (2, 3)
    kv.check_invariants(first + second)


def test_a_child_keeps_the_parent_that_another_sequence_stored() -> None:
    kv = KvCache(4, SIZE)
    first, second = kv.allocate(1), kv.allocate(2)
    assert first is not None
    assert second is not None
    lease = list(second)
    kv.retain(lease)
    tokens = [1, 1, 2, 2]
    kv.release(kv.store([1, 1], hashes_of([1, 1]), first, 2))
    kv.release(kv.store(tokens, hashes_of(tokens), second, 4))
    kv.release(first)
    kv.release(second)
    kv.check_invariants(lease)  # it holds the second block, cached behind the first of the other sequence
    assert kv.num_free == 1
    assert kv.allocate(2) is None
    assert matched(kv, tokens) == [first[0], lease[1]]
    kv.release(lease)
    assert kv.num_free == 4
    kv.check_invariants([])
    assert kv.allocate(4) is not None
    assert kv.num_cached == 0


def test_storing_starts_over_after_the_cache_was_cleared() -> None:
    kv = KvCache(3, SIZE)
    tokens = [1, 1, 2, 2, 3, 3]
    blocks = fill(kv, tokens[:4]) + (kv.allocate(1) or [])
    kv.clear()
    kv.release(kv.store(tokens, hashes_of(tokens), blocks, 6))
    assert matched(kv, tokens) == blocks
    kv.check_invariants(blocks)


def test_storing_again_changes_nothing() -> None:
    kv = KvCache(4, SIZE)
    blocks = fill(kv, [1, 2, 3, 4])
    kv.drain_events()
    kv.release(kv.store([1, 2, 3, 4], hashes_of([1, 2, 3, 4]), blocks, 4))
    kv.release(kv.store([1, 2, 3, 4], hashes_of([1, 2, 3, 4]), blocks, 2))
    assert kv.drain_events() == []
    kv.check_invariants(blocks)


def test_clearing_forgets_every_prefix_and_leaves_referenced_blocks_with_their_holders() -> None:
    kv = KvCache(6, SIZE)
    held = fill(kv, [1, 1, 2, 2])
    kv.release(fill(kv, [7, 7]))
    kv.drain_events()
    kv.clear()
    assert kv.drain_events() == [KvEvent(cleared=True)]
    assert (kv.num_cached, kv.num_free) == (0, 4)
    kv.check_invariants(held)
    kv.release(held)
    assert kv.num_free == 6


def test_events_are_numbered_and_group_what_was_removed_before_what_was_stored() -> None:
    kv = KvCache(2, SIZE)
    assert kv.next_event_number == 0
    kv.release(fill(kv, [1, 1]))
    kv.release(fill(kv, [2, 2]))
    one, two, three = (hashes_of(tokens)[0] for tokens in ([1, 1], [2, 2], [3, 3]))
    kv.release(fill(kv, [3, 3]))
    assert kv.drain_events() == [KvEvent(stored=(one, two)), KvEvent(removed=(one,), stored=(three,))]
    assert kv.next_event_number == 2
    assert kv.drain_events() == []
    assert kv.snapshot() == [two, three]


def test_events_that_nobody_drains_shrink_to_one_that_says_everything() -> None:
    kv = KvCache(2, SIZE)
    for token in range(100):
        kv.release(fill(kv, [token, token]))
    events = kv.drain_events()
    assert events[0].cleared
    mirror: set[int] = set()
    for event in events:
        mirror = (set() if event.cleared else mirror) - set(event.removed) | set(event.stored)
    assert mirror == set(kv.snapshot())
    assert sum(len(event.stored) + len(event.removed) for event in events) <= 8


@pytest.mark.parametrize("misuse", ["release", "retain"])
def test_releasing_or_retaining_a_free_block_is_a_bug(misuse: str) -> None:
    kv = KvCache(2, SIZE)
    with pytest.raises(AssertionError):
        getattr(kv, misuse)([BlockId(1)])


def test_of_what_is_expected_and_never_drained_the_latest_is_kept() -> None:
    kv = KvCache(2, SIZE)
    kv.expect(range(3000))
    kv.expect(range(3000, 6000))
    assert kv.drain_coming() == list(range(6000 - 4096, 6000))
    assert kv.drain_coming() == []
