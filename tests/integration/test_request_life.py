"""However a request ends, at whatever point: every block returns on both sides, and others are undisturbed.

Over simulated executors, whose tokens depend on the KV bytes they find, so wrong KV shows as wrong tokens.
"""

import asyncio
import contextlib
import itertools
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from engine.engine import Engine
from engine.errors import InvalidRequest
from engine.executors.simulated import SimulatedConfig, SimulatedExecutor
from engine.request import FinishReason, Request, RequestId, SamplingParams
from engine.scheduler import SchedulerConfig
from kv_transfer.host_copier import HostCopier
from router.dispatcher import DispatcherConfig
from router.generation import DeadlineExceeded, GenerationStream
from router.session import SessionConfig
from tests.integration.harness import Cluster, running_cluster

CONFIG = SimulatedConfig(
    prefill_tokens_per_s=50_000, step_base_s=0.001, decode_s_per_sequence=0.0, vocab_size=1000, num_blocks=512
)


def executor(_role: str) -> SimulatedExecutor:
    return SimulatedExecutor(CONFIG, time.sleep)


def undisturbed(prompt: Sequence[int], params: SamplingParams) -> list[int]:
    """What one engine gives, with nothing moved."""
    engine = Engine(SimulatedExecutor(CONFIG, lambda _s: None), SchedulerConfig(), secret="", model="model")
    engine.submit(Request(RequestId("alone"), tuple(prompt), len(prompt), params, seed=0))
    tokens = []
    while (scheduled := engine.schedule()) is not None:
        tokens += [token.token_id for token in engine.run(scheduled)]
    return tokens


def prompt_of(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(length)]


PARAMS = SamplingParams(max_tokens=40, temperature=0.0)


async def test_streams_equal_an_undisturbed_run() -> None:
    prompts = [prompt_of(length, length) for length in (1, 15, 16, 17, 100, 400, 33, 64)]
    async with running_cluster(executor, num_prefill=2, num_decode=2, prefill_tokens=64) as cluster:
        got = await asyncio.gather(*(cluster.generate(prompt, PARAMS) for prompt in prompts))
        assert got == [undisturbed(prompt, PARAMS) for prompt in prompts]
        await cluster.quiesce()


async def test_a_request_that_ends_with_its_first_token_needs_no_decode_worker() -> None:
    async with running_cluster(executor) as cluster:
        stream = cluster.start(prompt_of(50, 1), SamplingParams(max_tokens=1))
        deltas = [delta async for delta in stream]
        assert deltas[-1].finish_reason == FinishReason.LENGTH
        assert stream.timeline.transfer_blocks == 0
        await cluster.quiesce()


async def test_a_stop_token_sampled_first_ends_the_request_on_both_sides() -> None:
    prompt = prompt_of(80, 2)
    first = undisturbed(prompt, PARAMS)[0]
    async with running_cluster(executor) as cluster:
        params = SamplingParams(max_tokens=40, stop_token_ids=(first,))
        deltas = [delta async for delta in cluster.start(prompt, params)]
        assert [token for delta in deltas for token in delta.token_ids] == [first]
        assert deltas[-1].finish_reason == FinishReason.STOP
        await cluster.quiesce()


@pytest.mark.parametrize("transport", ["shared_memory", "tcp"])
async def test_leaving_at_any_moment_returns_every_block(transport: str) -> None:
    """Clients leave after delays that cover queue, prefill, handoff and decode; those who stay are undisturbed."""
    rng = random.Random(5)
    stays = [prompt_of(200, 1000 + i) for i in range(6)]
    async with running_cluster(executor, transport=transport, prefill_tokens=32) as cluster:

        async def leave(delay: float, seed: int) -> None:
            stream = cluster.start(prompt_of(300, seed), PARAMS)
            await asyncio.sleep(delay)
            await stream.aclose()

        leavers = [leave(rng.random() * 0.4, i) for i in range(60)]
        got, *_ = await asyncio.gather(asyncio.gather(*(cluster.generate(p, PARAMS) for p in stays)), *leavers)
        assert got == [undisturbed(prompt, PARAMS) for prompt in stays]
        await cluster.quiesce()


