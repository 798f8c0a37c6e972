"""Who is there: the one thing the router knows about the registry behind it.

The control plane implements this over lease files or Redis; the dispatcher consumes it. A worker that
comes back under the same id announces itself with another epoch.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Joined:
    """A worker may be attached to. Also sent when its address or epoch changed."""

    worker_id: str
    role: str  # "prefill" or "decode"
    address: str  # host:port of its Worker service
    epoch: int  # differs between two lives of one worker id


@dataclass(frozen=True, slots=True)
class Left:
    """A worker's lease ended. Requests it still runs may finish; it gets no new ones."""

    worker_id: str


class Membership(Protocol):
    def watch(self) -> AsyncIterator[Joined | Left]:
        """Everyone present first, then every change, until the consumer stops iterating."""
        ...
