"""The worker loop with the decode role, turn by turn in one thread: routers, pulls and time are the test's."""

import random
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import pytest

from decode_workers.intake import Entry, Intake, PullEnded
from decode_workers.worker import DecodeRole
from engine.clients import Clients
from engine.engine import Engine, Scheduled
from engine.errors import TransferError
from engine.executors.simulated import SimulatedConfig, SimulatedExecutor
from engine.inbox import Inbox
from engine.loop import Drain, WorkerLoop
from engine.request import Request, RequestId, SamplingParams
from engine.scheduler import SchedulerConfig
from engine.session import Attached, Cancelled, Ended, SessionCommand, SessionId, Submitted
from engine.step_model import StepWork
from engine.wire import lone_tokens_from_bytes, model_from_pb, submit_to_pb
from kv_transfer.pull import Pulled
from protos import worker_pb2 as pb
from tests.fakes import FakeClock, ScriptedExecutor

ROUTERS = (SessionId(0), SessionId(1))
TURN_S = 0.001
Command = SessionCommand | Drain | PullEnded


class TurnInbox(Inbox[Command]):
    """Calls `turn` with the time the loop would wait, and never waits."""

    def __init__(self, turn: Callable[[float], None]) -> None:
        super().__init__()
        self._turn = turn

    def take(self, timeout: float) -> list[Command]:
        self._turn(timeout)
        return super().take(0.0)


class NotingRole(DecodeRole):
    num_preempted = 0

    def before_run(self, scheduled: Scheduled, now: float) -> None:
        self.num_preempted += len(scheduled.preempted)
        super().before_run(scheduled, now)


