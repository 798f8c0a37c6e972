"""The router's one queue: who waits for a worker, in which order, and when to refuse.

Owned by the placement. An entry is either waiting (added, not yet taken or discarded) or running (taken, not yet
released). The order is priority, then turns of the tenants, then first arrival; an entry put back after a failed
attempt keeps its arrival, so it goes ahead of its tenant's younger ones, and it is never refused.
"""

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

from router.fairness import FairQueue, Place

T = TypeVar("T")

_RATE_WINDOW = 128  # completions that show how fast the queue moves, at most
_RATE_WINDOW_S = 60.0  # older ones say nothing of now
_MIN_RETRY_AFTER_S = 1.0
_MAX_RETRY_AFTER_S = 60.0


@dataclass(frozen=True, slots=True)
class AdmissionConfig:
    max_queue: int = 1024  # waiting requests; the next one is refused
    max_running: int | None = None  # requests that workers have of this router at once; None: as many as they take


class Admission(Generic[T]):
    def __init__(self, config: AdmissionConfig, clock: Callable[[], float]) -> None:
        self._config = config
        self._clock = clock
        self._arrivals = itertools.count()
        self._queues: dict[int, FairQueue[T]] = {}  # by priority; none is empty
        self._waiting: dict[T, tuple[int, Place[T]]] = {}  # with its priority
        self._running: dict[T, tuple[int, Place[T]]] = {}
        self._completions: deque[float] = deque(maxlen=_RATE_WINDOW)
        self._busy_since = 0.0  # meaningful while anything runs

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def waiting(self) -> list[T]:
        return list(self._waiting)

    def waits(self, entry: T) -> bool:
        return entry in self._waiting

    def add(self, entry: T, priority: int, tenant: str = "", cost: int = 1) -> None:
        """`cost` in tokens, at least 1, for the tenant's share."""
        self._push(priority, Place(entry, tenant, next(self._arrivals), cost))

    def refuse_excess(self) -> T | None:
        """Release and return one that waits, when more wait than may: of the last priority, of the tenant with the
        most waiting, the newest. So nobody keeps others out by filling the queue."""
        if len(self._waiting) > self._config.max_queue:
            for priority in sorted(self._queues, reverse=True):
                place = self._queues[priority].last()
                if place is not None:
                    self.release(place.entry)
                    return place.entry
        return None

    def head(self) -> T | None:
        """The entry to dispatch next; None when nobody waits or as many run as may."""
        most = self._config.max_running
        if not self._queues or (most is not None and len(self._running) >= most):
            return None
        return self._queues[min(self._queues)].head().entry

    def take(self) -> T:
        """Move the head from waiting to running."""
        priority = min(self._queues)
        place = self._queues[priority].take()
        self._drop_if_empty(priority)
        if not self._running:
            self._busy_since = self._clock()
        self._running[place.entry] = self._waiting.pop(place.entry)
        return place.entry

    def put_back(self, entry: T) -> None:
        """A running entry waits again, where it stood; its tenant has been charged, and it is not refused."""
        priority, place = self._running.pop(entry)
        self._push(priority, msgspec.structs.replace(place, cost=0))

    def release(self, entry: T) -> bool:
        """The entry is over, wherever it was; whether it was anywhere."""
        known = False
        if self._running.pop(entry, None) is not None:
            self._completions.append(self._clock())
            known = True
        waited = self._waiting.pop(entry, None)
        if waited is not None:
            priority, place = waited
            self._queues[priority].remove(place)
            self._drop_if_empty(priority)
            known = True
        return known

    def retry_after(self) -> float:
        """Seconds until the queue, at its recent speed, has room for one more."""
        now = self._clock()
        while self._completions and now - self._completions[0] > _RATE_WINDOW_S:
            self._completions.popleft()
        if len(self._completions) >= 2:
            estimate = (now - self._completions[0]) * (len(self._waiting) + 1) / len(self._completions)
        else:  # what runs has kept everybody waiting for so long already
            estimate = now - self._busy_since if self._running else 0.0
        return min(_MAX_RETRY_AFTER_S, max(_MIN_RETRY_AFTER_S, estimate))

    def _push(self, priority: int, place: Place[T]) -> None:
        self._waiting[place.entry] = (priority, place)
        queue = self._queues.get(priority)
        if queue is None:
            queue = self._queues[priority] = FairQueue()
        queue.push(place)

    def _drop_if_empty(self, priority: int) -> None:
        if not self._queues[priority]:
            del self._queues[priority]
