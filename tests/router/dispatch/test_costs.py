import dataclasses

import numpy as np
import pytest

from engine.step_model import StepWork, num_pairs
from router.cluster_view import Reservation, WorkerState
from router.costs import decode_cost, prefill_cost, work_price
from router.demand import Rate
from router.policies import PrefixAware
from tests.router.dispatch.workers import MODEL, choose, facts, view, worker


def test_work_is_what_the_workers_model_says_of_the_rest_of_the_prompt():
    attentive = dataclasses.replace(MODEL, pair_s=2.0**-20)
    pool = view(worker("p0", model=attentive), worker("p1", model=attentive)).prefill
    work, first = prefill_cost(pool.columns, 1000.0, np.array([1000.0, 200.0]), np.array([0.0, 2.0]))
    expected = [attentive.seconds(StepWork(num, num_pairs(num, past))) for num, past in ((1000, 0), (200, 800))]
    assert work == pytest.approx(expected, rel=1e-6)
    assert first == pytest.approx([expected[0], 2.0 + expected[1]], rel=1e-6)


def test_work_costs_others_the_more_the_fuller_the_pool():
    def others(least_queue: float, requests_per_s: float, busy: float) -> float:
        pool = view(worker("p0", queue_s=3.0), worker("p1", queue_s=least_queue)).prefill
        return work_price(pool.columns, requests_per_s, busy)

    assert others(0.0, 0.0, 0.0) == 0.0
    assert others(0.0, 2.0, 0.8) == pytest.approx(0.8, rel=1e-5)  # somebody is idle: nobody has to wait for it
    assert others(1.0, 2.0, 0.5) == pytest.approx(0.5 + 4.0, rel=1e-5)  # 2 a second during 2 s, each 1 s later
    assert others(1.0, 2.0, 0.8) == pytest.approx(0.8 + 10.0, rel=1e-5)
    assert others(1.0, 2.0, 2.0) == pytest.approx(1.0 + 20.0, rel=1e-5)  # bounded


def test_a_second_of_work_is_dearer_than_a_second_of_waiting_where_the_pool_is_full():
    def pick(table) -> str | None:
        return choose(PrefixAware(local_prefill_max_tokens=64), facts(), {"p0": 800}, table).prefill

    def table(queue: float):
        return view(worker("p0", queue_s=queue + 1.0), worker("p1", queue_s=queue), worker("d0"))

    assert pick(table(2.0)) == "p1"
    full = table(2.0)
    for number in range(120):
        full.demand.on_prefill.placed(0.9, 0.5 * number)
    full.now = 60.0
    assert pick(full) == "p0"
    assert pick(table(0.0)) == "p1"


def answer(state: WorkerState, needed: float, after: float, mean_output: float) -> tuple[float, float, float]:
    """Step, answers and waits, for a request of 1,000 tokens and 100 to come."""
    columns = view(state).decode.columns
    step, answers, waits = decode_cost(columns, 1000.0, 100.0, mean_output, np.array([needed]), np.array([after]))
    return float(step[0]), float(answers[0]), float(waits[0])


def test_a_step_of_a_decode_worker_is_predicted_for_the_end_of_prefill():
    busy = worker("d0", num_seqs=40)
    assert answer(busy, 0.0, 0.0, 1000.0)[0] == pytest.approx(0.01 + 0.041, rel=1e-5)
    assert answer(worker("d1"), 0.0, 0.0, 1000.0)[0] == pytest.approx(0.01 + 0.001, rel=1e-5)
    later = answer(busy, 0.0, 50.0, 1000.0)  # 1,000 steps of 50 ms: 1/e are left
    assert later[0] == pytest.approx(0.01 + 0.001 * (40 / np.e + 1), rel=1e-4)


def test_sequences_on_their_way_are_there_by_then():
    decode = worker("d0", num_seqs=10)
    for handle in range(5):
        decode.reserve(handle, Reservation(blocks=10))
    assert answer(decode, 0.0, 1e9, 1000.0)[0] == pytest.approx(0.01 + 0.006, rel=1e-5)


