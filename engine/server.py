"""What both roles' servers share: who the worker is, its port on the internal plane, and its engine thread."""

import asyncio
import logging
from dataclasses import dataclass
from threading import Thread
from typing import Any

from engine.engine import Engine
from engine.loop import WorkerLoop
from engine.message_server import MessageServer
from engine.scheduler import SchedulerConfig
from protos import worker_pb2 as pb

STOP_S = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """How a worker presents itself and where it may be reached."""

    worker_id: str
    epoch: str  # random, new with every process
    model: str  # served model name
    bind_host: str = "127.0.0.1"
    advertise_host: str = ""  # where others reach it; the bind host when empty
    port: int = 0  # 0: any free one
    token: str = ""


def internal_server(identity: WorkerIdentity) -> MessageServer:
    """Binds the port. Raises ValueError when it would be open to other machines without a token."""
    return MessageServer(
        identity.bind_host, identity.port, token=identity.token, advertised_host=identity.advertise_host
    )


def describe(
    identity: WorkerIdentity, role: str, fingerprint: str, engine: Engine, scheduler: SchedulerConfig
) -> pb.Description:
    """What a router learns of a worker when it attaches."""
    executor = engine.executor
    return pb.Description(
        worker_id=identity.worker_id,
        role=role,
        model=identity.model,
        fingerprint=fingerprint,
        block_size=executor.layout.block_size,
        num_blocks=engine.kv.num_blocks,
        max_model_len=engine.max_len,
        max_num_seqs=scheduler.max_num_seqs,
        max_batch_tokens=scheduler.max_batch_tokens,
    )


class LoopThread:
    """Runs a worker's loop in a thread of its own, seen from the asyncio loop that made this."""

    def __init__(self, loop: WorkerLoop[Any]) -> None:
        self._worker = loop
        self._ended = asyncio.Event()
        self._rim = asyncio.get_running_loop()
        self._thread = Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    async def wait(self) -> None:
        """Until the loop ends by itself: a crash, or a drain that is complete."""
        await self._ended.wait()

    async def drain(self, grace_s: float) -> None:
        """Finish what is running, for at most `grace_s` seconds."""
        self._worker.drain()
        try:
            async with asyncio.timeout(grace_s):
                await self._ended.wait()
        except TimeoutError:
            log.warning("drain: requests were still running after %.0f s", grace_s)

    async def stop(self) -> bool:
        """False when the thread is still in a step after `STOP_S`: then what it uses must not be closed."""
        self._worker.stop()
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join, STOP_S)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._worker.run()
        finally:
            self._rim.call_soon_threadsafe(self._ended.set)
