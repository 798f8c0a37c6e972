"""Several routers of one worker, each with a mirror of its cache and the real reservations: histories at random."""

import itertools
import random
from collections.abc import Mapping
from concurrent.futures import Future

import pytest

from decode_workers.intake import Intake
from decode_workers.worker import DecodeRole
from engine.backlog import REPORT_S
from engine.clients import Clients
from engine.engine import Engine
from engine.executors.simulated import SimulatedConfig, SimulatedExecutor
from engine.kv.cache import KvCache
from engine.loop import WorkerLoop
from engine.request import Request, RequestId, SamplingParams
from engine.scheduler import SchedulerConfig
from engine.session import Attached, Cancelled, Ended, SessionId, Submitted
from engine.wire import lone_tokens_from_bytes, submit_to_pb
from protos import worker_pb2 as pb
from router.cluster_view import DECODE, Reservation, WorkerState
from tests.engine.test_loop import TurnInbox
from tests.fakes import FakeClock

DESCRIPTION = pb.Description(role=DECODE, block_size=4, num_blocks=24, max_num_seqs=4)


class Router:
    """One session: it believes every frame, and finds each event in its place."""

    def __init__(self) -> None:
        self.mirror: set[int] = set()
        self.state = WorkerState("d", DESCRIPTION, 1.5, set())
        self.num_sent = 0
        self.num_counted = 0
        self.handles = itertools.count(1)
        self.open: set[int] = set()
        self.waiting: list[int] = []  # reserved, not sent
        self.order: list[int] = []  # sent
        self.over: set[int] = set()  # or covered by words
        self.heard: dict[int, int] = {}  # next index of a token
        self.coming: list[int] = []
        self.attached = False
        self.heard_at = 0.0
        self._next_event = 0

    def receive(self, frame: pb.Frame) -> None:
        if not self.attached:
            assert frame.HasField("description")
            assert not frame.kv_events
            self.mirror = set(frame.kv_snapshot.hashes)
            self._next_event = frame.kv_snapshot.next_event_number
            self.attached = True
        else:
            assert not frame.HasField("description")
            assert not frame.HasField("kv_snapshot")
            if frame.kv_events:
                assert frame.kv_event_number == self._next_event
                self._next_event += len(frame.kv_events)
            for event in frame.kv_events:
                if event.cleared:
                    self.mirror.clear()
                assert self.mirror >= set(event.removed)
                self.mirror -= set(event.removed)
                assert not self.mirror & set(event.stored)
                assert len(set(event.stored)) == len(event.stored)
                self.mirror |= set(event.stored)
        self.coming += frame.coming
        assert self.num_counted <= frame.num_submits <= self.num_sent
        self.num_counted = frame.num_submits
        self.state.report(frame.load, frame.num_submits)
        if self.order:
            uncounted = {*self.waiting, *self.order[frame.num_submits :]}
            assert set(self.state._pending) == uncounted - self.over
        for handle, index, _ in lone_tokens_from_bytes(frame.tokens):
            self._hear(handle, index, 1)
        for output in frame.outputs:
            self._hear(output.handle, output.index, len(output.token_ids))
            if output.finish_reason or output.HasField("error"):
                self.open.discard(output.handle)

    def counted(self, handle: int) -> None:
        self.over.add(handle)
        self.state.counted(handle)

    def _hear(self, handle: int, index: int, num_tokens: int) -> None:
        self.counted(handle)
        if num_tokens:
            assert index == self.heard.get(handle, 0)
            self.heard[handle] = index + num_tokens


