"""The rim of a prefill process: gRPC server, data transports, and the thread the worker loop runs in."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from threading import Thread

from engine.clients import Clients
from engine.engine import Engine
from engine.executors.base import Executor
from engine.inbox import Inbox
from engine.scheduler import SchedulerConfig
from engine.server import InternalServer, WorkerIdentity, describe
from engine.session import SessionServer
from kv_transfer.source import KvSource, SourceConfig
from kv_transfer.transports.base import ServerTransport
from prefill_workers.worker import Drain, LeaseReleased, PrefillCommand, PrefillWorker

log = logging.getLogger(__name__)


class PrefillServer:
    """`start`, then `wait` until the loop ends by itself (a crash, or a drain that is complete), then `stop`.

    Takes over `executor` and `transports`, and closes them.
    """

    def __init__(
        self,
        identity: WorkerIdentity,
        executor: Executor,
        scheduler: SchedulerConfig,
        transports: Sequence[ServerTransport],
        transfer: SourceConfig,
        fingerprint: str,
        *,
        hash_secret: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._executor = executor
        self._inbox: Inbox[PrefillCommand] = Inbox()
        self._server = InternalServer(identity)
        self.address = self._server.address
        engine = Engine(executor, scheduler, secret=hash_secret, model=identity.model)
        self._sessions = SessionServer(self._inbox.post, lambda: self.worker.current_load())
        self._source = KvSource(
            worker_id=identity.worker_id,
            epoch=identity.epoch,
            memory=executor.memory,
            layer_groups=executor.layer_groups,
            fingerprint=fingerprint,
            link_address=self.address,
            transports=transports,
            config=transfer,
            on_released=lambda lease_id, block_ids: self._inbox.post(LeaseReleased(lease_id, block_ids)),
            clock=clock,
        )
        description = describe(identity, "prefill", fingerprint, engine, scheduler.max_num_seqs)
        self.worker = PrefillWorker(
            engine, self._source, Clients(description, self._sessions.deliver, clock), self._inbox, clock
        )
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._thread = Thread(target=self._run, name="engine", daemon=True)

    def _run(self) -> None:
        try:
            self.worker.run()
        finally:
            self._loop.call_soon_threadsafe(self._ended.set)

    async def start(self) -> None:
        self._sessions.register(self._server.grpc)
        self._source.register(self._server.grpc)
        await self._server.start()
        self._thread.start()

    async def wait(self) -> None:
        await self._ended.wait()

    async def drain(self, grace_s: float) -> None:
        """Finish what is running, for at most `grace_s` seconds."""
        self._inbox.post(Drain())
        try:
            async with asyncio.timeout(grace_s):
                await self._ended.wait()
        except TimeoutError:
            log.warning("drain: requests were still running after %.0f s", grace_s)

    async def stop(self) -> None:
        self.worker.stop()
        await asyncio.to_thread(self._thread.join)
        await self._server.stop()
        await self._source.close()
        self._executor.close()
