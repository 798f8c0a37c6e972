"""The rim of a prefill process: message server, data transports, and the thread the worker loop runs in."""

import time
from collections.abc import Callable, Sequence

from engine.clients import Clients
from engine.engine import Engine
from engine.executors.base import Executor
from engine.inbox import Inbox
from engine.loop import Drain, WorkerLoop
from engine.scheduler import SchedulerConfig
from engine.server import LoopThread, WorkerIdentity, describe, internal_server
from engine.session import SessionCommand, SessionServer
from kv_transfer.source import KvSource, SourceConfig
from kv_transfer.transports.base import ServerTransport
from prefill_workers.worker import LeaseReleased, PrefillRole


class PrefillServer:
    """`start`, then `stop`; `thread` tells when the loop ends by itself, and drains it.

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
        self._inbox: Inbox[SessionCommand | Drain | LeaseReleased] = Inbox()
        self._server = internal_server(identity)
        self.address = self._server.address
        engine = Engine(executor, scheduler, secret=hash_secret, model=identity.model)
        self._sessions = SessionServer(self._inbox.post, lambda: self.loop.current_load(), clock)
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
        description = describe(identity, "prefill", fingerprint, engine, scheduler)
        clients = Clients(description, self._sessions.deliver, clock)
        self.loop = WorkerLoop(engine, clients, self._inbox, PrefillRole(engine, clients, self._source), clock)
        self.thread = LoopThread(self.loop)

    async def start(self) -> None:
        self._sessions.register(self._server)
        self._source.register(self._server)
        await self._server.start()
        self.thread.start()

    async def stop(self) -> None:
        stopped = await self.thread.stop()
        await self._server.stop()
        await self._source.close()
        if stopped:
            self._executor.close()
