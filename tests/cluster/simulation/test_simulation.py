"""Small clusters whose times are worked out by hand, and what holds of every simulation."""

from dataclasses import replace
from typing import Any

import pytest

from cluster.simulation.bound import goodput_bound
from cluster.simulation.report import Slo, make_report
from cluster.simulation.router import Outcome
from cluster.simulation.simulation import Result, Setup, Simulation
from cluster.simulation.trace import Hints, Trace
from cluster.simulation.transfer import TransferSpeed
from router.policies import LeastLoaded, PrefixAware, RoundRobin
from tests.cluster.simulation.small import (
    KV_BYTES,
    LATENCY_S,
    MODEL,
    NETWORK_S,
    make_setup,
    random_trace,
    request,
    trace_of,
)


def run(setup: Setup, trace: Trace, **options: float) -> Result:
    """With the checks that hold at the end of each: every block is free or idle."""
    simulation = Simulation(setup, trace, **options)  # type: ignore[arg-type]
    result = simulation.run()
    simulation.check_invariants()
    for worker in simulation.cluster.workers.values():
        assert worker.engine.kv.num_free == worker.engine.kv.num_blocks, worker.worker_id
    assert [each.number for each in result.outcomes] == [each.number for each in trace.requests]
    return result


@pytest.mark.usefixtures("at_given_times")
def test_a_handoff_takes_what_its_parts_take() -> None:
    """Prefill 10 ms + 100 * 0.1 ms; the KV of the last sixteenth of the layers after that; then steps of 11 ms."""
    (outcome,) = run(make_setup(), trace_of(request(0, arrived=1.0, num_prompt=100, num_output=3))).outcomes
    prefill_s, copy_s, step_s = 0.02, 100 * KV_BYTES / 1e9, 0.011
    assert outcome.ttft == pytest.approx(NETWORK_S + prefill_s + NETWORK_S)
    # The offer reaches the decode worker while the prompt is computed, so all but a sixteenth travels before its end.
    decode_starts = 1.0 + NETWORK_S + prefill_s + copy_s / 16 + LATENCY_S
    assert outcome.finished == pytest.approx(decode_starts + 2 * step_s + NETWORK_S)
    assert outcome.transferred_bytes == 100 * KV_BYTES
    assert (outcome.prefill_worker, outcome.decode_worker) == ("prefill-0", "decode-0")


@pytest.mark.usefixtures("at_given_times")
def test_without_prefill_workers_the_decode_worker_does_it_all() -> None:
    (outcome,) = run(make_setup(num_prefill=0), trace_of(request(0, num_prompt=100, num_output=3))).outcomes
    assert outcome.ttft == pytest.approx(2 * NETWORK_S + 0.02)
    assert outcome.tpot == pytest.approx(0.011)
    assert (outcome.prefill_worker, outcome.transferred_bytes) == (None, 0)


@pytest.mark.usefixtures("at_given_times")
@pytest.mark.parametrize(("max_batch_tokens", "num_prompt", "num_last"), [(1024, 2000, 976), (100, 120, 120)])
def test_a_long_prompt_takes_several_steps_and_what_fills_no_block_travels_with_the_last(
    max_batch_tokens: int, num_prompt: int, num_last: int
) -> None:
    """Two steps: the first one's 1,024 tokens are 8 blocks, and of 100 there is none to send."""
    setup = make_setup(max_batch_tokens=max_batch_tokens)
    (outcome,) = run(setup, trace_of(request(0, num_prompt=num_prompt, num_output=2))).outcomes
    assert outcome.ttft == pytest.approx(2 * NETWORK_S + 2 * 0.01 + num_prompt * 1e-4)
    # A sixteenth of what travels with the last step is left when that ends.
    tail_s = num_last * KV_BYTES / 1e9 / 16 + LATENCY_S
    assert outcome.tpot == pytest.approx(tail_s + 0.011)


@pytest.mark.usefixtures("at_given_times")
def test_an_answer_of_one_token_ends_on_the_prefill_worker() -> None:
    (outcome,) = run(make_setup(), trace_of(request(0, num_output=1))).outcomes
    assert outcome.finished == outcome.first_token == pytest.approx(2 * NETWORK_S + 0.02)
    assert outcome.transferred_bytes == 0


