"""The rim of a decode process: message server, the KV sink, and the thread the worker loop runs in."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from decode_workers.intake import Entry, Intake, PullEnded
from decode_workers.worker import DecodeRole
from engine.clients import Clients
from engine.engine import Engine
from engine.errors import TransferError
from engine.executors.base import Executor
from engine.inbox import Inbox
from engine.loop import Drain, WorkerLoop
from engine.scheduler import SchedulerConfig
from engine.server import LoopThread, WorkerIdentity, describe, internal_server
from engine.session import SessionCommand, SessionServer
from kv_transfer.sink import KvSink, SinkConfig
from kv_transfer.transports.base import SinkTransport

log = logging.getLogger(__name__)


class DecodeServer:
    """`start`, then `stop`; `thread` tells when the loop ends by itself, and drains it.

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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._executor = executor
        self._inbox: Inbox[SessionCommand | Drain | PullEnded] = Inbox()
        self._server = internal_server(identity)
        self.address = self._server.address
        engine = Engine(executor, scheduler, secret=hash_secret, model=identity.model)
        self._sessions = SessionServer(self._inbox.post, lambda: self.loop.current_load(), clock)
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
        description = describe(identity, "decode", fingerprint, engine, scheduler)
        clients = Clients(description, self._sessions.deliver, clock)
        self.loop = WorkerLoop(engine, clients, self._inbox, DecodeRole(engine, clients, intake, clock), clock)
        self.thread = LoopThread(self.loop)
        self._rim = asyncio.get_running_loop()

    async def start(self) -> None:
        self._sessions.register(self._server)
        await self._server.start()
        self.thread.start()

    async def stop(self) -> None:
        stopped = await self.thread.stop()
        await self._sink.close()
        await self._server.stop()
        if stopped:
            self._executor.close()

    def _start_pull(self, entry: Entry) -> "Future[None]":
        return asyncio.run_coroutine_threadsafe(self._pull(entry), self._rim)

    async def _pull(self, entry: Entry) -> None:
        """Report the end of the pull exactly once, when nothing writes into its blocks any more."""
        ended = PullEnded(entry.request.id, None, None)
        try:
            pulled = await self._sink.pull(
                entry.offer,
                block_ids=entry.block_ids[entry.num_held_tokens // self._executor.layout.block_size :],
                num_held_tokens=entry.num_held_tokens,
                deadline=entry.deadline,  # as long as prefill takes: a source that is silent is found much sooner
            )
            ended = PullEnded(entry.request.id, pulled, None)
        except TransferError as error:
            ended = PullEnded(entry.request.id, None, error)
        except Exception as error:  # the task's one guard: the client waits for an end, whatever it is
            log.exception("the pull of %s broke", entry.request.id)
            ended = PullEnded(entry.request.id, None, TransferError(repr(error), retryable=True))
        finally:
            self._inbox.post(ended)
