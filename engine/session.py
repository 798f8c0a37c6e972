"""The worker's end of the control plane: routers attach here, commands go in, frames come out.

Lives on the worker's asyncio loop. It knows sessions and frames, not requests: commands are posted to the
engine thread, which answers through `deliver`: one frame per step to each session that it has words for, and to the
others as engine.backlog says. While the engine thread is inside a long step, this side keeps every session alive with
heartbeats that carry the latest load. A router that does not read, or says nothing for 10 s, loses its session.
"""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NewType

from engine.message_server import MessageServer
from engine.message_stream import MessageStream, StreamLost
from protos import worker_pb2 as pb

SessionId = NewType("SessionId", int)

SERVICE = "session"
HEARTBEAT_S = 0.5
TICK_S = HEARTBEAT_S / 2
MAX_SILENT_TICKS = 40  # a router says something every 2 s
ATTACH_TIMEOUT_S = 10.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Attached:
    session: SessionId


@dataclass(frozen=True, slots=True)
class Submitted:
    session: SessionId
    message: pb.Submit


@dataclass(frozen=True, slots=True)
class Cancelled:
    session: SessionId
    handle: int


@dataclass(frozen=True, slots=True)
class Ended:
    session: SessionId


SessionCommand = Attached | Submitted | Cancelled | Ended


class SessionServer:
    """Serves the sessions of routers. `post` is called on the loop for every command of every session.

    `current_load` is read for heartbeats and must be safe to call from the loop at any time. `clock` is monotonic
    seconds, the engine thread's.
    """

    def __init__(
        self, post: Callable[[SessionCommand], None], current_load: Callable[[], pb.Load], clock: Callable[[], float]
    ) -> None:
        self._post = post
        self._current_load = current_load
        self._clock = clock
        self._ids = itertools.count()
        self._outboxes: dict[SessionId, _Outbox] = {}
        self._loop = asyncio.get_running_loop()

    def register(self, server: MessageServer) -> None:
        server.register(SERVICE, pb.Command.FromString, self._serve)

    def deliver(self, frames: Mapping[SessionId, pb.Frame]) -> None:
        """Send each session its frame, in order of calls. Thread-safe; numbers are given on the loop."""
        self._loop.call_soon_threadsafe(self._send, frames)

    def _send(self, frames: Mapping[SessionId, pb.Frame]) -> None:
        for session, frame in frames.items():
            if (outbox := self._outboxes.get(session)) is not None:
                outbox.send(frame)

    async def _serve(self, stream: MessageStream) -> None:
        session = SessionId(next(self._ids))
        async with asyncio.timeout(ATTACH_TIMEOUT_S):
            first = await stream.read()
        if first is None:
            return
        if first.WhichOneof("kind") != "attach":
            raise StreamLost("the first command of a session must be attach")
        log.info("router %s attached as session %d", first.attach.router_id[:64], session)
        outbox = self._outboxes[session] = _Outbox(stream, self._loop, self._clock)
        self._post(Attached(session))
        try:
            stream.deliver_to(lambda command: self._receive(session, outbox, command))
            await self._keep_alive(stream, outbox)
        finally:
            del self._outboxes[session]
            self._post(Ended(session))
            log.info("session %d ended", session)

    def _receive(self, session: SessionId, outbox: "_Outbox", command: pb.Command) -> None:
        outbox.num_silent_ticks = 0
        match command.WhichOneof("kind"):
            case "submit":
                self._post(Submitted(session, command.submit))
            case "cancel":
                self._post(Cancelled(session, command.cancel.handle))
            case None:
                pass
            case _:
                raise StreamLost(f"session {session} sent an unexpected command")

    async def _keep_alive(self, stream: MessageStream, outbox: "_Outbox") -> None:
        """Until the router hangs up, or is silent too long. Its silence is counted in ticks: when this process itself
        stood still, that is one tick, not many."""
        while outbox.num_silent_ticks < MAX_SILENT_TICKS:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    return await stream.wait_over()
            if not outbox.number:
                continue  # frame 0 must be the engine's, as it holds the snapshot; the router waits for it in silence
            outbox.num_silent_ticks += 1
            if self._loop.time() - outbox.sent_at >= TICK_S:
                outbox.send(pb.Frame(load=self._current_load()))
        raise StreamLost("the router was silent")


class _Outbox:
    """One session's frames, numbered, and how long its router has been silent."""

    def __init__(self, stream: MessageStream, loop: asyncio.AbstractEventLoop, clock: Callable[[], float]) -> None:
        self.number = 0  # of the next frame
        self.sent_at = loop.time()
        self.num_silent_ticks = 0  # since the router said something
        self._stream = stream
        self._loop = loop
        self._clock = clock

    def send(self, frame: pb.Frame) -> None:
        self.sent_at = self._loop.time()
        frame.number = self.number
        frame.sent_us = round(self._clock() * 1e6)
        self.number += 1
        self._stream.send(frame)
