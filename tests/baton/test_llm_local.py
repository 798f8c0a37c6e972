"""The loop of the engine in this process, over an executor whose steps are the test's: in flight, stopped, broken."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from threading import Event
from typing import Any, NoReturn

import pytest

from baton.llm_local import LocalBackend
from baton.outputs import Ended, Increment, Job, RequestOutput
from engine.executors.base import Batch, Chunk, PendingStep
from engine.request import SamplingParams
from engine.scheduler import SchedulerConfig
from router.tokenizer import Tokenizer
from tests.fakes import LateStep, ScriptedExecutor

WAIT_S = 10.0  # for what takes milliseconds, and an hour where the loop sleeps with work to do

LIMITS = {  # every reason for a plan to wait for the step in flight
    "room for all": {},
    "one at a time": {"max_num_seqs": 1},
    "a small pool": {"num_blocks": 10},
    "small steps": {"max_batch_tokens": 8, "max_num_seqs": 4},
}


@contextmanager
def backend(
    tokenizer: Tokenizer,
    make: Callable[..., ScriptedExecutor] = ScriptedExecutor,
    *,
    max_batch_tokens: int = 64,
    max_num_seqs: int = 8,
    **executor: Any,
) -> Iterator[LocalBackend]:
    vocab_size = tokenizer.vocab_size
    scripted = make(vocab_size=vocab_size, eos_token_ids=tuple(range(vocab_size - 20, vocab_size)), **executor)
    made = LocalBackend("m", scripted, SchedulerConfig(max_batch_tokens, max_num_seqs), tokenizer, lambda _bits: 1)
    try:
        yield made
    finally:
        made.close()
        assert not made._thread.is_alive()


def check_nothing_is_left(closed: LocalBackend) -> None:
    engine = closed._engine
    engine.check_invariants()
    assert not engine.has_work
    assert engine.kv.num_free == engine.kv.num_blocks


def run(backend: LocalBackend, jobs: list[Job]) -> list[Ended]:
    ends: SimpleQueue[tuple[int, Ended]] = SimpleQueue()
    for place, job in enumerate(jobs):
        backend.complete(job, lambda end, place=place: ends.put((place, end)))  # type: ignore[misc]
    found = dict(ends.get(timeout=WAIT_S) for _ in jobs)
    return [found[place] for place in range(len(jobs))]


def job(first: int, num_tokens: int = 5, **params: Any) -> Job:
    return Job(range(first, first + num_tokens), SamplingParams(**{"max_tokens": 8, **params}))


JOBS = [
    job(20, presence_penalty=1.0),
    job(30, n=3, max_tokens=1),
    job(40, n=2, max_tokens=20, ignore_eos=True),
    job(50, 18, max_tokens=20, ignore_eos=True),
    job(60, stop=("e", "a", "o"), max_tokens=18),
    job(70, max_tokens=18, min_tokens=6, logprobs=0),
    job(80, max_tokens=18, repetition_penalty=1.2, stop=("t", "i"), include_stop_str_in_output=True),
    job(90, 13, prompt_logprobs=0, stop_token_ids=tuple(range(100, 160))),
]


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
def test_steps_in_flight_change_no_output_and_never_keep_the_loop_asleep(
    tokenizer: Tokenizer, limits: dict[str, int]
) -> None:
    with backend(tokenizer) as plain:
        alone = [run(plain, [each])[0] for each in JOBS]
    assert all(isinstance(end, RequestOutput) for end in alone)
    reasons = {choice.stop_reason for end in alone if isinstance(end, RequestOutput) for choice in end.outputs}
    assert reasons & {"e", "a", "o"}
    with backend(tokenizer, max_in_flight=2, **limits) as late:
        assert run(late, JOBS) == alone
    check_nothing_is_left(late)


def test_what_is_cancelled_while_a_step_computes_for_it_harms_nobody_and_leaves_nothing(tokenizer: Tokenizer) -> None:
    with backend(tokenizer) as plain:
        alone = run(plain, JOBS)
    heard: list[Increment | Exception | None] = []
    with backend(tokenizer, max_in_flight=2, num_blocks=16) as late:

        def hear(event: Increment | Exception | None) -> None:
            heard.append(event)
            if len(heard) == 3:
                cancels[0]()

        long = [job(first, max_tokens=40, ignore_eos=True) for first in (110, 130)]
        cancels = [late.stream(long[0], hear), late.complete(long[1], lambda end: pytest.fail(f"cancelled, but {end}"))]
        cancels[1]()
        assert run(late, JOBS) == alone
    assert 3 <= len(heard) < 40
    check_nothing_is_left(late)


class BrokenExecutor(ScriptedExecutor):
    """Its fourth step cannot be started, or fails while it runs, when the third is in flight."""

    def __init__(self, where: str, **options: Any) -> None:
        super().__init__(**options)
        self.where = where
        self.num_submitted = 0

    def submit(self, batch: Batch, on_group_done: Callable[[int], None] | None = None) -> PendingStep:
        self.num_submitted += 1
        if self.num_submitted != 4:
            return super().submit(batch, on_group_done)
        assert self._num_in_flight == 1
        if self.where == "submit":
            self._fail()
        return LateStep(self._fail)

    def _fail(self) -> NoReturn:
        activations = {object()}
        self.activations = weakref.ref(activations)
        raise MemoryError(f"no room for {len(activations)} more")


@pytest.mark.parametrize("where", ["submit", "result"])
def test_everybody_hears_of_a_step_that_fails_with_another_in_flight_and_its_memory_is_free(
    tokenizer: Tokenizer, where: str
) -> None:
    make = partial(BrokenExecutor, where)
    with backend(tokenizer, make, max_in_flight=2) as broken:
        for jobs in (JOBS[2:4], JOBS[:2]):
            assert all(isinstance(end, MemoryError) for end in run(broken, jobs))
        assert broken._executor.activations() is None


def test_commands_behind_one_that_breaks_the_engine_are_heard_of(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with backend(tokenizer) as broken:
        together = Event()
        broken._inbox.post(together.wait)  # type: ignore[arg-type]
        monkeypatch.setattr(broken._engine, "submit", lambda _request: 1 / 0)
        ends: SimpleQueue[Ended] = SimpleQueue()
        for each in JOBS:
            broken.complete(each, ends.put)
        together.set()
        assert all(isinstance(ends.get(timeout=WAIT_S), ZeroDivisionError) for _ in JOBS)


def test_a_job_that_is_tokenized_while_the_llm_closes_is_refused(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: SimpleQueue[Ended] = SimpleQueue()
    with backend(tokenizer) as closing:

        def encode(_text: str) -> list[int]:
            closing.close()
            return [20]

        monkeypatch.setattr(tokenizer, "encode", encode)
        closing.complete(Job("text", SamplingParams()), ends.put)
    assert isinstance(ends.get(timeout=WAIT_S), RuntimeError)


def test_an_executor_is_not_closed_under_a_step_that_does_not_end(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.llm_local.CLOSE_WAIT_S", 0.1)
    running, done, ends = Event(), Event(), SimpleQueue[Ended]()

    def choose(_chunk: Chunk) -> None:
        running.set()
        done.wait(WAIT_S)

    with backend(tokenizer, choose=choose) as late:
        closed: list[bool] = []
        monkeypatch.setattr(late._executor, "close", lambda: closed.append(late._thread.is_alive()))
        late.complete(JOBS[0], ends.put)
        running.wait(WAIT_S)
        late.close()
        assert not closed
        done.set()
        assert isinstance(ends.get(timeout=WAIT_S), RuntimeError)
        monkeypatch.setattr("baton.llm_local.CLOSE_WAIT_S", WAIT_S)
    assert closed == [False]
