"""Time in which at least one of several things ran. One thread."""


class BusyTime:
    """Times are by one clock, in seconds."""

    def __init__(self) -> None:
        self._num_running = 0
        self._since = 0.0  # what has been counted, while something runs
        self._seconds = 0.0

    def begin(self, now: float) -> None:
        if not self._num_running:
            self._since = now
        self._num_running += 1

    def end(self, now: float) -> None:
        self._num_running -= 1
        if not self._num_running:
            self._seconds += now - self._since

    def take(self, now: float) -> float:
        """Since the last call."""
        if self._num_running:
            self._seconds += now - self._since
            self._since = now
        seconds, self._seconds = self._seconds, 0.0
        return seconds
