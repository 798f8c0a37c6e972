"""Early rejection by what is predicted for the end of prefill."""

import random
from collections import deque

import pytest

from router.cluster_view import Reservation
from router.costs import Column
from router.policies import PrefixAware, Reject, RequestFacts, RoutingDecision
from router.worker_table import WorkerTable
from tests.router.dispatch.workers import MODEL, choose, facts, view, worker


def outcome(table: WorkerTable, now: float = 0.0, **changes) -> RoutingDecision | Reject | None:
    table.now = now
    return choose(PrefixAware(local_prefill_max_tokens=64), facts(**changes), {}, table)


def test_a_request_that_no_queue_lets_through_in_time_is_rejected():
    table = view(worker("p0", queue_s=2.0), worker("p1", queue_s=1.0), worker("d0"))
    assert outcome(table, ttft_s=2.1).prefill == "p1"
    assert isinstance(outcome(table, ttft_s=1.9), Reject)
    assert isinstance(outcome(table, now=0.3, ttft_s=2.1), Reject)  # it has waited
    assert outcome(table).prefill == "p1"


def test_a_worker_that_is_late_is_not_used_even_if_it_costs_the_least():
    table = view(worker("p0", queue_s=1.5), worker("p1", queue_s=0.0), worker("d0"))
    cached = {"p0": 992}
    table.now = 0.0
    slow = choose(PrefixAware(local_prefill_max_tokens=64), facts(ttft_s=1.2), cached, table)
    assert (slow.prefill, slow.ttft_s) == ("p1", pytest.approx(1.01, abs=0.001))


def test_a_prompt_that_a_decode_worker_can_prefill_in_time_is_not_rejected():
    table = view(worker("p0", queue_s=9.0), worker("d0"))
    assert outcome(table, num_tokens=50, ttft_s=0.5).prefill is None
    assert isinstance(outcome(table, num_tokens=500, ttft_s=0.6), Reject)
    busy = view(worker("p0", queue_s=9.0), worker("d0", num_seqs=1))  # any prompt may be prefilled here: 0.51 s
    assert isinstance(choose(PrefixAware(), facts(500, ttft_s=0.4), {}, busy), Reject)
    assert choose(PrefixAware(), facts(500, ttft_s=0.6), {}, busy).prefill is None


@pytest.mark.parametrize("limits", [{"ttft_s": 0.5}, {"tpot_s": 0.001}])
def test_idle_workers_refuse_nothing_so_a_wrong_model_cannot_refuse_for_ever(limits):
    for model in (MODEL, None):
        assert outcome(view(worker("p0", model=model), worker("d0", model=model)), **limits).prefill == "p0"
    busy = [worker("p0", queue_s=1.0), worker("d0", num_seqs=1), worker("d1", num_seqs=1)]
    assert isinstance(outcome(view(*busy), **limits), Reject)


def test_a_request_that_would_make_every_decode_worker_too_slow_is_rejected():
    table = view(worker("p0"), worker("d0", num_seqs=60), worker("d1", num_seqs=50))
    table.demand.mean_output = 1e9  # nobody ends before the prefill does
    assert outcome(table, tpot_s=0.065).decode == "d1"
    assert isinstance(outcome(table, tpot_s=0.055), Reject)


def test_sequences_that_end_before_prefill_does_make_room():
    table = view(worker("p0", queue_s=20.0), worker("d0", num_seqs=60))
    table.demand.mean_output = 1e9
    assert isinstance(outcome(table, tpot_s=0.04), Reject)
    table.demand.mean_output = 100.0
    assert outcome(table, tpot_s=0.04).decode == "d0"
    alone = view(worker("d0", num_seqs=60))  # prefills it at once: until then nobody ends
    alone.demand.mean_output = 100.0
    assert isinstance(outcome(alone, tpot_s=0.04), Reject)


def test_without_room_a_request_waits_until_it_cannot_be_in_time():
    table = view(worker("p0", queue_s=1.0), worker("d0", num_seqs=96))
    assert outcome(table, ttft_s=3.0) is None
    assert isinstance(outcome(table, now=1.5, ttft_s=3.0), Reject)
    assert outcome(table, now=1.5) is None


def test_a_request_that_only_full_workers_can_serve_in_time_keeps_nobody_from_the_others():
    quick, slow = worker("d0", num_seqs=40, num_free_blocks=0), worker("d1", num_seqs=60)
    table = view(worker("p0"), quick, slow)
    table.demand.mean_output = 1e9
    assert outcome(table).decode == "d1"
    assert isinstance(outcome(table, tpot_s=0.06), Reject)
    assert outcome(view(worker("p0"), quick), tpot_s=0.06) is None


def test_a_request_that_has_no_time_to_keep_is_never_rejected():
    table = view(worker("p0", queue_s=900.0), worker("d0", num_seqs=90))
    assert isinstance(outcome(table), RoutingDecision)


class Naive:
    """Looks at what decodes now, as Mooncake's first rule did."""

    def admits(self, table: WorkerTable, asked: RequestFacts) -> bool:
        pool = table.decode
        return bool(
            pool[Column.BASE_S][0] + pool[Column.DECODE_S][0] * (pool[Column.NUM_RUNNING][0] + 1) <= asked.tpot_s
        )


class Predicting:
    def admits(self, table: WorkerTable, asked: RequestFacts) -> bool:
        return isinstance(choose(PrefixAware(local_prefill_max_tokens=64), asked, {}, table), RoutingDecision)


def decoding_over_time(rule: Naive | Predicting) -> list[int]:
    """Sequences that decode, every 0.1 s. A request comes each time; its prefill takes 10 s on one of many workers, and
    its answer has 1,000 tokens on average. 40 of them decode within the limit of 50 ms a token."""
    rng = random.Random(0)
    on_their_way: deque[float] = deque()
    decoding: list[float] = []  # tokens left
    counts = []
    asked = facts(num_tokens=10_000, max_new_tokens=1000, tpot_s=0.05)
    for tick in range(6000):
        now = tick * 0.1
        while on_their_way and on_their_way[0] <= now:
            on_their_way.popleft()
            decoding.append(rng.expovariate(1 / 1000))
        step = MODEL.base_s + MODEL.decode_s * len(decoding)
        decoding = [left - 0.1 / step for left in decoding if left > 0.1 / step]
        decode = worker("d0", num_seqs=len(decoding))
        for number in range(len(on_their_way)):
            decode.reserve(number, Reservation(blocks=1))
        table = view(decode, worker("p0"))
        table.demand.mean_output = 1000.0
        if rule.admits(table, asked):
            on_their_way.append(now + 10.0)
        counts.append(len(decoding))
    return counts[1000:]


def test_rejection_does_not_swing_with_the_delay_of_prefill_as_the_naive_rule_does():
    naive, predicting = decoding_over_time(Naive()), decoding_over_time(Predicting())
    assert max(naive) > 2.5 * 40
    assert 0.7 * 40 < min(predicting) < max(predicting) < 1.15 * 40  # lengths are random, so it cannot be exact
    assert max(naive) - min(naive) > 5 * (max(predicting) - min(predicting))
