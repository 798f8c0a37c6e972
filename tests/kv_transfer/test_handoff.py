from itertools import product

import pytest

from kv_transfer.handoff import TRANSITIONS, Handoff, HandoffState

LIMITS = {state: 10.0 for state in HandoffState if TRANSITIONS[state]}
GOOD = [
    HandoffState.OFFERED,
    HandoffState.RESERVED,
    HandoffState.PULLING,
    HandoffState.READY,
    HandoffState.ACKED,
]
BROKEN = [HandoffState.FAILED, HandoffState.EXPIRED, HandoffState.ABORTED]


def at(state: HandoffState) -> Handoff:
    handoff = Handoff(LIMITS, deadline=100.0, now=0.0)
    if state in BROKEN:
        handoff.advance(state, 0.0)
    else:
        for step in GOOD[1 : GOOD.index(state) + 1]:
            handoff.advance(step, 0.0)
    return handoff


@pytest.mark.parametrize(("before", "after"), list(product(HandoffState, HandoffState)))
def test_only_the_next_state_or_a_broken_one_can_follow(before: HandoffState, after: HandoffState) -> None:
    handoff = at(before)
    forward = before in GOOD[:-1] and after is GOOD[GOOD.index(before) + 1]
    broken = before in GOOD[:-1] and after in BROKEN
    if forward or broken:
        handoff.advance(after, 0.0)
        assert handoff.state is after
    else:
        with pytest.raises(AssertionError):
            handoff.advance(after, 0.0)
        assert handoff.state is before


@pytest.mark.parametrize("state", [HandoffState.ACKED, *BROKEN])
def test_the_first_end_stands(state: HandoffState) -> None:
    handoff = at(state)
    assert handoff.ended
    assert not any(handoff.end(other, 0.0) for other in BROKEN)
    assert handoff.state is state


def test_every_state_has_a_deadline_of_its_own_within_that_of_the_whole() -> None:
    handoff = Handoff({state: 10.0 for state in HandoffState}, deadline=25.0, now=0.0)
    assert handoff.deadline == 10.0
    handoff.advance(HandoffState.RESERVED, 8.0)
    assert handoff.remaining(8.0) == 10.0
    handoff.advance(HandoffState.PULLING, 18.0)
    assert handoff.remaining(18.0) == 7.0
    assert handoff.remaining(26.0) == 0.0
