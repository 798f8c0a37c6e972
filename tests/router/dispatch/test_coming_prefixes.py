"""What is believed of prompts on their way."""

import gc

import pytest

from engine.kv.block_hash import SAMPLE_TOKENS, sampled
from engine.kv.events import KvEvent
from router.coming_prefixes import ComingPrefixes, ComingPrompt
from router.placement import Placed
from tests.router.dispatch.workers import BLOCK, Cluster

STRIDE = SAMPLE_TOKENS // BLOCK


def chain(num_blocks: int, first: int = 0) -> list[int]:
    return list(range(first, first + num_blocks))


def expect(coming: ComingPrefixes, worker_id: str, hashes: list[int], seconds: float = 1.0, now: float = 0.0) -> None:
    coming.expect(worker_id, sampled(hashes, BLOCK), seconds, now)


def found(coming: ComingPrefixes, hashes: list[int], now: float = 0.0) -> dict[str, int]:
    return coming.find(sampled(hashes, BLOCK), BLOCK, now)


def test_of_each_worker_the_longest_beginning_that_it_computes_is_found() -> None:
    coming = ComingPrefixes()
    prompt = chain(10 * STRIDE)
    expect(coming, "p0", prompt[: 4 * STRIDE + 3])
    expect(coming, "p1", prompt[: 2 * STRIDE] + chain(90, 10_000))
    assert found(coming, prompt) == {"p0": 4 * SAMPLE_TOKENS, "p1": 2 * SAMPLE_TOKENS}
    assert found(coming, prompt[: 3 * STRIDE - 1]) == {"p0": 2 * SAMPLE_TOKENS, "p1": 2 * SAMPLE_TOKENS}
    assert found(coming, prompt[: STRIDE - 1]) == {}
    assert found(coming, chain(400, 20_000)) == {}
    assert coming.find(chain(5), 2048, 0.0) == {}
    coming.expect("p2", sampled(chain(5), 2048), 1.0, 0.0)
    assert coming.find(chain(7), 2048, 0.0) == {"p2": 5 * 2048}


def test_it_is_believed_until_two_seconds_after_the_first_token_is_expected_and_leaves_nothing() -> None:
    coming = ComingPrefixes()
    prompt = chain(4 * STRIDE)
    expect(coming, "p0", prompt[: 2 * STRIDE], 5.0)
    expect(coming, "p0", prompt[:STRIDE], 50.0)  # no news
    expect(coming, "p0", prompt, 9.0, 1.0)
    expect(coming, "p1", prompt[:STRIDE], 7.0)
    assert found(coming, prompt, 6.9) == {"p0": 4 * SAMPLE_TOKENS, "p1": SAMPLE_TOKENS}
    assert found(coming, prompt[: 2 * STRIDE], 7.0) == {"p1": SAMPLE_TOKENS}
    assert found(coming, prompt, 11.9) == {"p0": 4 * SAMPLE_TOKENS}
    assert found(coming, prompt, 12.0) == {}
    assert (coming._prompts, coming._ends) == ({}, [])


def test_what_is_only_heard_of_and_never_asked_for_leaves_nothing_either() -> None:
    coming = ComingPrefixes()
    for second in range(100):
        expect(coming, "p0", chain(STRIDE, 1000 * second), 1.0, float(second))
    assert len(coming._ends) == len(coming._prompts) == 3


def test_prompts_that_are_over_leave_no_garbage_in_cycles() -> None:
    gc.collect()
    gc.disable()
    try:
        coming = ComingPrefixes()
        expect(coming, "p0", chain(STRIDE))
        assert sum(type(each) is ComingPrompt for each in gc.get_objects()) == 1
        assert found(coming, chain(STRIDE), 3.0) == {}
        assert not any(type(each) is ComingPrompt for each in gc.get_objects())
    finally:
        gc.enable()


def test_a_worker_that_lost_its_cache_is_about_to_hold_nothing() -> None:
    coming = ComingPrefixes()
    prompt = chain(2 * STRIDE)
    expect(coming, "p0", prompt)
    expect(coming, "p1", prompt[:STRIDE])
    coming.forget("p0")
    assert found(coming, prompt) == {"p1": SAMPLE_TOKENS}
    assert found(coming, prompt, 2.9) == {"p1": SAMPLE_TOKENS}
    assert found(coming, prompt, 3.0) == {}
    assert (coming._prompts, coming._ends) == ({}, [])