@pytest.mark.usefixtures("at_given_times")
def test_a_cached_prefix_is_neither_computed_nor_sent_again() -> None:
    contents = [1, 2]
    first = request(0, 0.0, 1100, 3, contents)
    again = request(1, 5.0, 1100, 3, contents)
    outcomes = run(make_setup(max_batch_tokens=2048), trace_of(first, again)).outcomes
    assert [each.cached_tokens for each in outcomes] == [0, 1024]
    assert outcomes[1].ttft == pytest.approx(2 * NETWORK_S + 0.01 + 76 * 1e-4)
    assert [each.transferred_bytes for each in outcomes] == [1100 * KV_BYTES, 76 * KV_BYTES]


@pytest.mark.usefixtures("at_given_times")
@pytest.mark.parametrize("num_prefill", [0, 1])
def test_who_waits_behind_a_flood_depends_on_tenant_and_priority(num_prefill: int) -> None:
    """Twenty prompts of 0.11 s each come at once, and then one more, on a worker or in the router behind a worker."""
    flood = [request(number, num_prompt=1000) for number in range(20)]

    def ttft(**hints: Any) -> float:
        last = replace(request(20, 0.001, num_prompt=1000), hints=Hints(**hints))
        ttft = run(make_setup(num_prefill), trace_of(*flood, last)).outcomes[-1].ttft
        assert ttft is not None
        return ttft

    behind_all = ttft()
    assert behind_all == ttft(session_id="a") == ttft(priority=1) > 20 * 0.11
    assert ttft(tenant="b") < behind_all / 4
    assert ttft(priority=-1) < behind_all / 4


@pytest.mark.usefixtures("at_given_times")
@pytest.mark.parametrize(
    ("own", "of_all", "is_refused"),
    [
        (Hints(slo_ttft_ms=1000), None, True),
        (Hints(slo_ttft_ms=9000), None, False),
        (Hints(slo_ttft_ms=9000), 1.0, True),  # the stricter counts
        (Hints(slo_ttft_ms=1000), 9.0, True),
        (Hints(slo_tpot_ms=5), None, True),  # a step takes 11 ms or more
        (Hints(slo_tpot_ms=500), None, False),
    ],
)
def test_a_request_may_have_limits_of_its_own(own: Hints, of_all: float | None, is_refused: bool) -> None:
    flood = [request(number, num_prompt=1000) for number in range(20)]  # 2.2 s
    last = replace(request(20, 0.001, num_prompt=1000), hints=own)
    setup = replace(make_setup(), ttft_s=of_all)
    assert bool(run(setup, trace_of(*flood, last)).outcomes[-1].refused) == is_refused


@pytest.mark.usefixtures("at_given_times")
def test_two_prompts_that_come_together_share_a_step() -> None:
    outcomes = run(make_setup(), trace_of(request(0), request(1))).outcomes
    assert [each.ttft for each in outcomes] == pytest.approx([2 * NETWORK_S + 0.03] * 2)


@pytest.mark.parametrize("routers", [1, 4])
def test_a_text_that_comes_many_times_at_once_is_computed_by_few_through_any_routers(
    routers: int,
) -> None:
    others = [request(number, 0.0) for number in range(8)]  # so that a second of work has its price
    burst = [request(number, 1.0 + 0.01 * number, 8292, contents=range(16)) for number in range(8, 24)]
    outcomes = run(make_setup(4, 4, num_blocks=1000, num_routers=routers), trace_of(*others, *burst)).outcomes
    computing = [each for each in outcomes[8:] if not each.cached_tokens]
    assert 1 <= len(computing) <= 2
    assert all(each.cached_tokens == 8192 for each in outcomes[8:] if each not in computing)


@pytest.mark.parametrize("routers", [1, 3])
@pytest.mark.parametrize("policy", [RoundRobin, LeastLoaded, PrefixAware])
def test_the_same_seed_gives_the_same_report(policy: type[PrefixAware], routers: int) -> None:
    def report(seed: int) -> dict[str, object]:
        setup = make_setup(2, 2, policy=policy, num_routers=routers)
        result = run(setup, random_trace(1), seed=seed)
        data = make_report(result, trace="t", policy="p", seed=0, rate_scale=1.0, slo=Slo(0.3, 0.05)).to_json()
        return {name: value for name, value in data.items() if name not in ("wall_s", "speed_up", "decision_us")}

    assert report(1) == report(1)
    assert report(1) != report(2)


