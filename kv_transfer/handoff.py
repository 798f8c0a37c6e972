"""The states of one handoff, as its sink sees them. Pure: the clock is an argument.

OFFERED: the offer is here, no blocks yet. RESERVED: blocks are reserved for it. PULLING: the lease is open, pieces
arrive. READY: every piece is in place, and its checksum, if there is one, was right. ACKED: the blocks may be used, as
the checksums prove or, where there are none, the source said that the lease held until then. Everything else ends in
FAILED, EXPIRED (a deadline, or the lease) or ABORTED (given up by one side). Invariant: states only go forward, and the
four last ones never change.
"""

from collections.abc import Mapping
from enum import StrEnum


class HandoffState(StrEnum):
    OFFERED = "offered"
    RESERVED = "reserved"
    PULLING = "pulling"
    READY = "ready"
    ACKED = "acked"
    FAILED = "failed"
    EXPIRED = "expired"
    ABORTED = "aborted"


_BROKEN = frozenset({HandoffState.FAILED, HandoffState.EXPIRED, HandoffState.ABORTED})

TRANSITIONS: Mapping[HandoffState, frozenset[HandoffState]] = {
    HandoffState.OFFERED: _BROKEN | {HandoffState.RESERVED},
    HandoffState.RESERVED: _BROKEN | {HandoffState.PULLING},
    HandoffState.PULLING: _BROKEN | {HandoffState.READY},
    HandoffState.READY: _BROKEN | {HandoffState.ACKED},
    HandoffState.ACKED: frozenset(),
    HandoffState.FAILED: frozenset(),
    HandoffState.EXPIRED: frozenset(),
    HandoffState.ABORTED: frozenset(),
}


class Handoff:
    """`limits` gives the seconds each state that is not terminal may last; `deadline` bounds them all."""

    def __init__(self, limits: Mapping[HandoffState, float], deadline: float, now: float) -> None:
        self._limits = limits
        self._last = deadline
        self.state = HandoffState.OFFERED
        self.deadline = min(deadline, now + limits[self.state])

    @property
    def ended(self) -> bool:
        return not TRANSITIONS[self.state]

    def advance(self, state: HandoffState, now: float) -> None:
        assert state in TRANSITIONS[self.state], (self.state, state)
        self.state = state
        if not self.ended:
            self.deadline = min(self._last, now + self._limits[state])

    def end(self, state: HandoffState, now: float) -> bool:
        """Go to a terminal state unless in one already: the first word stands."""
        if self.ended:
            return False
        self.advance(state, now)
        return True

    def remaining(self, now: float) -> float:
        """Seconds until the present state's deadline."""
        return max(0.0, self.deadline - now)
