"""The engine over an instant executor: the life of a request, finish reasons, retries, preemption, leaks."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from engine.engine import Engine, TokenOutput
from engine.errors import InvalidRequest
from engine.executors.base import Chunk
from engine.kv.layout import BlockId
from engine.request import FinishReason, Request, RequestId, SamplingParams
from engine.scheduler import SchedulerConfig
from engine.step_model import StepWork, num_pairs
from tests.fakes import ScriptedExecutor

SECRET = {"secret": "s", "model": "m"}


def make_engine(
    *, max_batch_tokens: int = 64, max_num_seqs: int = 8, **executor: Any
) -> tuple[Engine, ScriptedExecutor]:
    scripted = ScriptedExecutor(**executor)
    return Engine(scripted, SchedulerConfig(max_batch_tokens, max_num_seqs), **SECRET), scripted


def make_request(name: str, num_tokens: int = 5, *, first: int = 20, priority: int = 0, **params: Any) -> Request:
    token_ids = tuple(range(first, first + num_tokens))
    params = {"max_tokens": 4, **params}
    return Request(RequestId(name), token_ids, num_tokens, SamplingParams(**params), seed=1, priority=priority)


def step(engine: Engine, held: Sequence[BlockId] = ()) -> list[TokenOutput]:
    """One turn of the worker loop. `held`: blocks that others hold."""
    scheduled = engine.schedule()
    if scheduled is not None:
        engine.start(scheduled)
    engine.check_invariants(held)
    outputs = engine.collect() if scheduled is None or not engine.can_start else []
    engine.check_invariants(held)
    return outputs


def finish(engine: Engine, max_steps: int = 10_000) -> dict[str, list[TokenOutput]]:
    """Run until idle. Outputs of each request, whose indices must be consecutive."""
    outputs: dict[str, list[TokenOutput]] = {}
    for _ in range(max_steps):
        if not engine.has_work:
            return outputs
        for output in step(engine):
            outputs.setdefault(output.request_id, []).append(output)
    raise AssertionError("the engine does not finish")


def tokens(outputs: list[TokenOutput]) -> list[int]:
    assert [output.index for output in outputs] == list(range(outputs[0].index, outputs[0].index + len(outputs)))
    assert [output.finish_reason is None for output in outputs] == [True] * (len(outputs) - 1) + [False]
    return [output.token_id for output in outputs]


def undisturbed(request: Request) -> list[int]:
    engine, _ = make_engine(num_blocks=256)
    engine.submit(request)
    return tokens(finish(engine)[request.id])


def test_a_request_yields_its_tokens_and_leaves_nothing_but_cached_blocks() -> None:
    engine, executor = make_engine()
    engine.submit(make_request("a", 10, max_tokens=3))
    outputs = finish(engine)["a"]
    assert [output.index for output in outputs] == [0, 1, 2]
    assert [output.finish_reason for output in outputs] == [None, None, FinishReason.LENGTH]
    assert executor.steps == [[("a", 0, 10)], [("a", 10, 1)], [("a", 11, 1)]]
    assert engine.kv.num_free == engine.kv.num_blocks
    assert engine.kv.num_cached == 3


def test_an_end_token_is_the_last_output() -> None:
    engine, _ = make_engine(eos_token_ids=(500, 501), choose=lambda chunk: 501 if chunk.start else 30)
    engine.submit(make_request("a"))
    outputs = finish(engine)["a"]
    assert [(output.token_id, output.finish_reason) for output in outputs] == [(30, None), (501, FinishReason.STOP)]


def test_a_stop_token_id_ends_a_request_and_end_tokens_can_be_ignored() -> None:
    choose = {0: 501, 5: 44, 6: 45}
    engine, _ = make_engine(eos_token_ids=(501,), choose=lambda chunk: choose[chunk.start])
    engine.submit(make_request("a", ignore_eos=True, stop_token_ids=(44,)))
    assert tokens(finish(engine)["a"]) == [501, 44]


def test_end_and_stop_tokens_are_banned_until_min_tokens() -> None:
    banned: list[tuple[int, ...]] = []

    def choose(chunk: Chunk) -> int:
        assert chunk.sample is not None
        banned.append(chunk.sample.banned_token_ids)
        return 500 if not banned[-1] else 30

    engine, _ = make_engine(eos_token_ids=(500,), choose=choose)
    engine.submit(make_request("a", min_tokens=2, stop_token_ids=(60,)))
    assert tokens(finish(engine)["a"]) == [30, 30, 500]
    assert banned == [(60, 500), (60, 500), ()]


def test_the_longest_sequence_of_the_model_ends_a_request() -> None:
    engine, _ = make_engine(max_model_len=8)
    engine.submit(make_request("a", 6, max_tokens=100))
    assert [output.finish_reason for output in finish(engine)["a"]] == [None, FinishReason.LENGTH]


def test_a_pool_smaller_than_the_model_bounds_sequences_too() -> None:
    engine, _ = make_engine(num_blocks=2, block_size=4, max_model_len=1024)
    engine.submit(make_request("a", 5, max_tokens=100))
    assert len(finish(engine)["a"]) == 3
    with pytest.raises(InvalidRequest) as error:
        engine.submit(make_request("b", 8))
    assert (error.value.param, error.value.code) == ("prompt", "context_length_exceeded")


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (make_request("a", 0), "prompt"),
        (replace(make_request("a"), num_prompt_tokens=6), "prompt"),
        (replace(make_request("a"), num_prompt_tokens=0), "prompt"),
        (make_request("a", 5, first=998), "prompt"),
        (make_request("a", 5, first=-1), "prompt"),
        (replace(make_request("a"), token_ids=(1 << 40,), num_prompt_tokens=1), "prompt"),
        (make_request("a", temperature=-1.0), "temperature"),
        (make_request("a", stop_token_ids=(1000,)), "stop_token_ids"),
        (make_request("a", min_tokens=5), "min_tokens"),
        (replace(make_request("a"), seed=-1), "seed"),
        (replace(make_request("a", max_tokens=2), num_prompt_tokens=3), "max_tokens"),
    ],
)
def test_a_request_that_can_never_run_is_refused_and_changes_nothing(request_: Request, param: str) -> None:
    engine, _ = make_engine()
    with pytest.raises(InvalidRequest) as error:
        engine.submit(request_)
    assert error.value.param == param
    assert not engine.has_work
    engine.check_invariants()


def test_a_retried_request_goes_on_with_its_output_counted() -> None:
    request = make_request("a", 9, max_tokens=8)
    whole = undisturbed(request)
    specs: list[tuple[int, int]] = []

    def choose(chunk: Chunk) -> None:
        if chunk.sample is not None:
            specs.append((len(chunk.sample.token_ids), chunk.sample.num_prompt_tokens))

    engine, _ = make_engine(choose=choose)
    engine.submit(replace(request, token_ids=(*request.token_ids, *whole[:3])))
    outputs = finish(engine)["a"]
    assert outputs[0].index == 3
    assert tokens(outputs) == whole[3:]
    assert specs == [(length, 9) for length in range(12, 17)]


def test_prompt_logprobs_come_once_with_the_first_token_over_all_chunks() -> None:
    engine, executor = make_engine(max_batch_tokens=8)
    engine.submit(make_request("warm", 20, max_tokens=1))
    finish(engine)
    executor.steps.clear()
    engine.submit(make_request("a", 20, prompt_logprobs=0, logprobs=0))
    outputs = finish(engine)["a"]
    assert [step[0] for step in executor.steps[:3]] == [("a", 0, 8), ("a", 8, 8), ("a", 16, 4)]
    assert outputs[0].prompt_logprobs is not None
    assert [each.token_id for each in outputs[0].prompt_logprobs] == list(range(21, 40))
    assert [output.prompt_logprobs for output in outputs[1:]] == [None] * 3
    assert all(output.logprobs is not None and output.logprobs.token_id == output.token_id for output in outputs)


def test_prompt_logprobs_of_a_prompt_of_one_token_are_empty_and_a_retry_gets_none() -> None:
    engine, _ = make_engine()
    engine.submit(make_request("a", 1, prompt_logprobs=2))
    assert finish(engine)["a"][0].prompt_logprobs == []
    engine.submit(replace(make_request("b", 6, prompt_logprobs=2), num_prompt_tokens=5))
    assert finish(engine)["b"][0].prompt_logprobs is None


def test_started_names_first_chunks_with_what_the_cache_held() -> None:
    engine, _ = make_engine(max_batch_tokens=8)
    engine.submit(make_request("a", 16, max_tokens=1))
    finish(engine)
    engine.submit(make_request("b", 30))
    scheduled = engine.schedule()
    assert scheduled is not None
    assert [(each.request.id, each.num_computed_tokens) for each in scheduled.started] == [("b", 16)]
    assert len(scheduled.started[0].block_ids) == 8
    engine.run(scheduled)
    again = engine.schedule()
    assert again is not None
    assert not again.started


def test_prefixes_are_shared_only_within_the_same_salt_and_adapter() -> None:
    engine, executor = make_engine()
    for name, salt, adapter in [("a", "", ""), ("b", "x", ""), ("c", "", "x"), ("d", "x", "")]:
        engine.submit(replace(make_request(name, 9, max_tokens=1), cache_salt=salt, adapter=adapter))
        finish(engine)
    assert executor.steps == [[("a", 0, 9)], [("b", 0, 9)], [("c", 0, 9)], [("d", 8, 1)]]


@pytest.mark.parametrize("num_steps", range(5))
def test_a_request_can_be_cancelled_in_any_state(num_steps: int) -> None:
    engine, _ = make_engine(max_batch_tokens=8, max_num_seqs=2)
    names = [RequestId(name) for name in "abcd"]
    for i, name in enumerate(names):
        engine.submit(make_request(name, 12, first=20 + 50 * i, max_tokens=50))
    for _ in range(num_steps):
        step(engine)
    for name in names:
        assert engine.cancel(name)
        assert not engine.cancel(name)
        engine.check_invariants()
    assert not engine.has_work
    assert engine.kv.num_free == engine.kv.num_blocks


def test_requests_cancelled_after_schedule_are_left_out_of_the_step() -> None:
    engine, executor = make_engine()
    for i, name in enumerate("abc"):
        engine.submit(make_request(name, 6, first=20 + 50 * i))
    scheduled = engine.schedule()
    assert scheduled is not None
    engine.cancel(RequestId("b"))
    assert [output.request_id for output in engine.run(scheduled)] == ["a", "c"]
    assert executor.steps == [[("a", 0, 6), ("c", 0, 6)]]
    scheduled = engine.schedule()
    assert scheduled is not None
    engine.cancel(RequestId("a"))
    engine.cancel(RequestId("c"))
    assert engine.run(scheduled) == []
    assert len(executor.steps) == 1
    assert engine.kv.num_free == engine.kv.num_blocks


def test_detach_passes_the_blocks_on_and_resume_takes_them_up() -> None:
    request = make_request("a", 13, max_tokens=6)
    engine, executor = make_engine()
    engine.submit(request)
    first = step(engine)[0]
    blocks = engine.detach(request.id)
    assert not engine.has_work
    engine.check_invariants(blocks)
    assert len(blocks) == 4
    engine.resume(replace(request, token_ids=(*request.token_ids, first.token_id)), blocks)
    engine.check_invariants()
    outputs = finish(engine)["a"]
    assert [first.token_id, *tokens(outputs)] == undisturbed(request)
    assert executor.steps[1] == [("a", 13, 1)]
    assert engine.kv.num_free == engine.kv.num_blocks


def test_resumed_blocks_that_were_moved_from_elsewhere_give_the_same_tokens_and_become_matchable() -> None:
    request = make_request("a", 16, max_tokens=6)
    source, _ = make_engine()
    source.submit(request)
    first = step(source)[0]
    sink, executor = make_engine()
    blocks = sink.kv.allocate(4)
    assert blocks is not None
    for theirs, ours in zip(source.detach(request.id), reversed(blocks), strict=True):
        sink.executor.memory.block(ours)[:] = source.executor.memory.block(theirs)
    resumed = replace(request, token_ids=(*request.token_ids, first.token_id))
    sink.resume(resumed, blocks[::-1])
    assert sink.kv.num_cached == 4
    assert [first.token_id, *tokens(finish(sink)["a"])] == undisturbed(request)
    assert executor.steps[0] == [("a", 16, 1)]


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_a_sequence_resumed_at_the_longest_length_gets_one_token_and_ends(max_in_flight: int) -> None:
    """Where its prompt was computed sequences may be longer, so its first token was not its last there."""
    request = make_request("a", 7, max_tokens=5)
    source, _ = make_engine()
    source.submit(request)
    [first] = step(source)
    sink, _ = make_engine(max_model_len=8, max_in_flight=max_in_flight)
    blocks = sink.kv.allocate(2)
    assert blocks is not None
    for theirs, ours in zip(source.detach(request.id), blocks, strict=True):
        sink.executor.memory.block(ours)[:] = source.executor.memory.block(theirs)
    sink.resume(replace(request, token_ids=(*request.token_ids, first.token_id)), blocks)
    [output] = finish(sink, max_steps=4)["a"]
    assert (output.token_id, output.finish_reason) == (undisturbed(request)[1], FinishReason.LENGTH)
    assert sink.kv.num_free == sink.kv.num_blocks


def test_wrong_kv_gives_wrong_tokens() -> None:
    request = make_request("a", 16, max_tokens=6)
    engine, executor = make_engine()
    engine.submit(request)
    first = step(engine)[0]
    blocks = engine.detach(request.id)
    executor.memory.block(blocks[3])[:4] = b"\x01\x02\x03\x04"
    engine.resume(replace(request, token_ids=(*request.token_ids, first.token_id)), blocks)
    assert [first.token_id, *tokens(finish(engine)["a"])] != undisturbed(request)


def test_a_preempted_request_gives_the_tokens_of_an_undisturbed_run() -> None:
    engine, _ = make_engine(num_blocks=9, block_size=4, max_batch_tokens=16)
    requests = [make_request(name, 7, first=100 * i + 20, max_tokens=20) for i, name in enumerate("abc")]
    for request in requests:
        engine.submit(request)
    preempted: set[str] = set()
    outputs: dict[str, list[TokenOutput]] = {}
    while engine.has_work:
        scheduled = engine.schedule()
        assert scheduled is not None
        preempted |= set(scheduled.preempted)
        assert not {each.request.id for each in scheduled.started} & set(scheduled.preempted)
        for output in engine.run(scheduled):
            outputs.setdefault(output.request_id, []).append(output)
        engine.check_invariants()
    assert preempted
    assert {name: tokens(each) for name, each in outputs.items()} == {each.id: undisturbed(each) for each in requests}


def test_logprobs_of_a_prompt_preempted_half_way_are_collected_anew() -> None:
    engine, _ = make_engine(num_blocks=5, block_size=4, max_batch_tokens=9, max_num_seqs=2)
    engine.submit(make_request("old", 4, max_tokens=2))
    engine.submit(make_request("young", 16, first=100, prompt_logprobs=0))
    step(engine)
    scheduled = engine.schedule()
    assert scheduled is not None
    assert scheduled.preempted == ["young"]
    engine.run(scheduled)
    found = finish(engine)["young"][0].prompt_logprobs
    assert found is not None
    assert [each.token_id for each in found] == list(range(101, 116))


def test_load_counts_what_runs_waits_and_is_still_to_compute() -> None:
    engine, _ = make_engine(max_batch_tokens=8, max_num_seqs=1, num_blocks=16, block_size=4)
    engine.submit(make_request("a", 20))
    engine.submit(make_request("b", 7, first=100))
    load = engine.load()
    assert (load.num_running, load.num_waiting, load.num_free_blocks, load.num_waiting_tokens) == (0, 2, 16, 27)
    step(engine)
    load = engine.load()
    assert (load.num_running, load.num_waiting, load.num_free_blocks, load.num_waiting_tokens) == (1, 1, 11, 19)


def test_what_is_queued_leaves_out_what_is_cached() -> None:
    engine, _ = make_engine(max_batch_tokens=8, max_num_seqs=1, num_blocks=16, block_size=4)
    engine.submit(make_request("a", 12, max_tokens=2))
    finish(engine)
    engine.submit(make_request("again", 12))
    engine.submit(make_request("scored", 12, prompt_logprobs=0))
    engine.submit(make_request("new", 20, first=100))
    work = [(4, 8), (12, 0), (20, 0)]  # the last token is computed in any case, with its block
    queued = StepWork(sum(num for num, _ in work), sum(num_pairs(*each) for each in work))
    assert engine.load().queued == queued
    step(engine)
    assert engine.load().queued == StepWork(queued.prefill_tokens - 4, queued.pairs - num_pairs(4, 8))
    finish(engine)
    assert engine.load().queued == StepWork()


def test_group_announcements_reach_the_caller() -> None:
    engine, _ = make_engine()
    engine.submit(make_request("a"))
    groups: list[int] = []
    scheduled = engine.schedule()
    assert scheduled is not None
    engine.run(scheduled, groups.append)
    assert groups == [0]


@pytest.mark.parametrize("min_shared", [2, 256])
@pytest.mark.parametrize("max_in_flight", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_every_request_finishes_with_the_right_tokens_whatever_happens_around_it(
    seed: int, max_in_flight: int, min_shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiny pool, random arrivals, priorities, end tokens, cancellations, strangers that write into their blocks, and
    prompts that wait for what others compute."""
    monkeypatch.setattr("engine.scheduler._MIN_SHARED_TOKENS", min_shared)
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 4])
    engine, executor = make_engine(
        num_blocks=24 // block_size,
        block_size=block_size,
        vocab_size=100,
        eos_token_ids=tuple(range(90, 100)),
        max_in_flight=max_in_flight,
        max_num_seqs=rng.choice([1, 3, 6]),
        max_batch_tokens=rng.choice([6, 16]),
    )
    expected: dict[str, list[int]] = {}
    outputs: dict[str, list[TokenOutput]] = {}
    strangers: list[list[BlockId]] = []
    cancelled: set[str] = set()
    for i in range(150):
        for _ in range(rng.randrange(2)):
            name = f"r{len(expected)}"
            request = make_request(name, rng.randrange(1, 12), first=rng.choice([10, 10, 40]), max_tokens=1)
            penalty = rng.choice([0.0, 0.0, 0.0, 1.0])
            params = SamplingParams(max_tokens=rng.randrange(1, 11), presence_penalty=penalty)
            request = replace(request, params=params, priority=rng.choice([0, 0, 1]))
            expected[name] = undisturbed_on(engine, request)
            engine.submit(request)
        if rng.random() < 0.1 and expected:
            name = f"r{rng.randrange(len(expected))}"
            if engine.cancel(RequestId(name)):
                cancelled.add(name)
        if rng.random() < 0.2 and (blocks := engine.kv.allocate(rng.randrange(4))) is not None:
            strangers.append(blocks)
            for block in blocks:
                executor.memory.block(block)[:] = rng.randbytes(executor.layout.block_bytes)
        if strangers and (rng.random() < 0.3 or i == 149):
            engine.kv.release(strangers.pop(rng.randrange(len(strangers))))
        held = [block for blocks in strangers for block in blocks]
        for output in step(engine, held):
            outputs.setdefault(output.request_id, []).append(output)
    for blocks in strangers:
        engine.kv.release(blocks)
    for name, rest in finish(engine).items():
        outputs.setdefault(name, []).extend(rest)
    for name, whole in expected.items():
        if name not in cancelled:
            assert tokens(outputs[name]) == whole, name
    assert engine.kv.num_free == engine.kv.num_blocks