@pytest.mark.parametrize("seed", range(4))
def test_every_request_ends_and_every_block_comes_back_where_memory_is_short(seed: int) -> None:
    """24 blocks hold about 3,000 tokens: sequences wait, are preempted and compute again."""
    trace = random_trace(seed)
    outcomes = run(make_setup(2, 2, num_blocks=24, max_batch_tokens=256), trace, seed=seed).outcomes
    assert all(each.finished is not None for each in outcomes)
    assert any(each.cached_tokens for each in outcomes)


@pytest.mark.parametrize("num_prefill", [0, 1])
def test_many_steps_at_a_time_take_the_time_of_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, num_prefill: int
) -> None:
    """One worker of a kind, so reports decide nothing."""
    trace, setup = random_trace(3, num_requests=40), make_setup(num_prefill, policy=RoundRobin)

    def times(outcomes: list[Outcome]) -> list[float]:
        return [time for each in outcomes for time in (each.ttft or 0.0, each.finished or 0.0)]

    together = run(setup, trace)
    monkeypatch.setattr("cluster.simulation.engine.SimulatedEngine.num_alike", lambda *_: 1)
    single = run(setup, trace)
    assert times(list(together.outcomes)) == pytest.approx(times(list(single.outcomes)))
    assert together.num_steps == single.num_steps
    assert together.busy_s == pytest.approx(single.busy_s)


@pytest.mark.usefixtures("at_given_times")
def test_steps_together_read_the_kv_of_the_middle_one() -> None:
    """An answer of 201 tokens after 100: 200 steps, which read 100 to 299 tokens, of 1 us each."""
    pools = [replace(pool, seconds=replace(MODEL, kv_token_s=1e-6).seconds) for pool in make_setup().pools]
    setup = replace(make_setup(num_prefill=0), pools=[replace(pools[0], num_workers=0), pools[1]])
    (outcome,) = run(setup, trace_of(request(0, num_prompt=100, num_output=201))).outcomes
    assert outcome.tpot == pytest.approx(0.011 + 199.5e-6, abs=0.5e-6)  # as many steps at a time may be even


def test_more_workers_serve_more_in_time() -> None:
    """Fifty requests a second, which four workers of each kind just keep up with."""
    slo = Slo(ttft_s=0.5, tpot_s=0.03)
    kept = []
    for num_workers in (1, 2, 4):
        outcomes = run(make_setup(num_workers, num_workers), random_trace(5, num_requests=500)).outcomes
        kept.append(sum(slo.kept(each) for each in outcomes))
    assert kept[0] < kept[1] < kept[2]


def test_where_links_are_slow_decode_workers_prefill_and_where_they_are_fast_they_do_not() -> None:
    """A token takes 0.1 ms to compute, and 0.01 or 1 ms to move."""
    slo, trace, kept, local = Slo(ttft_s=0.5, tpot_s=0.05), random_trace(3, num_requests=200), [], []
    for policy in (PrefixAware, lambda: PrefixAware(local_prefill_max_tokens=0)):
        for bytes_per_s in (1e8, 1e6):
            setup = replace(make_setup(2, 2, policy=policy), speed=TransferSpeed(bytes_per_s, LATENCY_S))
            outcomes = run(setup, trace).outcomes
            kept.append(sum(slo.kept(each) for each in outcomes))
            local.append(sum(each.prefill_worker is None for each in outcomes))
    assert local[0] < 100 < local[1]
    assert local[2:] == [0, 0]
    assert kept[0] > 0.9 * kept[2]  # answers are short here, and a prompt's step is twice a token's limit
    assert kept[1] > 2 * kept[3]


def test_once_workers_are_idle_every_router_knows_what_each_of_them_holds() -> None:
    """Twice the blocks of a worker come and go."""
    simulation = Simulation(make_setup(2, 2, num_blocks=30, num_routers=3), random_trace(11))
    simulation.run()
    for router in simulation._routers:
        for worker_id, worker in simulation.cluster.workers.items():
            assert router._placement.num_blocks(worker_id) == worker.engine.kv.num_cached > 0
            assert router._states[worker_id].row().num_pending == 0


