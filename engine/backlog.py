"""What one router has yet to hear of a worker, and when it hears.

What is said to a router leaves at once, and all that has changed goes with it. Changes alone are told where a step
begins, and only where they would be older than REPORT_S at its end: so routers know of a long step from its beginning,
and of short ones now and then. Where many routers share many workers, a frame from each worker for each of its steps
would be more than a router can read, and than a worker has time to write. Owned by who writes the frames: a worker's
engine thread, or a simulated worker.
"""

from collections.abc import Sequence

from engine.kv.events import KvEvent, merged

REPORT_S = 0.1


class Backlog:
    """Of one router, from the moment it attaches. Times are seconds of one clock."""

    def __init__(self) -> None:
        self.changed = False  # there is something to tell
        self.coming: list[int] = []  # as KvCache.drain_coming
        self.since = 0.0  # when the first of its events happened
        self._events: list[KvEvent] = []
        self._reported_at = float("-inf")

    def add(self, events: Sequence[KvEvent], since: float, coming: Sequence[int]) -> None:
        """Something has changed, perhaps these: the load does with all that a worker takes, and says to anybody."""
        self.changed = True
        if events and not self._events:
            self.since = since
        self._events += events
        self.coming += coming

    def is_due(self, step_ends: float) -> bool:
        """Whether to report, without words for this router, where a step begins that ends then."""
        return self.changed and step_ends - self._reported_at >= REPORT_S

    def told(self, now: float, *, reports: bool) -> KvEvent | None:
        """A frame goes out with all that there is; the event stands for all of them. Forgets `coming`, too.

        `reports`: a step begins, or none does.
        """
        event = merged(self._events) if self._events else None
        self._events, self.coming, self.changed = [], [], False
        if reports:
            self._reported_at = now
        return event