@pytest.mark.parametrize("seed", range(30))
def test_each_mirror_is_exact_after_each_frame_whatever_is_flushed_when(seed: int) -> None:
    rng = random.Random(seed)
    clock, kv = FakeClock(), KvCache(24, 1)
    routers: dict[SessionId, Router] = {}

    def deliver(frames: Mapping[SessionId, pb.Frame]) -> None:
        for session, frame in frames.items():
            routers[session].receive(frame)
            assert routers[session].mirror == set(kv.snapshot())
            assert routers[session].num_counted == routers[session].num_sent
            told.add(session)

    told: set[SessionId] = set()
    clients = Clients(DESCRIPTION, deliver, clock)
    ids, chains, expected = itertools.count(), itertools.count(1000, 100), itertools.count(10**6)
    news: list[int] = []
    owed: dict[SessionId, list[int]] = {}
    for _ in range(400):
        act = rng.random()
        if act < 0.05 and len(routers) < 4:
            session = SessionId(next(ids))
            clients.attach(session)
            routers[session], owed[session] = Router(), []
        elif act < 0.08 and routers:
            session = rng.choice(list(routers))
            for request_id in clients.end(session):
                clients.fail(request_id, "gone", retryable=True)
            del routers[session], owed[session]
        elif act < 0.2 and routers:
            session = rng.choice(list(routers))
            router = routers[session]
            handle = rng.choice([next(router.handles), 1])  # a duplicate now and then
            router.num_sent += 1
            clients.admit(session, pb.Submit(handle=handle, request_id="r", num_prompt_tokens=1, timeout_ms=10**6))
        elif act < 0.3 and len(clients):
            request_id = rng.choice(list(clients._clients))
            clients.fail(request_id, "over", retryable=False)
        elif act < 0.5:
            first = next(chains) if rng.random() < 0.7 else 1000
            num = rng.randrange(1, 12)
            tokens = list(range(first, first + num))
            held = kv.match(tokens, tokens)
            blocks = kv.allocate(num - len(held))
            assert blocks is not None
            blocks = held + blocks
            kv.release(kv.store(tokens, tokens, blocks, num))
            kv.release(blocks)
        elif act < 0.52:
            kv.clear()
        elif act < 0.6:
            news.append(next(expected))
            kv.expect(news[-1:])
        clock.advance(rng.choice([0.0, 0.001, 0.03, 0.2]))
        if rng.random() < 0.6:
            for each in owed.values() if len(routers) > 1 else ():
                each += news
            news.clear()
            clients.flush(
                pb.Load(),
                kv,
                clock(),
                changed=True,
                step_ends=rng.choice([None, clock(), clock() + 0.02, clock() + 5.0]),
            )
    for each in owed.values() if len(routers) > 1 else ():
        each += news
    for changed in (True, False):
        clock.advance(REPORT_S)
        clients.flush(pb.Load(), kv, clock(), changed=changed, step_ends=clock() + 0.01)
    assert {session: router.coming for session, router in routers.items()} == owed
    assert all(router.mirror == set(kv.snapshot()) for router in routers.values())
    assert all(router.num_counted == router.num_sent for router in routers.values())
    told.clear()
    clock.advance(9.0)
    clients.flush(pb.Load(), kv, clock(), changed=False, step_ends=clock())
    assert not told
    for session in list(routers):
        for request_id in clients.end(session):
            clients.fail(request_id, "gone", retryable=True)
    assert not clients._drafts
    assert not clients._clients
    assert not clients._by_handle


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("base_s", [0.001, 0.02, 0.09, 0.3])
@pytest.mark.parametrize("seed", range(2))
def test_routers_of_a_real_loop_are_exact_and_hear_in_time(in_flight: int, base_s: float, seed: int) -> None:
    rng = random.Random(seed)
    clock = FakeClock()
    config = SimulatedConfig(
        step_base_s=base_s, prefill_tokens_per_s=2000.0, decode_s_per_sequence=0.0, num_blocks=24, block_size=4
    )

    def compute(seconds: float) -> None:
        clock.advance(seconds)
        if loop.current_load().HasField("model"):
            for router in routers.values():
                if router.attached and router.mirror != set(engine.kv.snapshot()):
                    ages.append(clock() - router.heard_at)

    executor = SimulatedExecutor(config, compute, clock if in_flight == 2 else None)
    engine = Engine(executor, SchedulerConfig(max_batch_tokens=32, max_num_seqs=4), secret="", model="m")
    routers: dict[SessionId, Router] = {}
    ids = itertools.count()
    num_frames = 0
    turns = 0
    idle_since: float | None = None
    late: list[float] = []
    ages: list[float] = []

    def deliver(frames: Mapping[SessionId, pb.Frame]) -> None:
        nonlocal num_frames
        for session, frame in frames.items():
            if session in routers:
                num_frames += 1
                routers[session].receive(frame)
                assert routers[session].mirror == set(engine.kv.snapshot())
                assert frame.load.num_cached_blocks == len(routers[session].mirror)
                routers[session].heard_at = clock()

    def attach() -> None:
        session = SessionId(next(ids))
        routers[session] = Router()
        inbox.post(Attached(session))

    def submit(session: SessionId) -> None:
        router = routers[session]
        handle = next(router.handles)
        router.state.reserve(handle, Reservation(blocks=1))
        router.waiting.append(handle)
        if rng.random() < 0.3:
            return  # sent later, or never
        handle = router.waiting.pop(rng.randrange(len(router.waiting)))
        tokens = tuple(rng.choice([300, 400]) + i for i in range(rng.choice([3, 9, 20, 40])))
        if rng.random() < 0.5:
            tokens = tuple(rng.randrange(300, 4000) for _ in tokens)
        request = Request(
            RequestId(""), tokens, len(tokens), SamplingParams(max_tokens=rng.choice([1, 2, 12]), ignore_eos=True), 0
        )
        router.state.sent(handle)
        router.order.append(handle)
        router.num_sent += 1
        router.open.add(handle)
        inbox.post(Submitted(session, submit_to_pb(request, handle, rng.choice([300, 10**6]))))

    def turn(timeout: float) -> None:
        nonlocal turns, idle_since
        turns += 1
        for router in routers.values():
            if router.attached and rng.random() < 0.1:
                router.state.report(loop.current_load())  # a heartbeat
            if router.attached and router.mirror != set(engine.kv.snapshot()):
                late.append(clock() - router.heard_at)
        if timeout:
            idle_since = clock() if idle_since is None else idle_since
            assert timeout <= REPORT_S
            if clock() - idle_since >= 2 * REPORT_S and loop.current_load().num_waiting == 0:
                for router in routers.values():
                    if router.attached and not inbox._items:
                        assert router.mirror == set(engine.kv.snapshot())
                        assert router.num_counted == router.num_sent
                        assert set(router.state._pending) <= set(router.waiting)
                        assert not router.state._sent
        else:
            idle_since = None
        if turns > 900:
            if timeout and not clients and turns > 910:
                loop.stop()
        else:
            acts = rng.random()
            if not routers or (acts < 0.02 and len(routers) < 4):
                attach()
            elif acts < 0.03:
                session = rng.choice(list(routers))
                del routers[session]
                inbox.post(Ended(session))
            elif acts < 0.15:
                submit(rng.choice(list(routers)))
            elif acts < 0.19:
                session = rng.choice(list(routers))
                router = routers[session]
                if router.open:
                    handle = rng.choice(sorted(router.open))
                    router.open.discard(handle)
                    router.counted(handle)
                    inbox.post(Cancelled(session, handle))
                elif router.waiting:
                    router.counted(router.waiting.pop())
        if timeout and not inbox._items:
            clock.advance(timeout)

    inbox = TurnInbox(turn)
    clients = Clients(DESCRIPTION, deliver, clock)
    role = DecodeRole(engine, clients, Intake(engine, lambda _entry: Future(), max_pulls=1), clock)
    loop = WorkerLoop(engine, clients, inbox, role, clock)
    attach()
    attach()
    loop.run()
    executor.close()
    assert num_frames > 100
    # What a router lacks while a step is computed, and where the next turn begins: no older than it may be.
    step_s = base_s + 32 / 2000
    behind_s = step_s if in_flight == 2 else 0.0  # the step before ends while this one is computed
    assert max(ages, default=0.0) <= REPORT_S + behind_s + 0.005
    assert max(late, default=0.0) <= max(REPORT_S, step_s) + behind_s + 0.005