def test_a_lease_that_no_decode_worker_opens_in_time_expires_and_the_request_is_tried_again() -> None:
    """Leases of 0.2 s, and a decode worker whose memory is full for longer: four routers fill it at the same time."""
    setup = make_setup(2, 1, num_blocks=12, policy=RoundRobin, num_routers=4, lease_s=0.2)
    trace = trace_of(*(request(number, 0.0, 500, 200) for number in range(16)))
    outcomes = run(setup, trace).outcomes
    assert any(each.num_attempts > 1 for each in outcomes)
    assert all(each.finished is not None or each.refused == "attempts failed" for each in outcomes)
    assert sum(each.finished is not None for each in outcomes) >= 4


@pytest.mark.parametrize("num_prefill", [0, 1])
def test_a_request_that_does_not_fit_with_its_answer_is_refused_and_no_answer_is_cut_short(num_prefill: int) -> None:
    """8 blocks of 128 tokens."""
    sizes = [(1024, 1), (1023, 2), (1000, 24), (1023, 1), (100, 925), (100, 924)]
    trace = trace_of(*(request(number, 10.0 * number, *size) for number, size in enumerate(sizes)))
    outcomes = run(make_setup(num_prefill, num_blocks=8), trace).outcomes
    assert [bool(each.refused) for each in outcomes] == [True, True, False, False, True, False]
    assert all(each.finished is None and each.tpot is None for each in outcomes if each.refused)
    # Each later token takes a step of 11 ms, the handoff at most another.
    steps = [(each.tpot or 0.0) * (each.num_output_tokens - 1) / 0.011 for each in outcomes if not each.refused]
    assert steps == pytest.approx([23, 0, 923], abs=1)


def test_a_report_counts_rejects_as_misses() -> None:
    trace = trace_of(request(0, num_prompt=1000, num_output=25), request(1))
    result = run(make_setup(num_blocks=8), trace)
    report = make_report(result, trace="t", policy="p", seed=0, rate_scale=1.0, slo=Slo())
    assert (report.goodput, report.rejects) == (0.5, {"prompt and answer are longer than 1,024 tokens": 1})
    assert goodput_bound(result.setup, trace, 0, 1.0, ttft_s=2.0) == 0.5
    assert report.pools["decode"].steps == 2
    assert 0 < report.pools["prefill"].busy_share < 1


@pytest.mark.usefixtures("at_given_times")
def test_a_router_that_knows_the_limits_refuses_what_would_miss_them() -> None:
    """Ten prompts of 0.11 s that come at once, when the worker has learnt its speed: the queue alone gets too long."""
    first = [request(number, number, 100 * number + 50, 2) for number in range(12)]
    trace = trace_of(*first, *(request(number, 20.0, 1000, 2) for number in range(12, 22)))
    outcomes = run(replace(make_setup(num_blocks=256), ttft_s=0.5), trace).outcomes
    refused = [each for each in outcomes if each.refused]
    assert 5 <= len(refused) <= 7
    assert all(each.number >= 12 and each.first_token is None for each in refused)
    assert all(each.ttft is not None and each.ttft <= 0.5 for each in outcomes if not each.refused)
    assert not any(each.refused for each in run(make_setup(num_blocks=256), trace).outcomes)


@pytest.mark.usefixtures("at_given_times")
def test_an_answer_that_ends_on_the_prefill_worker_lets_the_next_one_go() -> None:
    trace = trace_of(request(0, 0.0, 100, 1), request(1, 0.001, 100, 1), request(2, 0.002, 100, 1))
    setup = make_setup(1, 1, max_num_seqs=1, policy=RoundRobin)
    outcomes = Simulation(setup, trace).run().outcomes
    assert all(each.finished is not None for each in outcomes)


@pytest.mark.usefixtures("at_given_times")
def test_a_simulation_in_which_nothing_happens_any_more_says_so() -> None:
    class Never:
        uses_hits = False

        def choose(self, *_: object) -> None:
            return None

    with pytest.raises(AssertionError, match="nothing happens any more"):
        Simulation(make_setup(policy=Never), trace_of(request(0))).run()
