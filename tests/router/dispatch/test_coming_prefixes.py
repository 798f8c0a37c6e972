"""What is believed of prompts on their way."""

import gc
import weakref

import pytest

from router.coming_prefixes import STRIDE_TOKENS, ComingPrefixes
from router.placement import Placed
from tests.router.dispatch.workers import BLOCK, Cluster

PER_STRIDE = STRIDE_TOKENS // BLOCK


def chain(num_blocks: int, first: int = 0) -> list[int]:
    return list(range(first, first + num_blocks))


def found(coming: ComingPrefixes, hashes: list[int], now: float = 0.0, block_size: int = BLOCK) -> dict[str, int]:
    return coming.find(hashes, block_size, now)


def test_of_each_worker_the_longest_beginning_that_it_computes_is_found() -> None:
    coming = ComingPrefixes()
    prompt = chain(10 * PER_STRIDE)
    coming.placed("p0", prompt[: 4 * PER_STRIDE + 3], BLOCK, 0, 1.0, 0.0)
    coming.placed("p1", prompt[: 2 * PER_STRIDE] + chain(90, 10_000), BLOCK, 0, 1.0, 0.0)
    assert found(coming, prompt) == {"p0": 4 * STRIDE_TOKENS, "p1": 2 * STRIDE_TOKENS}
    assert found(coming, prompt[: 3 * PER_STRIDE - 1]) == {"p0": 2 * STRIDE_TOKENS, "p1": 2 * STRIDE_TOKENS}
    assert found(coming, prompt[: PER_STRIDE - 1]) == {}
    assert found(coming, chain(400, 20_000)) == {}


def test_what_was_cached_before_is_the_indexs_to_say() -> None:
    coming = ComingPrefixes()
    prompt = chain(4 * PER_STRIDE)
    coming.placed("p0", prompt, BLOCK, 2 * STRIDE_TOKENS + 16, 1.0, 0.0)
    assert found(coming, prompt[: 2 * PER_STRIDE]) == {}
    assert found(coming, prompt) == {"p0": 4 * STRIDE_TOKENS}


def test_it_is_believed_until_two_seconds_after_the_first_token_is_expected_and_leaves_nothing() -> None:
    coming = ComingPrefixes()
    prompt = chain(4 * PER_STRIDE)
    coming.placed("p0", prompt, BLOCK, 0, 5.0, 0.0)
    coming.placed("p0", prompt[: 2 * PER_STRIDE], BLOCK, 0, 9.0, 1.0)
    coming.placed("p0", prompt[:PER_STRIDE], BLOCK, 0, 1.0, 1.0)
    assert found(coming, prompt, 6.9) == {"p0": 4 * STRIDE_TOKENS}
    assert found(coming, prompt, 7.0) == {"p0": 2 * STRIDE_TOKENS}
    assert found(coming, prompt, 12.0) == {}
    assert (coming._prompts, coming._ends) == ({}, [])


def test_prompts_that_are_over_leave_no_garbage_in_cycles() -> None:
    coming = ComingPrefixes()
    coming.placed("p0", chain(PER_STRIDE), BLOCK, 0, 1.0, 0.0)
    prompt = weakref.ref(coming._ends[0][2])
    gc.disable()
    try:
        assert found(coming, chain(PER_STRIDE), 3.0) == {}
        assert prompt() is None
    finally:
        gc.enable()


def test_a_worker_that_lost_its_cache_is_about_to_hold_nothing() -> None:
    coming = ComingPrefixes()
    prompt = chain(2 * PER_STRIDE)
    coming.placed("p0", prompt, BLOCK, 0, 1.0, 0.0)
    coming.placed("p1", prompt[:PER_STRIDE], BLOCK, 0, 1.0, 0.0)
    coming.forget("p0")
    assert found(coming, prompt) == {"p1": STRIDE_TOKENS}
    assert found(coming, prompt, 2.9) == {"p1": STRIDE_TOKENS}
    assert found(coming, prompt, 3.0) == {}
    assert (coming._prompts, coming._ends) == ({}, [])


def test_of_a_prompt_computed_everywhere_some_workers_are_remembered() -> None:
    coming = ComingPrefixes()
    prompt = chain(PER_STRIDE)
    for number in range(20):
        coming.placed(f"p{number}", prompt, BLOCK, 0, 1.0, 0.0)
    assert found(coming, prompt) == {f"p{number}": STRIDE_TOKENS for number in range(12, 20)}
    assert found(coming, prompt, 3.0) == {}


@pytest.mark.parametrize("block_size", [48, 2048])
def test_block_sizes_that_do_not_divide_the_stride(block_size: int) -> None:
    coming = ComingPrefixes()
    prompt = chain(8192 // block_size)
    coming.placed("p0", prompt, block_size, 0, 1.0, 0.0)
    ((_, num_tokens),) = found(coming, prompt, block_size=block_size).items()
    assert 8192 - max(STRIDE_TOKENS, block_size) < num_tokens <= 8192
    assert num_tokens % block_size == 0


def test_requests_that_come_together_and_begin_alike_follow_the_first() -> None:
    it = Cluster([f"p{i}" for i in range(4)] + ["d0", "d1"])
    document = chain(16_000 // BLOCK)
    it.place(400, chain(400 // BLOCK, 50_000))  # so that workers are not idle: each second of work has its price
    for number in range(6):
        placed = it.place(16_160, document + chain(10, 60_000 + 100 * number))
        if number == 0:
            first = placed.decision.prefill
            assert placed.decision.hit_tokens == 0
        else:
            assert placed.decision.prefill == first
            assert placed.decision.hit_tokens == 16_000 // STRIDE_TOKENS * STRIDE_TOKENS
            assert placed.on_prefill.prefill_past == placed.decision.hit_tokens


def test_they_do_not_follow_it_to_a_worker_that_has_come_anew() -> None:
    it = Cluster(["p0", "d0"])
    document = chain(1600 // BLOCK)
    assert it.place(1600, document).decision.hit_tokens == 0
    it.attach("p0")
    it.report("p0")
    placed = it.place(1600, document)
    assert isinstance(placed, Placed)
    assert placed.decision.hit_tokens == 0
