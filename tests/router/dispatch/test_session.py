"""One session to a worker that a test speaks for, by a clock that it sets."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from engine.message_stream import StreamLost
from protos import worker_pb2 as pb
from router.cluster_view import WorkerState
from router.lanes import Lanes
from router.membership import Joined
from router.session import SessionConfig, WorkerSession
from tests.router.dispatch.workers import attached, described


class Worker:
    """A stream's other end, and the listener of the session to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.commands: list[str | None] = []  # names of what it was told; None: only that the router lives
        self.lost: list[str] = []
        self.expected: list[tuple[int, list[int]]] = []  # with the queue reported by then
        self.reported = asyncio.Event()
        self.first_load = pb.Load()
        self.session = WorkerSession(
            Joined("d0", "decode", "host:1", 1),
            self,
            SessionConfig(),
            model="m",
            token="",
            router_id="r",
            lanes=Lanes(),
            clock=lambda: self.now,
        )
        self._num_frames = 0
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        monkeypatch.setattr("router.session.connect", self._connect)

    def say(self, coming: Sequence[int] = (), **load) -> None:
        frame = pb.Frame(number=self._num_frames, load=pb.Load(**load), coming=coming)
        self._num_frames += 1
        try:
            self._receive(frame)
        except Exception as error:
            self.abort(error)

    async def _connect(self, *_) -> "Worker":
        if self._over.done():
            self._over = asyncio.get_running_loop().create_future()
        return self

    def send(self, command: pb.Command) -> None:
        self.commands.append(command.WhichOneof("kind"))

    async def read(self) -> pb.Frame:
        self._num_frames = 1
        return pb.Frame(description=described("d0", model="m"), kv_snapshot=pb.KvSnapshot(), load=self.first_load)

    def deliver_to(self, receive) -> None:
        self._receive = receive

    async def wait_over(self) -> None:
        await self._over

    def abort(self, error: Exception | None = None) -> None:
        if not self._over.done():
            self._over.set_exception(error or StreamLost("aborted"))

    def session_attached(self, *_) -> WorkerState:
        return attached("d0")

    def session_events(self, *_) -> None:
        raise AssertionError("no frame here has any")

    def session_expects(self, session: WorkerSession, hashes: Sequence[int]) -> None:
        assert session.state is not None
        self.expected.append((session.state.load.queue_us, list(hashes)))

    def session_reported(self, _session) -> None:
        self.reported.set()

    def session_lost(self, _session, reason: str) -> None:
        self.lost.append(reason)


@asynccontextmanager
async def serving(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Worker]:
    worker = Worker(monkeypatch)
    running = asyncio.create_task(worker.session.run())
    await worker.reported.wait()
    await asyncio.sleep(0)
    yield worker
    running.cancel()
    await asyncio.wait({running})


async def test_a_session_is_lost_when_a_second_look_finds_it_silent_too(monkeypatch):
    """A process that was paused for 10 s has not read yet what came meanwhile."""
    worker, slept = Worker(monkeypatch), []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        worker.now += 10.0 if len(slept) == 1 else seconds
        if len(slept) == 2:
            worker.say()
        elif worker.lost:
            worker.session.retire()

    monkeypatch.setattr(asyncio, "sleep", sleep)
    await worker.session.run()
    assert slept == [2.0, 0.25, 2.0, 0.25, 0.1]
    assert worker.lost == ["silent for 2.0 s"]


async def test_what_a_worker_is_going_to_compute_is_told_with_its_load(monkeypatch):
    async with serving(monkeypatch) as worker:
        worker.say(queue_us=5)
        worker.say([1, 1 << 63], queue_us=7)
        assert worker.expected == [(7, [1, 1 << 63])]


async def test_an_idle_worker_makes_no_progress_and_is_not_stalled(monkeypatch):
    async with serving(monkeypatch) as worker:
        for worker.now in (1000.0, 2000.0):
            worker.say(progress=5)
        worker.now += 60.0
        worker.say(progress=5, num_running=1)
        assert worker.session.usable
        worker.now += 0.1
        worker.say(progress=5, num_running=1)
        await asyncio.sleep(0)
        assert worker.lost == ["it runs requests and made no progress for 60.0 s"]


async def test_a_stalled_worker_that_is_attached_anew_gets_requests_when_it_moves(monkeypatch):
    async with serving(monkeypatch) as worker:
        stuck = {"progress": 5, "num_running": 1}
        worker.say(**stuck)
        worker.now += 61.0
        worker.first_load = pb.Load(**stuck)
        worker.reported.clear()
        worker.say(**stuck)
        await worker.reported.wait()
        assert worker.lost == ["it runs requests and made no progress for 60.0 s"]
        assert not worker.session.usable
        worker.say(**stuck)
        assert not worker.session.usable
        worker.say(progress=6, num_running=1)
        assert worker.session.usable


async def test_a_router_with_nothing_to_say_says_that_it_lives(monkeypatch):
    async with serving(monkeypatch) as worker:
        counts = []
        for worker.now in (1.0, 2.0, 2.1, 4.0, 4.2):
            worker.say()
            counts.append(worker.commands.count(None))
        assert counts == [0, 0, 1, 1, 2]
        assert worker.commands == ["attach", None, None]


async def test_a_worker_that_cannot_be_attached_is_tried_ever_more_seldom(monkeypatch):
    worker, slept = Worker(monkeypatch), []

    async def refuse(*_) -> None:
        raise StreamLost("nobody there")

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 7:
            worker.session.retire()

    monkeypatch.setattr("router.session.connect", refuse)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    await worker.session.run()
    assert slept == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    assert worker.lost == []
