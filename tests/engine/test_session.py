"""The worker's end of a session, over real gRPC: who may attach, and what comes first."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from engine.auth import metadata
from engine.server import InternalServer, WorkerIdentity
from engine.session import METHOD, Attached, Cancelled, Ended, SessionCommand, SessionId, SessionServer, Submitted
from protos import worker_pb2 as pb

TIMEOUT_S = 5.0
ATTACH = pb.Command(attach=pb.Attach(router_id="test"))


class Worker:
    """A session server whose engine is the test."""

    def __init__(self, token: str = "") -> None:
        self.commands: asyncio.Queue[SessionCommand] = asyncio.Queue()
        self.server = InternalServer(WorkerIdentity("w", "1", "model", token=token))
        self.sessions = SessionServer(self.commands.put_nowait, lambda: pb.Load(progress=7), lambda: 12.5)
        self.sessions.register(self.server.grpc)

    async def next(self) -> SessionCommand:
        async with asyncio.timeout(TIMEOUT_S):
            return await self.commands.get()


@asynccontextmanager
async def running(token: str = "") -> AsyncIterator[tuple[Worker, Callable[..., Any]]]:
    worker = Worker(token)
    await worker.server.start()
    async with grpc.aio.insecure_channel(worker.server.address) as channel:
        call = channel.stream_stream(
            METHOD, request_serializer=pb.Command.SerializeToString, response_deserializer=pb.Frame.FromString
        )
        yield worker, lambda sent="": call(metadata=metadata(sent), timeout=TIMEOUT_S)
    await worker.server.stop()


async def test_commands_arrive_in_order_and_the_end_is_said_once() -> None:
    async with running() as (worker, connect):
        call = connect()
        await call.write(ATTACH)
        await call.write(pb.Command(submit=pb.Submit(handle=4, request_id="r")))
        await call.write(pb.Command(cancel=pb.Cancel(handle=4)))
        await call.done_writing()
        session = SessionId(0)
        assert await worker.next() == Attached(session)
        submitted = await worker.next()
        assert isinstance(submitted, Submitted)
        assert submitted.message.handle == 4
        assert [await worker.next(), await worker.next()] == [Cancelled(session, 4), Ended(session)]
        assert worker.commands.empty()


async def test_heartbeats_come_only_after_the_first_frame_of_the_engine() -> None:
    async with running() as (worker, connect):
        call = connect()
        await call.write(ATTACH)
        await worker.next()
        first = asyncio.create_task(call.read())
        done, _ = await asyncio.wait({first}, timeout=0.7)
        assert not done, "a heartbeat took the place of the snapshot"
        worker.sessions.deliver({SessionId(0): pb.Frame(description=pb.Description(worker_id="w"))})
        assert (await first).description.worker_id == "w"
        heartbeat = await call.read()
        assert (heartbeat.number, heartbeat.load.progress, heartbeat.sent_us) == (1, 7, 12_500_000)


async def test_a_session_must_begin_with_attach() -> None:
    async with running() as (worker, connect):
        call = connect()
        await call.write(pb.Command(cancel=pb.Cancel(handle=1)))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert worker.commands.empty()


@pytest.mark.parametrize("sent", ["", "wrong", "secret2"])
async def test_a_missing_or_wrong_token_is_refused_before_anything_is_read(sent: str) -> None:
    async with running("secret") as (worker, connect):
        call = connect(sent)
        assert await call.code() == grpc.StatusCode.UNAUTHENTICATED
        assert worker.commands.empty()
        right = connect("secret")
        await right.write(ATTACH)
        assert await worker.next() == Attached(SessionId(0))


async def test_an_open_address_without_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"security\.token_file"):
        InternalServer(WorkerIdentity("w", "1", "model", bind_host="0.0.0.0"))
