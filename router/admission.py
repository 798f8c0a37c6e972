"""The router's one queue: who waits for a worker, in which order, and when to refuse.

Owned by the placement. An entry is either waiting (added, not yet taken or discarded) or running (taken, not yet
released). The order is priority, then turns of the tenants, then first arrival; an entry put back after a failed
attempt keeps its arrival, so it goes ahead of its tenant's younger ones, and it is never refused. One set aside waits
on, no more in anybody's way, and is not refused either: its tenant has paid.
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
        self._aside: dict[T, None] = {}  # of those that wait, in order
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
        """`cost` in prompt tokens, at least 1, for the tenant's share."""
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
        """The entry to dispatch next; None when nobody waits in the queue or as many run as may."""
        return self._queues[min(self._queues)].head().entry if self._queues and self._may_run() else None

    def first_aside(self) -> T | None:
        """The entry that was set aside first; None also when as many run as may."""
        return next(iter(self._aside), None) if self._may_run() else None

    def set_aside(self) -> None:
        """Take the head out of the queue; it waits on."""
        self._aside[self._take_head()] = None

    def take(self, aside: T | None = None) -> T:
        """Move the head, or one that was set `aside`, from waiting to running."""
        if aside is None:
            entry = self._take_head()
        else:
            entry = aside
            del self._aside[entry]
        if not self._running:
            self._busy_since = self._clock()
        self._running[entry] = self._waiting.pop(entry)
        return entry

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
            if entry in self._aside:
                del self._aside[entry]
            else:
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

    def _may_run(self) -> bool:
        most = self._config.max_running
        return most is None or len(self._running) < most

    def _take_head(self) -> T:
        priority = min(self._queues)
        place = self._queues[priority].take()
        self._drop_if_empty(priority)
        return place.entry

    def _push(self, priority: int, place: Place[T]) -> None:
        self._waiting[place.entry] = (priority, place)
        queue = self._queues.get(priority)
        if queue is None:
            queue = self._queues[priority] = FairQueue()
        queue.push(place)

    def _drop_if_empty(self, priority: int) -> None:
        if not self._queues[priority]:
            del self._queues[priority]
