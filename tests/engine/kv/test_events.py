"""One event in place of many."""

from hypothesis import given
from hypothesis import strategies as st

from engine.kv.events import KvEvent, KvEventLog, merged


def applied(mirror: set[int], event: KvEvent) -> set[int]:
    """A mirror that is told of nothing that it knows already: it never removes what it lacks, or stores what it has."""
    after = set() if event.cleared else set(mirror)
    assert after >= set(event.removed)
    after -= set(event.removed)
    assert not after & set(event.stored)
    assert len(set(event.stored)) == len(event.stored)
    return after | set(event.stored)


@given(st.lists(st.lists(st.integers(0, 7), max_size=6), min_size=1), st.integers(0, 7), st.integers(1, 20))
def test_one_event_does_what_all_of_them_did(steps: list[list[int]], cleared_at: int, max_hashes: int) -> None:
    """Each number of a step is a block that is stored, or removed where the cache has it."""
    held: dict[int, None] = {3: None, 4: None}
    log, first, events = KvEventLog(lambda: held, max_hashes), set(held), []
    for number, step in enumerate(steps):
        for block_hash in step:
            if block_hash in held:
                del held[block_hash]
                log.removed([block_hash])
            else:
                held[block_hash] = None
                log.stored([block_hash])
        if number == cleared_at:
            held.clear()
            log.cleared()
        events += log.drain()
    one_by_one = first
    for event in events:
        one_by_one = applied(one_by_one, event)
    assert one_by_one == set(held)
    if events:
        assert applied(first, merged(events)) == set(held)


def test_parents_stay_before_their_children() -> None:
    events = [KvEvent(stored=(9, 5)), KvEvent(removed=(5,), stored=(7,)), KvEvent(stored=(1,))]
    assert merged(events) == KvEvent(stored=(9, 7, 1))
