"""How long KV travels: each worker's link carries one thing after the other, at the same time as the steps compute.
A transfer that waits at one end does not keep the other end from working.

The KV of a step is announced by groups of layers, evenly through the step, so only the last group's is exposed.
"""

from dataclasses import dataclass

LAST_GROUP = 1 / 16  # of the layers, as the torch executor announces them


@dataclass(frozen=True, slots=True)
class TransferSpeed:
    bytes_per_s: float
    latency_s: float


@dataclass(slots=True)
class Link:
    """A worker's end of all its transfers."""

    free_at: float = 0.0
    busy_s: float = 0.0

    def take(self, began: float, seconds: float) -> float:
        """The time of a transfer that may begin at `began`; returns when it ends."""
        self.free_at = max(began, self.free_at) + seconds
        self.busy_s += seconds
        return self.free_at

    def take_busy(self) -> float:
        """Seconds of transfers since the last call."""
        busy_s, self.busy_s = self.busy_s, 0.0
        return busy_s


def transfer_end(
    num_bytes: int, began: float, computed: float, source: Link, sink: Link, speed: TransferSpeed
) -> float:
    """When bytes that a step computed between `began` and `computed` are in place; takes the time of both links."""
    seconds = num_bytes / speed.bytes_per_s
    moved = max(source.take(began, seconds), sink.take(began, seconds))
    return max(moved, computed + LAST_GROUP * seconds) + speed.latency_s