def test_a_newcomer_pays_for_its_own_steps_and_for_those_of_others():
    assert answer(worker("d0", num_seqs=40), 0.0, 0.0, 500.0)[1] == pytest.approx(
        100 * 0.051 + 40 * 0.001 * 500, rel=1e-5
    )
    assert answer(worker("d1"), 0.0, 0.0, 500.0)[1] == pytest.approx(100 * 0.011, rel=1e-5)


@pytest.mark.parametrize("num_steps", [100, 400])
def test_every_token_of_kv_takes_its_part_of_a_step(num_steps):
    """Of 20 sequences of 500 tokens, and half of the newcomer's answer; who has ended by then has not grown further."""
    kv_s = 2.0**-20
    heavy = dataclasses.replace(MODEL, kv_token_s=kv_s)
    after = num_steps * (0.01 + 20 * (0.001 + 500 * kv_s))
    step, answers, _ = answer(worker("d0", model=heavy, num_seqs=20, num_free_blocks=375), 0.0, after, 200.0)
    num_seqs = 20 * np.exp(-num_steps / 200)
    growth = 0.001 + kv_s * (1000 + 100 / 2)
    expected = 0.01 + num_seqs * (0.001 + kv_s * (500 + min(num_steps, 200))) + growth
    assert step == pytest.approx(expected, rel=1e-5)
    assert answers == pytest.approx(100 * expected + num_seqs * growth * 200, rel=1e-5)


def test_memory_that_is_not_free_by_then_is_waited_for():
    """500 tokens each of 20 sequences, of 16,000 in all."""
    state = worker("d0", num_seqs=20, num_free_blocks=375)
    step, _, fits = answer(state, 375.0, 0.0, 100.0)
    _, _, lacks = answer(state, 475.0, 0.0, 100.0)
    freed_per_s = 20 * 500 / (100 * step)
    others = 0.1 * 100 * step * 20 * 0.625 / 0.05  # a tenth more of the memory, of which nothing is left
    assert lacks - fits == pytest.approx(1600 / freed_per_s + others, rel=1e-5)
    _, _, too_much = answer(worker("d0"), 3000.0, 0.0, 100.0)
    assert too_much == pytest.approx(16_000 * 100 * 0.011, rel=1e-5)  # more than all never comes back


def test_memory_costs_others_the_more_the_fuller_it_is():
    """1,000 blocks, of which the request takes 100 for 100 steps."""

    def others(num_free_blocks: int, num_seqs: int = 10) -> float:
        state = worker("d0", num_seqs=num_seqs, num_free_blocks=num_free_blocks)
        free, taken = (answer(state, needed, 0.0, 100.0) for needed in (0.0, 100.0))
        assert free[0] == taken[0]
        return (taken[2] - free[2]) / (0.1 * 100 * free[0])

    assert others(1000) == 0.0  # nothing is taken: nobody waits
    assert others(600) == pytest.approx(10 * 0.4 / 0.5, rel=1e-5)
    assert others(200) == pytest.approx(10 * 0.8 / 0.1, rel=1e-5)
    assert others(110, num_seqs=1) == pytest.approx(0.89 / 0.05, rel=1e-5)  # bounded


def test_requests_go_where_memory_will_be():
    full = worker("d0", num_seqs=8, num_free_blocks=100)
    table = view(worker("p0", queue_s=5.0), full, worker("d1", num_seqs=9, num_free_blocks=900))
    table.demand.mean_output = 1e6  # what runs goes on, and grows
    assert choose(PrefixAware(local_prefill_max_tokens=64), facts(), {}, table).decode == "d1"


def test_a_rate_is_exact_for_a_steady_flow_and_follows_a_change():
    rate = Rate()
    for tick in range(20):
        rate.add(0.5, tick * 0.1)
    assert rate.per_second(2.0) == pytest.approx(5.0, rel=0.02)
    for tick in range(3000):
        rate.add(0.5, 2.0 + tick * 0.1)
    assert rate.per_second(302.0) == pytest.approx(5.0, rel=0.02)
    assert rate.per_second(302.0 + 600.0) < 0.01
    assert Rate().per_second(5.0) == 0.0