@dataclass
class Answer:
    """What a router was told of one request."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    is_pulled: bool = False
    is_over: bool = False
    error: str = ""

    def take(self, output: pb.Output) -> None:
        assert not self.is_over, output
        if output.token_ids:
            assert output.index == len(self.token_ids) + self.is_pulled
        self.token_ids += output.token_ids
        self.error = output.error.message
        finished_by_prefill = output.handoff_done and expected(self.request)[1:] == []
        self.is_over = bool(output.finish_reason or output.HasField("error") or finished_by_prefill)


def make_engine(max_in_flight: int = 1, block_size: int = 4, num_blocks: int = 64, **limits: int) -> Engine:
    executor = ScriptedExecutor(
        max_in_flight=max_in_flight,
        num_blocks=num_blocks,
        block_size=block_size,
        vocab_size=100,
        eos_token_ids=tuple(range(90, 100)),
    )
    return Engine(executor, SchedulerConfig(**limits), secret="", model="m")


def expected(request: Request) -> list[int]:
    """The tokens of an engine with nothing else to do."""
    engine = make_engine()
    engine.submit(request)
    found: list[int] = []
    while (scheduled := engine.schedule()) is not None:
        found += [output.token_id for output in engine.run(scheduled)]
    return found


class Worker:
    """`script` posts what routers do at the beginning of each turn, for `num_turns`; then the rest is finished."""

    def __init__(self, engine: Engine, rng: random.Random, script: Callable[["Worker"], None], num_turns: int) -> None:
        self.engine = engine
        self.rng = rng
        self.answers: dict[tuple[SessionId, int], Answer] = {}
        self.pulls: list[tuple[Entry, Future[None]]] = []
        self.inbox = TurnInbox(self._turn)
        self.clock = FakeClock()
        self.turn = 0
        self._script = script
        self._num_turns = num_turns
        self.clients = Clients(pb.Description(), self._deliver, self.clock)
        self.intake = Intake(engine, self._start_pull, max_pulls=3)
        self.role = NotingRole(engine, self.clients, self.intake, self.clock)
        self.loop = WorkerLoop(engine, self.clients, self.inbox, self.role, self.clock)
        for router in ROUTERS:
            self.inbox.post(Attached(router))

    def submit(self, request: Request, router: SessionId = ROUTERS[0], *, offer: bytes = b"", turns: int = 9999) -> int:
        """Its handle. It expires after as many `turns`."""
        handle = len(self.answers)
        self.answers[router, handle] = Answer(request, is_pulled=bool(offer))
        self.inbox.post(Submitted(router, submit_to_pb(request, handle, turns, offer)))
        return handle

    def _turn(self, timeout: float) -> None:
        self.turn += 1
        assert self.turn < 10_000, "the loop does not finish"
        self.clock.advance(TURN_S)
        engine = self.engine
        engine.check_invariants(block for entry, _ in self.pulls for block in entry.block_ids)
        if timeout > 0:
            assert engine.num_in_flight == 0
            assert not engine.has_work or (engine.short_of_blocks and self.pulls), "the loop sleeps with work to do"
        for pull in self.rng.sample(self.pulls, len(self.pulls)):
            if self.rng.random() < 0.3:
                self.pulls.remove(pull)
                self.inbox.post(self._end(*pull))
        if self.turn <= self._num_turns:
            self._script(self)
        elif not (self.clients or self.pulls or engine.num_in_flight):
            self.loop.stop()

    def _deliver(self, frames: Mapping[SessionId, pb.Frame]) -> None:
        for router, frame in frames.items():
            for handle, index, token_id in lone_tokens_from_bytes(frame.tokens):
                self.answers[router, handle].take(pb.Output(handle=handle, index=index, token_ids=[token_id]))
            for output in frame.outputs:
                self.answers[router, output.handle].take(output)

    def _start_pull(self, entry: Entry) -> Future[None]:
        future: Future[None] = Future()
        self.pulls.append((entry, future))
        return future

    def _end(self, entry: Entry, future: Future[None]) -> PullEnded:
        """What a prefill worker computes is written into the blocks, unless the pull was cancelled or is to fail."""
        block_size = self.engine.kv.block_size
        fresh = entry.block_ids[entry.num_held_tokens // block_size :]
        if future.cancelled():
            for block in fresh:
                self.engine.executor.memory.block(block)[:] = self.rng.randbytes(
                    self.engine.executor.layout.block_bytes
                )
            return PullEnded(entry.request.id, None, None)
        if entry.offer == b"broken":
            return PullEnded(entry.request.id, None, TransferError("lost", retryable=True))
        source = make_engine(block_size=block_size)
        source.submit(entry.request, decodes=False)
        scheduled = source.schedule()
        assert scheduled is not None
        [first] = source.run(scheduled)
        if first.finish_reason is None:
            theirs = source.detach(entry.request.id)[-len(fresh) :] if fresh else []
            for ours, block in zip(fresh, theirs, strict=True):
                self.engine.executor.memory.block(ours)[:] = source.executor.memory.block(block)
        pulled = Pulled(first.token_id, first.finish_reason is not None, len(fresh), 0, 0.0, 0.0, 0.0, "test")
        return PullEnded(entry.request.id, pulled, None)


def random_request(rng: random.Random, name: str) -> Request:
    first, num_tokens, max_tokens = rng.choice([10, 10, 40]), rng.randrange(1, 12), rng.randrange(1, 11)
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=rng.choice([0, 0, max_tokens]),
        presence_penalty=rng.choice([0.0, 0.0, 0.0, 1.0]),
        stop_token_ids=rng.choice([(), tuple(range(60, 70))]),
    )
    prompt = tuple(range(first, first + num_tokens))
    return Request(RequestId(name), prompt, num_tokens, params, seed=1, priority=rng.choice([0, 0, 1]))


@pytest.mark.parametrize("min_shared", [2, 256])
@pytest.mark.parametrize("max_in_flight", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_every_router_hears_the_right_tokens_and_an_end_and_the_loop_never_sleeps_with_work(
    seed: int, max_in_flight: int, min_shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts and pulls in a pool too small for them, penalties, end tokens; some cancelled, late, broken or left, some
    that wait for what others compute."""
    monkeypatch.setattr("engine.scheduler._MIN_SHARED_TOKENS", min_shared)
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 4])
    limits = {"max_num_seqs": rng.choice([1, 4, 6]), "max_batch_tokens": rng.choice([6, 16])}

    def act(worker: Worker) -> None:
        if worker.turn == 100:
            worker.inbox.post(Ended(ROUTERS[1]))
        if rng.random() < 0.6:
            router = ROUTERS[rng.random() < 0.2 and worker.turn < 100]
            offer, turns = rng.choice([b"", b"offer", b"offer", b"broken"]), rng.choice([9999, 9999, 40])
            worker.submit(random_request(rng, f"r{len(worker.answers)}"), router, offer=offer, turns=turns)
        if rng.random() < 0.1 and worker.answers:
            worker.inbox.post(Cancelled(ROUTERS[0], rng.randrange(len(worker.answers))))

    engine = make_engine(max_in_flight, block_size, 24 // block_size, **limits)
    worker = Worker(engine, rng, act, num_turns=150)
    worker.loop.run()
    num_finished = 0
    for (router, _), answer in worker.answers.items():
        whole = expected(answer.request)[answer.is_pulled :]
        assert answer.is_over or router == ROUTERS[1]
        assert answer.error in ("", "cancelled", "the request's deadline passed", "the KV handoff failed")
        if answer.is_over and not answer.error:
            assert answer.token_ids == whole, answer
            num_finished += 1
        else:
            assert answer.token_ids == whole[: len(answer.token_ids)]
    assert num_finished > 15
    assert worker.role.num_preempted
    assert engine.kv.num_free == engine.kv.num_blocks
    assert not engine.has_work


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_pulls_do_not_take_the_blocks_that_an_earlier_prompt_waits_for(max_in_flight: int) -> None:
    """While a request with a penalty decodes, for each token of which the loop waits."""
    slow = SamplingParams(max_tokens=140, presence_penalty=1.0, ignore_eos=True)

    def act(worker: Worker) -> None:
        if worker.turn == 1:
            worker.submit(Request(RequestId("slow"), (10, 11, 12), 3, slow, seed=1))
        if worker.turn == 20:
            big = worker.submit(Request(RequestId("big"), tuple(range(10, 90)), 80, SamplingParams(max_tokens=1), 1))
            asked.append(worker.answers[ROUTERS[0], big])
        if worker.turn == 60:
            assert asked[0].is_over
        if worker.intake.num_waiting < 3 and worker.turn > 1:
            prompt = tuple(worker.rng.randrange(10, 90) for _ in range(16))
            worker.submit(Request(RequestId("p"), prompt, 16, SamplingParams(max_tokens=3), 1), offer=b"offer")

    asked: list[Answer] = []
    worker = Worker(make_engine(max_in_flight, 4, 40, max_num_seqs=8, max_batch_tokens=256), random.Random(3), act, 60)
    worker.loop.run()
    assert all(answer.token_ids == expected(answer.request)[answer.is_pulled :] for answer in worker.answers.values())


def test_a_worker_learns_how_long_its_steps_take_and_tells_what_waits_in_seconds() -> None:
    config = SimulatedConfig(step_base_s=0.01, prefill_tokens_per_s=1000.0, decode_s_per_sequence=0.002)
    clock = FakeClock()
    executor = SimulatedExecutor(config, clock.advance)
    engine = Engine(executor, SchedulerConfig(max_batch_tokens=200, max_num_seqs=8), secret="", model="m")
    clients = Clients(pb.Description(), lambda _frames: None, clock)
    loads: list[pb.Load] = []
    rng = random.Random(3)

    def turn(_timeout: float) -> None:
        loads.append(loop.current_load())
        if len(loads) == 1:
            inbox.post(Attached(ROUTERS[0]))
        if len(loads) < 200 and rng.random() < 0.5:
            token_ids = tuple(rng.choices(range(300, 400), k=rng.randrange(2, 300)))
            request = Request(RequestId(""), token_ids, len(token_ids), SamplingParams(max_tokens=20), seed=0)
            inbox.post(Submitted(ROUTERS[0], submit_to_pb(request, len(loads), 10**6)))
        if len(loads) >= 200 and not clients:
            loop.stop()

    inbox = TurnInbox(turn)
    role = DecodeRole(engine, clients, Intake(engine, lambda _entry: Future(), max_pulls=1), clock)
    loop = WorkerLoop(engine, clients, inbox, role, clock)
    assert not loop.current_load().HasField("model")
    loop.run()
    executor.close()
    learned = model_from_pb(loads[-1].model)
    assert learned.seconds(StepWork(100, 5050, 0, 0)) == pytest.approx(0.01 + 0.1, rel=0.05)
    assert learned.seconds(StepWork(0, 0, 8, 800)) == pytest.approx(0.01 + 0.016, rel=0.05)
    busiest = max(loads[100:200], key=lambda load: load.queue_us)
    assert busiest.queue_us / 1e6 == pytest.approx(0.01 + busiest.num_waiting_tokens / 1000, rel=0.1)
    assert loads[-1].queue_us == loads[-1].num_waiting_tokens == 0


@pytest.mark.parametrize(("chunk", "num_behind"), [(192, 1), (32, 2)])  # steps of 0.2 and 0.04 s
def test_what_comes_during_a_long_step_waits_for_no_other(chunk: int, num_behind: int) -> None:
    """The short prompt is more urgent than the long one, and comes while a chunk of that is computed."""
    clock = FakeClock()
    config = SimulatedConfig(step_base_s=0.01, prefill_tokens_per_s=1000.0, decode_s_per_sequence=0.0, num_blocks=999)
    began: list[float] = []
    posted_at = first_at = 0.0

    def sleep(seconds: float) -> None:
        nonlocal posted_at
        if loop.current_load().HasField("model") and not posted_at:
            clock.advance(0.5 * seconds)
            posted_at = clock()
            submit(1, tuple(range(300, 308)), priority=-1)
            clock.advance(0.5 * seconds)
        else:
            clock.advance(seconds)

    def submit(handle: int, token_ids: tuple[int, ...], priority: int = 0) -> None:
        request = Request(
            RequestId(""), token_ids, len(token_ids), SamplingParams(max_tokens=1), seed=0, priority=priority
        )
        inbox.post(Submitted(ROUTERS[0], submit_to_pb(request, handle, 10**6)))

    def heard(frames: Mapping[SessionId, pb.Frame]) -> None:
        nonlocal first_at
        if any(output.handle == 1 and output.token_ids for frame in frames.values() for output in frame.outputs):
            first_at = clock()
            loop.stop()

    def turn(_timeout: float) -> None:
        began.append(clock())
        assert len(began) < 500, "the short prompt was never computed"

    executor = SimulatedExecutor(config, sleep, clock)
    engine = Engine(executor, SchedulerConfig(max_batch_tokens=chunk, max_num_seqs=8), secret="", model="m")
    clients = Clients(pb.Description(), heard, clock)
    inbox = TurnInbox(turn)
    role = DecodeRole(engine, clients, Intake(engine, lambda _entry: Future(), max_pulls=1), clock)
    loop = WorkerLoop(engine, clients, inbox, role, clock)
    inbox.post(Attached(ROUTERS[0]))
    submit(0, tuple(range(1000, 1000 + 50 * chunk)))
    loop.run()
    executor.close()
    step_s = 0.01 + chunk / 1000
    # Half of the step under way, as many as are planned, and its own, with what fits beside it of the long one.
    assert first_at - posted_at == pytest.approx((0.5 + num_behind) * step_s, rel=0.1)


def test_frames_tell_when_the_first_of_their_cache_events_happened_and_how_many_blocks_are_cached() -> None:
    clock = FakeClock()
    executor = SimulatedExecutor(SimulatedConfig(step_base_s=0.015, num_blocks=12, block_size=4), clock.advance)
    engine = Engine(executor, SchedulerConfig(max_batch_tokens=64, max_num_seqs=4), secret="", model="m")
    sent: list[tuple[float, pb.Frame]] = []
    clients = Clients(pb.Description(), lambda frames: sent.extend((clock(), each) for each in frames.values()), clock)
    prompts = [tuple(range(first, first + 33)) for first in range(100, 1600, 100)]

    def turn(_timeout: float) -> None:
        if not sent:
            inbox.post(Attached(ROUTERS[0]))
        if not clients and prompts:  # each needs blocks that the one before left in the cache
            request = Request(RequestId(""), prompts.pop(), 33, SamplingParams(max_tokens=5, ignore_eos=True), seed=0)
            inbox.post(Submitted(ROUTERS[0], submit_to_pb(request, len(prompts), 10**6)))
        elif not clients:
            loop.stop()

    inbox = TurnInbox(turn)
    role = DecodeRole(engine, clients, Intake(engine, lambda _entry: Future(), max_pulls=1), clock)
    loop = WorkerLoop(engine, clients, inbox, role, clock)
    loop.run()
    executor.close()
    held = 0
    ages = {"stored": set(), "removed": set()}
    for now, frame in sent:
        for event in frame.kv_events:
            held += len(event.stored) - len(event.removed)
        if frame.kv_events:
            first = frame.kv_events[0]
            ages["removed" if first.removed else "stored"].add(round(now - frame.kv_events_us / 1e6, 3))
            assert frame.load.num_cached_blocks == held
    # Blocks become matchable when a step's results come, and are evicted when a step is planned: told when it begins
    # where it is time to, else when it has ended.
    assert ages == {"stored": {0.0}, "removed": {0.0, 0.015}}


def test_a_step_planned_behind_another_ends_after_both() -> None:
    """Steps of 0.026 s, two in flight. At the end of each other one the last report would be 0.104 s old."""
    clock = FakeClock()
    config = SimulatedConfig(step_base_s=0.01, prefill_tokens_per_s=1000.0, decode_s_per_sequence=0.0, num_blocks=999)
    executor = SimulatedExecutor(config, clock.advance, clock)
    engine = Engine(executor, SchedulerConfig(max_batch_tokens=16, max_num_seqs=8), secret="", model="m")
    frames_at: list[float] = []
    clients = Clients(pb.Description(), lambda _frames: frames_at.append(clock()), clock)
    turns: list[float] = []

    def turn(_timeout: float) -> None:
        turns.append(clock())
        if len(turns) == 100:
            loop.stop()

    inbox = TurnInbox(turn)
    role = DecodeRole(engine, clients, Intake(engine, lambda _entry: Future(), max_pulls=1), clock)
    loop = WorkerLoop(engine, clients, inbox, role, clock)
    request = Request(RequestId(""), tuple(range(1000, 10_000)), 9000, SamplingParams(max_tokens=1), seed=0)
    inbox.post(Attached(ROUTERS[0]))
    inbox.post(Submitted(ROUTERS[0], submit_to_pb(request, 0, 10**6)))
    loop.run()
    executor.close()
    gaps = np.diff([at for at in frames_at if at > turns[50]])
    assert len(gaps) > 10
    assert gaps.max() < 0.06
