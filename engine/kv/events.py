"""What changed in a prefix cache, for mirrors of it (the router's index).

A mirror that applies every event in order (cleared, then removed, then stored) holds exactly the cached hashes. The
log coalesces, and when nobody reads it, it shrinks to one event that says everything: its size is bounded by the cache.
"""

from collections.abc import Callable, Iterable, Sequence

import msgspec


class KvEvent(msgspec.Struct, frozen=True, gc=False):
    """Chained block hashes that stopped, then that began to be matchable."""

    removed: tuple[int, ...] = ()
    stored: tuple[int, ...] = ()
    cleared: bool = False  # everything before is gone


def merged(events: Sequence[KvEvent]) -> KvEvent:
    """One event that does what these, which follow one another, do to a mirror."""
    if len(events) == 1:
        return events[0]
    removed: dict[int, None] = {}
    stored: dict[int, None] = {}
    cleared = False
    for event in events:
        if event.cleared:
            cleared = True
            removed.clear()
            stored.clear()
        for block_hash in event.removed:
            if block_hash in stored:
                del stored[block_hash]
            else:
                removed[block_hash] = None
        for block_hash in event.stored:
            if block_hash in removed:
                del removed[block_hash]
            else:
                stored[block_hash] = None
    return KvEvent(tuple(removed), tuple(stored), cleared)


class KvEventLog:
    """Owned by one prefix cache. `snapshot` lists all cached hashes; `max_hashes` bounds what is kept undrained."""

    def __init__(self, snapshot: Callable[[], Iterable[int]], max_hashes: int) -> None:
        self._snapshot = snapshot
        self._max_hashes = max_hashes
        self._closed: list[KvEvent] = []
        self._removed: list[int] = []
        self._stored: list[int] = []
        self._num_hashes = 0
        self.next_event_number = 0  # of the first event that the next `drain` returns

    @property
    def is_empty(self) -> bool:
        return not (self._closed or self._removed or self._stored)

    def stored(self, block_hashes: Sequence[int]) -> None:
        self._stored += block_hashes
        self._count(len(block_hashes))

    def removed(self, block_hashes: Sequence[int]) -> None:
        if self._stored:
            self._close()
        self._removed += block_hashes
        self._count(len(block_hashes))

    def cleared(self) -> None:
        self._closed = [KvEvent(cleared=True)]
        self._removed, self._stored, self._num_hashes = [], [], 0

    def drain(self) -> list[KvEvent]:
        """Everything since the last call, in order."""
        self._close()
        events, self._closed, self._num_hashes = self._closed, [], 0
        self.next_event_number += len(events)
        return events

    def _close(self) -> None:
        if self._removed or self._stored:
            self._closed.append(KvEvent(tuple(self._removed), tuple(self._stored)))
            self._removed, self._stored = [], []

    def _count(self, num_hashes: int) -> None:
        self._num_hashes += num_hashes
        if self._num_hashes > self._max_hashes:
            self._closed = [KvEvent(stored=tuple(self._snapshot()), cleared=True)]
            self._removed, self._stored, self._num_hashes = [], [], 0