def test_what_a_short_step_stored_is_known_while_the_long_one_behind_it_runs() -> None:
    """With two steps in flight, a long step is planned behind a short one, and ends long after it."""
    clock = FakeClock()
    config = SimulatedConfig(
        step_base_s=0.01,
        prefill_tokens_per_s=1000.0,
        decode_s_per_sequence=0.0,
        num_blocks=4096,
        block_size=4,
        vocab_size=200_000,
    )
    watching, heard = SessionId(0), Router()
    posted = 0
    lacked: list[int] = []  # blocks that the watching router did not know of where half of the long step was done

    def sleep(seconds: float) -> None:
        clock.advance(seconds / 2)
        if seconds > 1.0:
            lacking = set(engine.kv.snapshot()) - heard.mirror
            lacked.append(len(lacking))
        clock.advance(seconds / 2)

    def deliver(frames: Mapping[SessionId, pb.Frame]) -> None:
        if watching in frames:
            heard.receive(frames[watching])

    def submit(num_tokens: int) -> None:
        nonlocal posted
        posted += 1
        tokens = tuple(range(300 + 5000 * posted, 300 + 5000 * posted + num_tokens))
        request = Request(RequestId(""), tokens, num_tokens, SamplingParams(max_tokens=1), seed=0)
        inbox.post(Submitted(SessionId(1), submit_to_pb(request, posted, 10**7)))

    def turn(_timeout: float) -> None:
        if not clients and posted <= 20:  # until it knows its steps, and one more
            submit(16)
        elif posted == 21 and engine.num_in_flight:
            submit(3000)
        elif posted == 22 and not clients:
            loop.stop()

    executor = SimulatedExecutor(config, sleep, clock)
    engine = Engine(executor, SchedulerConfig(max_batch_tokens=4096, max_num_seqs=8), secret="", model="m")
    clients = Clients(DESCRIPTION, deliver, clock)
    inbox = TurnInbox(turn)
    role = DecodeRole(engine, clients, Intake(engine, lambda _entry: Future(), max_pulls=1), clock)
    loop = WorkerLoop(engine, clients, inbox, role, clock)
    inbox.post(Attached(watching))
    inbox.post(Attached(SessionId(1)))
    loop.run()
    executor.close()
    assert lacked == [0]
