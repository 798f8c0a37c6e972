"""The worker's end of a session, over a real stream: who may attach, and what comes first."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from engine import session
from engine.message_stream import MessageStream, StreamRefused, connect
from engine.server import WorkerIdentity, internal_server
from engine.session import SERVICE, Attached, Cancelled, Ended, SessionCommand, SessionId, SessionServer, Submitted
from protos import worker_pb2 as pb

TIMEOUT_S = 5.0
ATTACH = pb.Command(attach=pb.Attach(router_id="test"))


class Worker:
    """A session server whose engine is the test."""

    def __init__(self, token: str = "") -> None:
        self.commands: asyncio.Queue[SessionCommand] = asyncio.Queue()
        self.server = internal_server(WorkerIdentity("w", "1", "model", token=token))
        self.sessions = SessionServer(self.commands.put_nowait, lambda: pb.Load(progress=7), lambda: 12.5)
        self.sessions.register(self.server)

    async def next(self) -> SessionCommand:
        async with asyncio.timeout(TIMEOUT_S):
            return await self.commands.get()


@asynccontextmanager
async def running(token: str = "") -> AsyncIterator[tuple[Worker, Callable[..., Awaitable[MessageStream]]]]:
    worker = Worker(token)
    await worker.server.start()
    streams = []

    async def attach(sent: str = "") -> MessageStream:
        streams.append(await connect(worker.server.address, SERVICE, sent, pb.Frame.FromString))
        return streams[-1]

    async with asyncio.timeout(TIMEOUT_S):
        yield worker, attach
    for stream in streams:
        stream.abort()
    await worker.server.stop()


async def test_commands_arrive_in_order_and_the_end_is_said_once() -> None:
    async with running() as (worker, attach):
        stream = await attach()
        stream.send(ATTACH)
        stream.send(pb.Command(submit=pb.Submit(handle=4, request_id="r")))
        stream.send(pb.Command(cancel=pb.Cancel(handle=4)))
        stream.close()
        first = SessionId(0)
        assert await worker.next() == Attached(first)
        submitted = await worker.next()
        assert isinstance(submitted, Submitted)
        assert submitted.message.handle == 4
        assert [await worker.next(), await worker.next()] == [Cancelled(first, 4), Ended(first)]
        assert worker.commands.empty()


async def test_heartbeats_come_only_after_the_first_frame_of_the_engine() -> None:
    async with running() as (worker, attach):
        stream = await attach()
        stream.send(ATTACH)
        await worker.next()
        first = asyncio.create_task(stream.read())
        done, _ = await asyncio.wait({first}, timeout=0.7)
        assert not done, "a heartbeat took the place of the snapshot"
        worker.sessions.deliver({SessionId(0): pb.Frame(description=pb.Description(worker_id="w"))})
        assert (await first).description.worker_id == "w"
        heartbeat = await stream.read()
        assert (heartbeat.number, heartbeat.load.progress, heartbeat.sent_us) == (1, 7, 12_500_000)


@pytest.mark.parametrize("kind", [{"cancel": pb.Cancel(handle=1)}, {"submit": pb.Submit(handle=1)}, {}])
async def test_a_session_must_begin_with_attach(kind: dict) -> None:
    async with running() as (worker, attach):
        stream = await attach()
        stream.send(pb.Command(**kind))
        assert await stream.read() is None
        assert worker.commands.empty()


async def test_a_second_attach_ends_the_session() -> None:
    async with running() as (worker, attach):
        stream = await attach()
        stream.send(ATTACH)
        stream.send(ATTACH)
        assert [await worker.next(), await worker.next()] == [Attached(SessionId(0)), Ended(SessionId(0))]


async def test_a_silent_router_loses_its_session_and_one_that_says_something_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "TICK_S", 0.01)
    monkeypatch.setattr(session, "MAX_SILENT_TICKS", 20)
    async with running() as (worker, attach):
        silent, alive = await attach(), await attach()
        for stream in (silent, alive):
            stream.send(ATTACH)
            await worker.next()
        worker.sessions.deliver({SessionId(0): pb.Frame(), SessionId(1): pb.Frame()})
        while not silent.over:
            alive.send(pb.Command())
            await asyncio.sleep(0.01)
        assert await worker.next() == Ended(SessionId(0))
        assert not alive.over


async def test_a_router_that_waits_for_the_first_frame_of_a_long_step_is_not_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "TICK_S", 0.01)
    monkeypatch.setattr(session, "MAX_SILENT_TICKS", 5)
    async with running() as (worker, attach):
        stream = await attach()
        stream.send(ATTACH)
        await worker.next()
        await asyncio.wait({asyncio.create_task(stream.wait_over())}, timeout=0.3)
        assert not stream.over
        worker.sessions.deliver({SessionId(0): pb.Frame(description=pb.Description(worker_id="w"))})
        assert (await stream.read()).description.worker_id == "w"


@pytest.mark.parametrize("sent", ["", "wrong", "secret2"])
async def test_a_missing_or_wrong_token_is_refused_before_anything_is_read(sent: str) -> None:
    async with running("secret") as (worker, attach):
        with pytest.raises(StreamRefused, match="token is missing or wrong"):
            await attach(sent)
        assert worker.commands.empty()
        right = await attach("secret")
        right.send(ATTACH)
        assert await worker.next() == Attached(SessionId(0))


async def test_an_open_address_without_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"security\.token_file"):
        internal_server(WorkerIdentity("w", "1", "model", bind_host="0.0.0.0"))
