"""Leases in Redis: one key per worker with a time to live, and a set of the worker ids to read them by.

Plain commands only (SET PX, SADD, SMEMBERS, MGET, SREM), so any server that speaks Redis will do, and clocks of
different machines are never compared: the server alone ends leases.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from cluster.registry.base import Lease, RegistryUnavailable

log = logging.getLogger(__name__)

TIMEOUT_S = 2.0


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
        self._timeout_s = timeout_s

    async def put(self, lease: Lease) -> None:
        worker_id = lease.record.worker_id
        async with self._exchange(), self._redis.pipeline(transaction=True) as commands:
            commands.set(f"{self._members}:{worker_id}", msgspec.json.encode(lease), px=round(lease.ttl * 1000))
            commands.sadd(self._members, worker_id)
            await commands.execute()

    async def scan(self) -> list[Lease]:
        async with self._exchange():
            members = sorted(await self._redis.smembers(self._members))
            keys = [f"{self._members}:{member!s}" for member in members]
            values = await self._redis.mget(keys) if keys else []
            ended = [member for member, value in zip(members, values, strict=True) if value is None]
            if ended:  # a lease renewed just now adds its id again with the next renewal
                await self._redis.srem(self._members, *ended)
        leases = [self._decoded(value) for value in values if value is not None]
        return [lease for lease in leases if lease is not None]

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
