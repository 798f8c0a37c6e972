"""The rim of a decode process: gRPC server, the KV sink, and the thread the worker loop runs in."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Thread

from decode_workers.intake import Entry, Intake, PullEnded
from decode_workers.worker import DecodeCommand, DecodeWorker, Drain
from engine.clients import Clients
from engine.engine import Engine
from engine.errors import TransferError
from engine.executors.base import Executor
from engine.inbox import Inbox
from engine.scheduler import SchedulerConfig
from engine.server import InternalServer, WorkerIdentity, describe
from engine.session import SessionServer
from kv_transfer.sink import KvSink, SinkConfig
from kv_transfer.transports.base import SinkTransport

log = logging.getLogger(__name__)


class DecodeServer:
    """`start`, then `wait` until the loop ends by itself (a crash, or a drain that is complete), then `stop`.

    Takes over `executor` and closes it.
    """

    def __init__(
        self,
        identity: WorkerIdentity,
        executor: Executor,
        scheduler: SchedulerConfig,
        transports: Sequence[SinkTransport],
        transfer: SinkConfig,
        fingerprint: str,
        *,
        boot_id: str,
        hash_secret: str,
        pull_timeout_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._executor = executor
        self._pull_timeout_s = pull_timeout_s
        self._clock = clock
        self._inbox: Inbox[DecodeCommand] = Inbox()
        self._server = InternalServer(identity)
        self.address = self._server.address
        engine = Engine(executor, scheduler, secret=hash_secret, model=identity.model)
        self._sessions = SessionServer(self._inbox.post, lambda: self.worker.current_load())
        self._sink = KvSink(
            worker_id=identity.worker_id,
            memory=executor.memory,
            fingerprint=fingerprint,
            token=identity.token,
            transports=transports,
            boot_id=boot_id,
            config=transfer,
            clock=clock,
        )
        intake = Intake(engine, self._start_pull, scheduler.max_num_seqs)
        description = describe(identity, "decode", fingerprint, engine, scheduler.max_num_seqs)
        self.worker = DecodeWorker(
            engine, intake, Clients(description, self._sessions.deliver, clock), self._inbox, clock
        )
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._thread = Thread(target=self._run, name="engine", daemon=True)

    def _run(self) -> None:
        try:
            self.worker.run()
        finally:
            self._loop.call_soon_threadsafe(self._ended.set)

    def _start_pull(self, entry: Entry) -> "Future[None]":
        return asyncio.run_coroutine_threadsafe(self._pull(entry), self._loop)

    async def _pull(self, entry: Entry) -> None:
        """Report the end of the pull exactly once, when nothing writes into its blocks any more."""
        ended = PullEnded(entry.request.id, None, None)
        try:
            pulled = await self._sink.pull(
                entry.offer,
                block_ids=entry.block_ids[entry.num_held_tokens // self._executor.layout.block_size :],
                num_held_tokens=entry.num_held_tokens,
                deadline=min(entry.deadline, self._clock() + self._pull_timeout_s),
            )
            ended = PullEnded(entry.request.id, pulled, None)
        except TransferError as error:
            ended = PullEnded(entry.request.id, None, error)
        finally:
            self._inbox.post(ended)

    async def start(self) -> None:
        self._sessions.register(self._server.grpc)
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
        await self._sink.close()
        await self._server.stop()
        self._executor.close()