def undisturbed_on(engine: Engine, request: Request) -> list[int]:
    """What an engine of the same sizes gives with nothing else to do."""
    layout = engine.executor.layout
    alone, _ = make_engine(
        num_blocks=engine.kv.num_blocks,
        block_size=layout.block_size,
        vocab_size=100,
        eos_token_ids=engine.executor.eos_token_ids,
    )
    alone.submit(request)
    return tokens(finish(alone)[request.id])


@pytest.mark.parametrize("max_in_flight", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_nobody_starves_requests_of_one_priority_are_admitted_in_order(seed: int, max_in_flight: int) -> None:
    """A stream of short prompts never overtakes a long one that came before, however small the pool."""
    rng = random.Random(seed)
    engine, _ = make_engine(
        num_blocks=12, block_size=2, max_num_seqs=4, max_batch_tokens=8, max_in_flight=max_in_flight
    )
    admitted: dict[int, list[int]] = {0: [], 1: []}
    num_submitted = num_finished = num_preempted = 0
    while engine.has_work or num_submitted < 200:
        if num_submitted < 200 and rng.random() < 0.7:
            num_tokens = 20 if rng.random() < 0.2 else 2
            request = make_request(str(num_submitted), num_tokens, first=rng.randrange(20, 900), max_tokens=3)
            engine.submit(replace(request, priority=int(rng.random() < 0.1)))
            num_submitted += 1
        scheduled = engine.schedule()
        if scheduled is not None:
            num_preempted += len(scheduled.preempted)
            for sequence in scheduled.started:
                if sequence.num_preemptions == 0:
                    admitted[sequence.request.priority].append(int(sequence.request.id))
            engine.start(scheduled)
        if scheduled is None or not engine.can_start:
            num_finished += sum(output.finish_reason is not None for output in engine.collect())
    assert num_finished == len(admitted[0]) + len(admitted[1]) == 200
    assert num_preempted
    for ids in admitted.values():
        assert ids == sorted(ids)


def test_the_next_step_is_planned_before_the_tokens_of_the_last_are_known() -> None:
    engine, executor = make_engine(max_in_flight=2)
    request = make_request("a", 5, max_tokens=4)
    engine.submit(request)
    turns = [step(engine) for _ in range(5)]
    assert [len(outputs) for outputs in turns] == [0, 1, 1, 1, 1]
    assert [output.token_id for outputs in turns for output in outputs] == undisturbed(request)
    assert executor.steps == [[("a", 0, 5)], [("a", 5, 1)], [("a", 6, 1)], [("a", 7, 1)]]
    assert not engine.has_work


def test_a_token_computed_after_an_end_token_is_never_seen_and_its_blocks_return_after_it() -> None:
    engine, executor = make_engine(
        max_in_flight=2, num_blocks=8, eos_token_ids=(500,), choose=lambda chunk: 500 if chunk.end == 6 else 30
    )
    engine.submit(make_request("a", 5, max_tokens=40))
    step(engine)
    step(engine)
    outputs = step(engine)
    assert [output.finish_reason for output in outputs] == [FinishReason.STOP]
    assert engine.num_in_flight == 1
    assert engine.kv.num_free < engine.kv.num_blocks
    assert step(engine) == []
    assert engine.kv.num_free == engine.kv.num_blocks
    assert executor.steps[-1] == [("a", 6, 1)]


def test_a_penalty_waits_for_the_tokens_it_counts() -> None:
    seen: list[int] = []

    def choose(chunk: Chunk) -> None:
        assert chunk.sample is not None
        seen.append(len(chunk.sample.token_ids) - chunk.end)

    engine, _ = make_engine(max_in_flight=2, choose=choose)
    engine.submit(make_request("a", 5, max_tokens=6, frequency_penalty=0.5))
    finish(engine)
    assert seen == [0] * 6


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_a_prefix_that_comes_several_times_at_once_is_computed_once(max_in_flight: int) -> None:
    engine, executor = make_engine(
        num_blocks=1000, vocab_size=1000, max_model_len=900, max_batch_tokens=800, max_in_flight=max_in_flight
    )
    requests = [make_request(name, num_tokens) for name, num_tokens in (("a", 500), ("b", 520), ("c", 540))]
    for request in requests:
        engine.submit(request)
    outputs = finish(engine)
    prompts = [(name, start) for each in executor.steps for name, start, count in each if count > 1]
    assert prompts == [("a", 0), ("b", 500), ("c", 500)]
    for request in requests:
        assert len(tokens(outputs[request.id])) == 4


def test_a_prompt_to_be_handed_over_is_not_decoded_meanwhile() -> None:
    engine, executor = make_engine(max_in_flight=2)
    engine.submit(make_request("a", 5), decodes=False)
    assert step(engine) == []
    assert len(step(engine)) == 1
    engine.kv.release(engine.detach(RequestId("a")))
    assert executor.steps == [[("a", 0, 5)]]
    assert engine.kv.num_free == engine.kv.num_blocks