def test_what_other_workers_compute_ends_in_its_order_after_one_has_lost_its_cache() -> None:
    coming = ComingPrefixes()
    for number in range(20):
        expect(coming, f"p{number % 2}", chain(STRIDE, 1000 * number), float((7 * number) % 20))
    coming.forget("p0")
    for now in range(2, 22):
        found(coming, [], float(now))
        assert len(coming._ends) == len(coming._prompts) == sum(1 for n in range(1, 20, 2) if (7 * n) % 20 + 2 > now)


def test_that_many_are_over_is_noticed_bit_by_bit() -> None:
    coming = ComingPrefixes()
    for number in range(40):
        expect(coming, "p0", chain(STRIDE, 1000 * number))
    found(coming, [], 3.0)
    assert len(coming._ends) == 36


def test_of_a_prompt_computed_everywhere_some_workers_are_remembered() -> None:
    coming = ComingPrefixes()
    prompt = chain(STRIDE)
    for number in range(20):
        expect(coming, f"p{number}", prompt)
    assert found(coming, prompt) == {f"p{number}": SAMPLE_TOKENS for number in range(12, 20)}
    for _ in range(4):  # that so many are over is noticed bit by bit
        found(coming, prompt, 3.0)
    assert found(coming, prompt, 3.0) == {}


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
            assert placed.decision.hit_tokens == 16_000 // SAMPLE_TOKENS * SAMPLE_TOKENS
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


@pytest.mark.parametrize("ended", ["cancelled", "failed", "answered"])
def test_they_do_not_follow_one_whose_prompt_was_not_computed(ended: str) -> None:
    it = Cluster(["p0", "d0"])
    first = it.place(1600, chain(1600 // BLOCK))
    if ended == "failed":
        it.placement.put_back(first.candidate)
        (again,) = it.pump()
        assert (again.decision.prefill, again.decision.hit_tokens) == ("p0", 0)
        it.placement.release(first.candidate)
    else:
        it.placement.release(first.candidate, 5 if ended == "answered" else None)
    placed = it.place(1600, chain(1600 // BLOCK))
    assert placed.decision.hit_tokens == (1536 if ended == "answered" else 0)
    assert len(it.placement._computed) == (ended != "answered")  # the last one's, where it is to compute anything


def test_a_cache_that_was_cleared_is_not_about_to_hold_anything() -> None:
    it = Cluster(["p0", "d0"])
    it.place(1600, chain(1600 // BLOCK))
    it.placement.apply("p0", KvEvent(cleared=True))
    assert it.place(1600, chain(1600 // BLOCK)).decision.hit_tokens == 0


def test_what_is_cached_and_what_comes_are_not_added_up() -> None:
    it = Cluster(["p0", "d0"])
    prompt = chain(3200 // BLOCK)
    it.placement.apply("p0", KvEvent(stored=tuple(prompt[: 1024 // BLOCK])))
    it.place(2048, prompt[: 2048 // BLOCK])
    assert it.place(3200, prompt).decision.hit_tokens == 2048
    assert sorted(it.placement._coming._prompts) == [95, 127, 159, 191]  # of both, what was not known before


def test_one_that_waits_in_a_queue_is_believed_for_as_long() -> None:
    it = Cluster(["p0", "d0"])
    it.report("p0", queue_s=10.0)
    it.report("d0", num_running=1)
    it.place(1600, chain(1600 // BLOCK))
    it.clock.now += 5.0
    assert it.place(1600, chain(1600 // BLOCK)).decision.hit_tokens == 1536
    it.clock.now += 60.0
    assert it.place(1600, chain(1600 // BLOCK)).decision.hit_tokens == 0


def test_they_follow_one_that_came_through_another_router() -> None:
    it = Cluster([f"p{i}" for i in range(4)] + ["d0", "d1"])
    document = chain(16_000 // BLOCK)
    it.place(400, chain(400 // BLOCK, 50_000))
    it.report("p2", queue_s=1.0)
    it.placement.expect("p2", sampled(document, BLOCK))
    placed = it.place(16_160, document + chain(10, 60_000))
    assert (placed.decision.prefill, placed.decision.hit_tokens) == ("p2", 16_000 // SAMPLE_TOKENS * SAMPLE_TOKENS)
    it.clock.now += 3.1  # after its queue, and the two seconds
    for worker_id in it.ids:
        it.report(worker_id)
    assert it.place(16_160, document + chain(10, 70_000)).decision.hit_tokens == 0
