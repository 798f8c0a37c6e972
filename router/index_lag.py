"""How far the index is behind one worker: from the moment a block became matchable there to the moment it counts here.

Two machines' monotonic clocks have nothing in common. What this one reads when a frame comes, less what the worker read
when it sent it, is how far the clocks are apart plus how long the frame travelled; the least of that over the last
frames stands for the clocks. So lag is measured beyond the travel time of the fastest frame, and clocks may drift.
"""

WINDOW_S = 30.0  # a window's least value counts in this one and the next; heartbeats alone are 60 frames


class IndexLag:
    """Of one session. Times are seconds; `now` is by the router's monotonic clock."""

    def __init__(self) -> None:
        self.last_s = 0.0  # of the last events
        self._apart = self._apart_before = float("inf")
        self._window_ends = float("-inf")

    def frame_came(self, sent: float, now: float) -> None:
        """`sent` by the worker's monotonic clock. For every frame."""
        if now >= self._window_ends:
            self._apart_before, self._apart = self._apart, float("inf")
            self._window_ends = now + WINDOW_S
        apart = now - sent
        if apart < self._apart:
            self._apart = apart

    def applied(self, happened: float, now: float) -> float:
        """The lag of events that happened then, by the worker's clock, and count since `now`. After `frame_came`."""
        self.last_s = max(0.0, now - happened - min(self._apart, self._apart_before))
        return self.last_s
