"""The router's one queue: who waits for a worker, in which order, and when to refuse.

Owned by the dispatcher. An entry is either waiting (added, not yet taken or discarded) or running (taken, not yet
released). The order is priority, then first arrival; an entry put back after a failed attempt keeps its arrival,
so it goes ahead of younger ones, and it is never refused.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from router.generation import Overloaded

T = TypeVar("T")

_RATE_WINDOW = 128  # completions that show how fast the queue moves
_MIN_RETRY_AFTER_S = 1.0
_MAX_RETRY_AFTER_S = 60.0


@dataclass(frozen=True, slots=True)
class AdmissionConfig:
    max_queue: int = 2048  # waiting requests; the next one is refused
    max_running: int = 8192  # requests dispatched to workers at once, by this router


class Admission(Generic[T]):
    def __init__(self, config: AdmissionConfig, clock: Callable[[], float]) -> None:
        self._config = config
        self._clock = clock
        self._arrivals = itertools.count()
        self._heap: list[tuple[int, int, T]] = []  # arrivals are unique, so entries are never compared
        self._waiting: dict[T, tuple[int, int]] = {}  # discarded entries stay in the heap until they surface
        self._running: dict[T, tuple[int, int]] = {}
        self._completions: deque[float] = deque(maxlen=_RATE_WINDOW)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def waiting(self) -> list[T]:
        return list(self._waiting)

    def add(self, entry: T, priority: int) -> None:
        self._push(entry, (priority, next(self._arrivals)))

    def refuse_excess(self, entry: T) -> None:
        """Raise Overloaded when `entry`, the newest, still waits and more wait than may."""
        if entry in self._waiting and len(self._waiting) > self._config.max_queue:
            retry_after = self.retry_after()
            self.release(entry)
            raise Overloaded("too many requests are waiting", retry_after=retry_after)

    def head(self) -> T | None:
        """The entry to dispatch next; None when nobody waits or as many run as may."""
        if len(self._running) >= self._config.max_running:
            return None
        while self._heap:
            _, _, entry = self._heap[0]
            if entry in self._waiting:
                return entry
            heapq.heappop(self._heap)
        return None

    def take(self) -> T:
        """Move the head from waiting to running."""
        _, _, entry = heapq.heappop(self._heap)
        self._running[entry] = self._waiting.pop(entry)
        return entry

    def put_back(self, entry: T) -> None:
        """A running entry waits again, where it stood."""
        self._push(entry, self._running.pop(entry))

    def release(self, entry: T) -> None:
        """The entry is over, wherever it was. Idempotent."""
        if self._running.pop(entry, None) is not None:
            self._completions.append(self._clock())
        if self._waiting.pop(entry, None) is not None and len(self._heap) > 2 * len(self._waiting) + 64:
            self._heap = [(*order, each) for each, order in self._waiting.items()]
            heapq.heapify(self._heap)

    def retry_after(self) -> float:
        """Seconds until the queue, at its recent speed, has room for one more."""
        if len(self._completions) < 2:
            return _MIN_RETRY_AFTER_S
        elapsed = self._clock() - self._completions[0]
        estimate = elapsed * (len(self._waiting) + 1) / len(self._completions)
        return min(_MAX_RETRY_AFTER_S, max(_MIN_RETRY_AFTER_S, estimate))

    def _push(self, entry: T, order: tuple[int, int]) -> None:
        self._waiting[entry] = order
        heapq.heappush(self._heap, (*order, entry))