async def test_a_decode_worker_tells_how_long_kv_takes_to_come_and_the_prefill_worker_tells_nothing() -> None:
    async with running_cluster(executor) as cluster:
        assert cluster.decode[0].loop.current_load().transfer_token_s == 0.0
        streams = [cluster.start(prompt_of(400, seed), PARAMS) for seed in range(8)]
        for stream in streams:
            assert [delta async for delta in stream]
        await cluster.quiesce()
        told = cluster.decode[0].loop.current_load()
        copied = sum(stream.timeline.transfer_s for stream in streams)
        assert 0.0 < told.transfer_token_s < 1.5 * copied / (8 * 400)  # pulls that ran at once share the time
        assert told.num_pull_tokens == 0
        assert cluster.prefill[0].loop.current_load().transfer_token_s == 0.0


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 20])
async def test_leaving_after_some_tokens_returns_every_block(num_tokens: int) -> None:
    async with running_cluster(executor) as cluster:
        stream = cluster.start(prompt_of(100, 9), PARAMS)
        received = 0
        while received < num_tokens:
            received += len((await anext(aiter(stream))).token_ids)
        await stream.aclose()
        await cluster.quiesce()


async def test_a_request_no_engine_can_serve_is_refused_by_name_and_leaves_nothing() -> None:
    async with running_cluster(executor) as cluster:
        with pytest.raises(InvalidRequest) as caught:
            await cluster.generate([5, 2000], PARAMS)
        assert caught.value.param == "prompt"
        await cluster.quiesce()


async def test_salted_requests_share_no_blocks_with_others() -> None:
    prompt = prompt_of(160, 3)
    async with running_cluster(executor) as cluster:

        async def cached_tokens(salt: str) -> int:
            stream = cluster.start(prompt, PARAMS, cache_salt=salt)
            async for _ in stream:
                pass
            return stream.timeline.cached_tokens

        assert [await cached_tokens(salt) for salt in ("", "", "a", "a", "")] == [0, 144, 0, 144, 144]


async def test_a_worker_that_is_gone_is_replaced_in_mid_stream() -> None:
    prompts = [prompt_of(150, 50 + i) for i in range(8)]
    async with running_cluster(executor, num_prefill=2, num_decode=2) as cluster:
        streams = [cluster.start(prompt, PARAMS) for prompt in prompts]

        async def consume(stream: object) -> list[int]:
            return [token for delta in [d async for d in stream] for token in delta.token_ids]  # type: ignore[attr-defined]

        tasks = [asyncio.create_task(consume(stream)) for stream in streams]
        await asyncio.sleep(0.03)
        await cluster.decode[0].stop()
        await cluster.prefill[0].stop()
        assert await asyncio.gather(*tasks) == [undisturbed(prompt, PARAMS) for prompt in prompts]
        await quiesce_rest(cluster)


async def quiesce_rest(cluster: Cluster) -> None:
    cluster.prefill, cluster.decode = cluster.prefill[1:], cluster.decode[1:]
    await cluster.quiesce()


async def test_a_deadline_ends_a_request_wherever_it_is_and_returns_its_blocks() -> None:
    async with running_cluster(executor, prefill_tokens=16) as cluster:
        streams = [cluster.start(prompt_of(400, i), PARAMS, timeout_s=0.05 + 0.05 * i) for i in range(8)]

        async def outcome(stream: GenerationStream) -> bool:
            with contextlib.suppress(DeadlineExceeded):
                async for _ in stream:
                    pass
                return True
            return False

        finished = await asyncio.gather(*map(outcome, streams))
        assert not finished[0]
        await cluster.quiesce()


async def test_a_draining_worker_finishes_what_it_has() -> None:
    prompt = prompt_of(100, 77)
    async with running_cluster(executor) as cluster:
        stream = cluster.start(prompt, PARAMS)
        tokens: list[int] = []
        while len(tokens) < 5:  # the decode worker has it
            tokens += (await anext(aiter(stream))).token_ids
        draining = asyncio.create_task(cluster.decode[0].thread.drain(10))
        tokens += [token for delta in [d async for d in stream] for token in delta.token_ids]
        await draining
        assert tokens == undisturbed(prompt, PARAMS)
        assert stream.timeline.attempts == 1


