"""Membership: workers keep a lease alive, routers watch the leases.

A store (lease files, Redis) holds what was said; everything that takes judgement is here, once for all stores. A
lease ends in two ways: its holder says so, which is believed at once, or it is no longer seen, which is believed only
after it stayed away for one more time to live. So a store that is away, or comes back empty, loses no worker: the
living renew their leases within a third of that time.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import msgspec

from cluster.spec import WorkerId
from router.membership import Joined, Left

log = logging.getLogger(__name__)

TIME_TO_LIVE_S = 6.0
SCAN_INTERVAL_S = 0.25


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """What a worker says about itself. `epoch` differs between two lives of one id."""

    worker_id: WorkerId
    role: str
    address: str  # host:port of its Worker service
    epoch: int
    model: str


class Lease(msgspec.Struct, frozen=True):
    """A record that holds for `ttl` seconds from when it was stored."""

    record: WorkerRecord
    ttl: float
    left: bool = False  # its holder has gone in peace


class RegistryUnavailable(Exception):
    """The store did not answer, which says nothing about the workers."""


class LeaseStore(Protocol):
    """Where leases are kept. Each call has a deadline; all but `aclose` raise RegistryUnavailable."""

    async def put(self, lease: Lease) -> None:
        """Store or replace the lease of a worker id."""
        ...

    async def get(self, worker_id: WorkerId) -> Lease | None:
        """The lease of a worker id; None: it has ended, or there was none."""
        ...

    async def scan(self) -> list[Lease]:
        """All leases that have not ended, and those marked as left."""
        ...

    async def aclose(self) -> None: ...


class MembershipView:
    """Turns successive scans into events. Pure: time comes in with each scan."""

    def __init__(self, ttl: float) -> None:
        self._ttl = ttl
        self._present: dict[WorkerId, WorkerRecord] = {}
        self._unseen_since: dict[WorkerId, float] = {}

    def observe(self, leases: Iterable[Lease], now: float) -> list[Joined | Left]:
        """What has changed since the last scan."""
        events: list[Joined | Left] = []
        seen = {lease.record.worker_id: lease for lease in leases}
        for worker_id, known in list(self._present.items()):
            lease = seen.get(worker_id)
            if lease is None:
                since = self._unseen_since.setdefault(worker_id, now)
                gone = now - since >= self._ttl
            else:
                self._unseen_since.pop(worker_id, None)
                gone = lease.left or lease.record != known
            if gone:
                del self._present[worker_id]
                self._unseen_since.pop(worker_id, None)
                events.append(Left(worker_id))
        for worker_id, lease in seen.items():
            if not lease.left and worker_id not in self._present:
                self._present[worker_id] = lease.record
                events.append(_joined(lease.record))
        return events


def _joined(record: WorkerRecord) -> Joined:
    return Joined(record.worker_id, record.role, record.address, record.epoch)


class Registry:
    """One per process, over a store that it owns."""

    def __init__(
        self,
        store: LeaseStore,
        *,
        ttl: float = TIME_TO_LIVE_S,
        scan_interval: float = SCAN_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store = store
        self._ttl = ttl
        self._scan_interval = scan_interval
        self._clock = clock
        self._sleep = sleep

    @asynccontextmanager
    async def register(self, record: WorkerRecord) -> AsyncIterator[None]:
        """Keep `record` in the registry while the context is open, and say goodbye at its end.

        A store that is away delays this and is retried; it never ends the worker. A process that registers the same
        worker id later replaces this one while it lives: routers attach to one of the two, not to each by turns.
        """
        await self._put(record)
        heartbeat = asyncio.create_task(self._keep_alive(record), name=f"lease of {record.worker_id}")
        try:
            yield
        finally:
            heartbeat.cancel()
            await asyncio.gather(heartbeat, return_exceptions=True)
            await self.deregister(record)

    async def deregister(self, record: WorkerRecord) -> None:
        """Tell the routers that this life of the worker is over, unless its next one has already begun."""
        if await self._successor(record) is None:
            await self._put(record, left=True)

    async def watch(self) -> AsyncGenerator[Joined | Left, None]:
        """Everyone present first, then every change, until the consumer stops iterating."""
        view = MembershipView(self._ttl)
        away = False
        while True:
            try:
                leases = await self._store.scan()
            except RegistryUnavailable as error:
                if not away:
                    log.warning("the registry is away, keeping the workers known so far: %s", error)
                away = True
            else:
                if away:
                    log.info("the registry is back")
                away = False
                for event in view.observe(leases, self._clock()):
                    yield event
            # Asking again is the one way that every store and file system supports. It is off every request's path:
            # a worker that dies is noticed by its session, this only finds newcomers.
            await self._sleep(self._scan_interval)

    async def aclose(self) -> None:
        await self._store.aclose()

    async def _keep_alive(self, record: WorkerRecord) -> None:
        replaced = False
        while True:
            await self._sleep(self._ttl / 3)
            successor = await self._successor(record)
            if successor is None:
                await self._put(record)
            elif not replaced:
                log.error(
                    "another process has started as %s, at %s; this one gets no requests while that runs. Each of a "
                    "pool's workers needs its own --index",
                    record.worker_id,
                    successor.address,
                )
            replaced = successor is not None

    async def _successor(self, record: WorkerRecord) -> WorkerRecord | None:
        """The next life of the worker of `record`, if it has begun as far as is known."""
        try:
            lease = await self._store.get(record.worker_id)
        except RegistryUnavailable:
            return None
        return None if lease is None or lease.left or lease.record.epoch == record.epoch else lease.record

    async def _put(self, record: WorkerRecord, *, left: bool = False) -> None:
        try:
            await self._store.put(Lease(record, self._ttl, left))
        except RegistryUnavailable as error:
            log.warning("%s could not store its lease: %s", record.worker_id, error)
