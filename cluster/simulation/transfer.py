"""How long KV travels: each worker's link carries one thing after the other, at the same time as the steps compute.

The KV of a step is announced by groups of layers, evenly through the step, so only the last group's is exposed.
"""

from dataclasses import dataclass

NUM_LAYER_GROUPS = 4  # the torch executor's default: groups of a quarter of the layers


@dataclass(frozen=True, slots=True)
class TransferSpeed:
    bytes_per_s: float
    latency_s: float


@dataclass(slots=True)
class Link:
    """A worker's end of all its transfers."""

    free_at: float = 0.0


def transfer_end(
    num_bytes: int, began: float, computed: float, source: Link, sink: Link, speed: TransferSpeed
) -> float:
    """When bytes that a step computed between `began` and `computed` are in place; takes the time of both links."""
    seconds = num_bytes / speed.bytes_per_s
    source.free_at = sink.free_at = max(began, source.free_at, sink.free_at) + seconds
    return max(source.free_at, computed + seconds / NUM_LAYER_GROUPS) + speed.latency_s