async def test_an_offer_leaves_before_the_first_chunk_is_computed() -> None:
    """The decode worker links up while prefill computes; one chunk must not hold that back."""
    slow = replace(CONFIG, prefill_tokens_per_s=2000)
    async with running_cluster(lambda _role: SimulatedExecutor(slow, time.sleep)) as cluster:
        stream = cluster.start(prompt_of(400, 4), PARAMS)  # one step of 0.2 s
        first = asyncio.ensure_future(anext(aiter(stream)))
        async with asyncio.timeout(5):
            while not cluster.decode[0].loop.current_load().num_handoffs and not first.done():  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        assert not first.done(), "the handoff began only after the first token"
        await first
        await stream.aclose()
        await cluster.quiesce()


async def test_a_worker_that_hangs_in_its_first_step_is_found_and_its_requests_go_elsewhere() -> None:
    hang, go, made = threading.Event(), threading.Event(), itertools.count()

    def make(role: str) -> SimulatedExecutor:
        is_victim = role == "prefill" and next(made) == 0

        def sleep(seconds: float) -> None:
            if is_victim and hang.is_set():
                go.wait(30)
            time.sleep(seconds)

        return SimulatedExecutor(CONFIG, sleep)

    config = DispatcherConfig(session=SessionConfig(stall_s=0.8))
    async with running_cluster(make, num_prefill=2, dispatcher=config) as cluster:
        hang.set()
        prompts = [prompt_of(64, 200 + i) for i in range(4)]
        try:
            got = await asyncio.gather(*(cluster.generate(prompt, PARAMS) for prompt in prompts))
        finally:
            go.set()
        assert got == [undisturbed(prompt, PARAMS) for prompt in prompts]
        assert cluster.dispatcher.counters.sessions_lost == 1


async def test_a_pull_that_breaks_in_an_unforeseen_way_costs_an_attempt_not_the_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompt, broken = prompt_of(64, 5), iter([True])
    fetch = HostCopier.fetch

    def break_once(self: HostCopier, *args: Any) -> Any:
        if next(broken, False):
            raise ValueError("unforeseen")
        return fetch(self, *args)

    monkeypatch.setattr(HostCopier, "fetch", break_once)
    async with running_cluster(executor) as cluster:
        stream = cluster.start(prompt, PARAMS)
        tokens = [token for delta in [d async for d in stream] for token in delta.token_ids]
        assert tokens == undisturbed(prompt, PARAMS)
        assert stream.timeline.attempts == 2
        await cluster.quiesce()


async def test_a_prompt_beyond_a_workers_room_is_refused_with_the_code_clients_know() -> None:
    small = replace(CONFIG, num_blocks=8)
    async with running_cluster(lambda _role: SimulatedExecutor(small, time.sleep)) as cluster:
        with pytest.raises(InvalidRequest) as caught:
            await cluster.generate(prompt_of(128, 6), PARAMS)
        assert caught.value.code == "context_length_exceeded"


async def test_a_tenant_who_fills_the_prefill_workers_queue_does_not_keep_others_waiting() -> None:
    slow = replace(CONFIG, prefill_tokens_per_s=20_000, num_blocks=4096)  # 20 ms for each prompt, and room for all

    async def first_token_at(stream: GenerationStream) -> float:
        await anext(stream)  # type: ignore[call-overload]
        at = time.monotonic()
        await stream.aclose()
        return at

    async with running_cluster(lambda _role: SimulatedExecutor(slow, time.sleep), prefill_tokens=400) as cluster:
        crowd = [
            asyncio.create_task(first_token_at(cluster.start(prompt_of(400, seed), PARAMS, tenant="a")))
            for seed in range(30)
        ]
        await crowd[2]
        began = time.monotonic()
        other = await first_token_at(cluster.start(prompt_of(400, 99), PARAMS, tenant="b"))
        times = await asyncio.gather(*crowd)
        assert sum(at > began for at in times) > 15, "a's queue is too short for the test"
        assert sum(began < at < other for at in times) < 8
        await cluster.quiesce()
