"""The bound against a brute-force twin, and against what the simulator reaches."""

from dataclasses import replace
from itertools import combinations
from random import Random

import pytest

from cluster.simulation.bound import (
    alone_seconds,
    goodput_bound,
    least_prefill_cost,
    most_in_time,
    prefill_work,
    uncached_parts,
)
from cluster.simulation.report import Slo
from cluster.simulation.simulation import Simulation
from tests.cluster.simulation.small import MODEL, make_setup, random_trace, request, trace_of


def in_time(jobs: list[tuple[float, float]], speed: int, patience_s: float) -> bool:
    """One machine, first come first: best where all are equally patient."""
    free_at = 0.0
    for time, work in jobs:
        free_at = max(free_at, time) + work / speed
        if free_at > time + patience_s:
            return False
    return True


@pytest.mark.parametrize("seed", range(60))
def test_as_many_as_the_best_choice_of_requests(seed: int) -> None:
    random = Random(seed)
    speed, patience_s = random.choice([1, 2]), 4.0
    jobs = sorted((random.randrange(12), float(random.randrange(1, 7))) for _ in range(9))
    fit = [job for job in jobs if job[1] <= patience_s]
    best = max(
        number
        for number in range(len(fit) + 1)
        if any(in_time(list(some), speed, patience_s) for some in combinations(fit, number))
    )
    assert most_in_time([time for time, _ in jobs], [work for _, work in jobs], speed, patience_s) == best


def test_the_least_cost_of_a_token_is_that_of_the_largest_step() -> None:
    cost = least_prefill_cost(MODEL.seconds, 1024)
    assert cost.token_s == pytest.approx(1e-4 + 0.01 / 1024)
    assert cost.pair_s == 0.0


def test_what_came_before_is_not_computed_again() -> None:
    cost = least_prefill_cost(MODEL.seconds, 1024)
    parts = uncached_parts(trace_of(request(0, 0.0, 1100, 1, [1, 2]), request(1, 0.0, 1100, 1, [1, 2])))
    assert parts == [(1100, 0), (76, 1024)]
    first, second = prefill_work(parts, cost)
    assert first == pytest.approx(1100 * cost.token_s)
    assert second == pytest.approx(76 * cost.token_s)


@pytest.mark.parametrize(("num_prompt", "contents"), [(1024, [1, 2]), (1100, [1, 2, 3])])
def test_of_a_prompt_that_is_all_cached_the_last_token_is_computed(num_prompt: int, contents: list[int]) -> None:
    parts = uncached_parts(trace_of(*(request(number, 0.0, num_prompt, 1, contents) for number in range(2))))
    assert parts == [(num_prompt, 0), (1, num_prompt - 1)]


def test_a_prompt_is_served_in_time_where_one_kind_of_worker_is_fast_enough() -> None:
    """3,000 tokens in 3 steps take 0.33 s, in 12 steps 0.42 s."""
    trace, setup = trace_of(request(0, 0.0, 3000, 1, [1, 2, 3, 4, 5, 6])), make_setup(max_batch_tokens=1024)
    slow = make_setup(max_batch_tokens=256).pools[1]
    mixed = replace(setup, pools=[setup.pools[0], slow])
    assert [alone_seconds(3000, 0, pool) for pool in mixed.pools] == pytest.approx([0.33, 0.42])
    assert goodput_bound(mixed, trace, 0, 1.0, 0.35) == 1.0
    assert goodput_bound(mixed, trace, 0, 1.0, 0.35, roles=["decode"]) == 0.0


def test_a_prompt_too_long_for_any_worker_is_not_served_in_time() -> None:
    setup = make_setup(2, 0)
    trace = trace_of(request(0, 0.0, 3000, 1, [1, 2, 3, 4, 5, 6]))
    alone = alone_seconds(3000, 0, setup.pools[0])
    least = least_prefill_cost(MODEL.seconds, setup.pools[0].scheduler.max_batch_tokens)
    assert alone > prefill_work([(3000, 0)], least)[0]
    assert goodput_bound(setup, trace, 0, 1.0, alone * 1.001) == 1.0
    assert goodput_bound(setup, trace, 0, 1.0, alone * 0.999) == 0.0


@pytest.mark.parametrize("ttft_s", [0.1, 0.2])
def test_no_simulation_beats_the_bound(ttft_s: float) -> None:
    trace, setup = random_trace(2, num_requests=200, seconds=5.0), make_setup(2, 1)
    result = Simulation(setup, trace).run()
    reached = sum(Slo(ttft_s, 10.0).kept(each) for each in result.outcomes) / len(trace.requests)
    bound = goodput_bound(setup, trace, 0, 1.0, ttft_s)
    separate = goodput_bound(setup, trace, 0, 1.0, ttft_s, roles=["prefill"])
    assert not any(each.prefill_worker is None for each in result.outcomes)
    assert reached <= separate <= bound < 1.0
