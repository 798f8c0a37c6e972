"""The worker's end of the control plane: routers attach here, commands go in, frames come out.

Lives on the worker's asyncio loop. It knows sessions and frames, not requests: commands are posted to the
engine thread, which answers through `deliver`: one frame per session and step, and one before a step that starts
requests, for their offers. While the engine thread is inside a long step, this side keeps every session alive with
heartbeats that carry the latest load.
"""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, NewType

import grpc

from protos import worker_pb2 as pb

SessionId = NewType("SessionId", int)

METHOD = "/baton.worker.Worker/Session"
HEARTBEAT_S = 0.5
ATTACH_TIMEOUT_S = 10.0
WRITE_TIMEOUT_S = 10.0
MAX_BACKLOG = 10_000  # frames; a router that lags this far behind is cut off and attaches again

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
    """Serves `Worker.Session`. `post` is called on the loop for every command of every session.

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
        self._outboxes: dict[SessionId, asyncio.Queue[pb.Frame | None]] = {}
        self._loop = asyncio.get_running_loop()

    def register(self, server: Any) -> None:
        handler = grpc.stream_stream_rpc_method_handler(
            self._serve,
            request_deserializer=pb.Command.FromString,
            response_serializer=pb.Frame.SerializeToString,
        )
        _, service, method = METHOD.split("/")
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))

    def deliver(self, frames: Mapping[SessionId, pb.Frame]) -> None:
        """Send each session its frame, in order of calls. Thread-safe; numbers are given on the loop."""
        self._loop.call_soon_threadsafe(self._enqueue, frames)

    def _enqueue(self, frames: Mapping[SessionId, pb.Frame]) -> None:
        for session, frame in frames.items():
            outbox = self._outboxes.get(session)
            if outbox is None:
                continue
            if outbox.qsize() >= MAX_BACKLOG:
                log.warning("router session %d does not read its frames: cut off", session)
                del self._outboxes[session]
                outbox.put_nowait(None)
            else:
                outbox.put_nowait(frame)

    async def _serve(self, messages: AsyncIterator[pb.Command], context: Any) -> None:
        session = SessionId(next(self._ids))
        try:
            async with asyncio.timeout(ATTACH_TIMEOUT_S):
                first = await anext(messages)
        except (TimeoutError, StopAsyncIteration):
            first = pb.Command()
        if first.WhichOneof("kind") != "attach":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first command of a session must be attach")
        log.info("router %s attached as session %d", first.attach.router_id[:64], session)
        outbox: asyncio.Queue[pb.Frame | None] = asyncio.Queue()
        self._outboxes[session] = outbox
        self._post(Attached(session))
        reader = asyncio.create_task(self._read(session, messages, outbox))
        try:
            await self._write(outbox, context)
        finally:
            reader.cancel()
            self._outboxes.pop(session, None)
            self._post(Ended(session))
            with contextlib.suppress(asyncio.CancelledError):
                await reader
            log.info("session %d ended", session)

    async def _read(
        self, session: SessionId, messages: AsyncIterator[pb.Command], outbox: "asyncio.Queue[pb.Frame | None]"
    ) -> None:
        """Post commands until the router hangs up; silence is legal, the channel's keepalive finds dead peers."""
        try:
            async for command in messages:
                match command.WhichOneof("kind"):
                    case "submit":
                        self._post(Submitted(session, command.submit))
                    case "cancel":
                        self._post(Cancelled(session, command.cancel.handle))
                    case _:
                        log.warning("session %d sent an unexpected command", session)
                        break
        finally:
            outbox.put_nowait(None)

    async def _write(self, outbox: "asyncio.Queue[pb.Frame | None]", context: Any) -> None:
        number = 0
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    frame = await outbox.get()
            except TimeoutError:
                if number == 0:  # frame 0 must be the engine's: it holds the snapshot
                    continue
                frame = pb.Frame(load=self._current_load())
            if frame is None:
                return
            frame.number = number
            frame.sent_us = round(self._clock() * 1e6)
            number += 1
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await context.write(frame)
