"""Leases in Redis: one key per worker with a time to live, a set of the worker ids to read them by, and the number of
times that anything has changed, so that who asks often reads all of them seldom.

Plain commands only (SET PX GET, SADD, INCR, GET, SMEMBERS, MGET, SREM), so any server that speaks Redis 6.2 will do,
and clocks of different machines are never compared: the server alone ends leases.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from cluster.registry.base import Lease, RegistryUnavailable
from cluster.spec import WorkerId

log = logging.getLogger(__name__)

TIMEOUT_S = 2.0
BATCH = 128  # leases read at once, so that a thousand of them are no pause for the streams of their reader
MAX_SCANS = 8  # from the last reading; a lease that ends, or whose writer died over it, changes no number


class RedisLeaseStore:
    def __init__(self, url: str, name: str, timeout_s: float = TIMEOUT_S) -> None:
        """`name` keeps the deployments on one server apart. Raises ValueError for a bad URL; connects when used."""
        self._redis = Redis.from_url(
            url,
            # The client bounds its writes by asyncio.wait_for, which on Python 3.11 can swallow a cancellation: a
            # heartbeat would never end. So the deadline is set here, around whole exchanges.
            socket_timeout=None,
            socket_connect_timeout=None,
            decode_responses=True,
            encoding_errors="replace",  # what someone else wrote is malformed, not fatal
        )
        self._members = f"baton:{name}:workers"
        self._num_changes = f"baton:{name}:changes"
        self._timeout_s = timeout_s
        self._read_at: bytes | str | None = None  # number of changes at the last reading
        self._num_scans = MAX_SCANS  # since then
        self._leases: list[Lease] = []

    async def put(self, lease: Lease) -> None:
        worker_id, value = lease.record.worker_id, msgspec.json.encode(lease).decode()
        async with self._exchange(), self._redis.pipeline(transaction=True) as commands:
            commands.set(f"{self._members}:{worker_id}", value, px=round(lease.ttl * 1000), get=True)
            commands.sadd(self._members, worker_id)
            before, is_new = await commands.execute()
            if is_new or before != value:
                await self._redis.incr(self._num_changes)

    async def get(self, worker_id: WorkerId) -> Lease | None:
        async with self._exchange():
            value = await self._redis.get(f"{self._members}:{worker_id}")
        return None if value is None else self._decoded(value)

    async def scan(self) -> list[Lease]:
        async with self._exchange():
            num_changes = await self._redis.get(self._num_changes)
            self._num_scans += 1
            if num_changes != self._read_at or self._num_scans >= MAX_SCANS:
                self._leases = await self._read()
                self._read_at, self._num_scans = num_changes, 0
        return self._leases

    async def _read(self) -> list[Lease]:
        members = sorted(await self._redis.smembers(self._members))
        leases, ended = [], []
        for first in range(0, len(members), BATCH):
            some = members[first : first + BATCH]
            values = await self._redis.mget([f"{self._members}:{member!s}" for member in some])
            for member, value in zip(some, values, strict=True):
                if value is None:
                    ended.append(member)
                elif (lease := self._decoded(value)) is not None:
                    leases.append(lease)
        if ended:  # a lease renewed just now adds its id again with the next renewal
            await self._redis.srem(self._members, *ended)
        return leases

    async def aclose(self) -> None:
        await self._redis.aclose()

    @asynccontextmanager
    async def _exchange(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._timeout_s):
                yield
        except TimeoutError:
            raise RegistryUnavailable(f"Redis did not answer within {self._timeout_s} s") from None
        except (RedisError, OSError) as error:
            raise RegistryUnavailable(f"Redis: {error}") from None

    def _decoded(self, value: bytes | str) -> Lease | None:
        try:
            return msgspec.json.decode(value, type=Lease)
        except msgspec.DecodeError as error:
            log.warning("ignoring a lease below %s: %s", self._members, error)
            return None
