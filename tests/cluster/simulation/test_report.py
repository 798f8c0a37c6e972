"""The figures of outcomes made by hand."""

from dataclasses import replace

import pytest

from cluster.simulation.report import GroupReport, Percentiles, PoolReport, Slo, make_report
from cluster.simulation.router import Outcome
from cluster.simulation.simulation import Result
from cluster.simulation.trace import Hints
from tests.cluster.simulation.small import BLOCK, make_setup


def test_every_figure_of_a_report() -> None:
    """Two of three requests are answered, one of them in time; arrivals end 4 s after they began, the last at 104 s."""
    setup = make_setup(2, 1, num_blocks=64)
    setup = replace(setup, pools=[replace(pool, gpus=gpus) for pool, gpus in zip(setup.pools, (2, 4), strict=True)])
    outcomes = [
        Outcome(0, 100, 5, 100.0, 100.0, 101.0, 101.125, 40, 1000, "prefill-0", "decode-0", 1),
        Outcome(1, 300, 3, 102.0, 103.0, 105.0, 105.25, 60, 500, None, "decode-0", 2),
        Outcome(2, 600, 9, 104.0, refused="late", hints=Hints(tenant="b", priority=-1)),
    ]
    busy_s, num_steps = {"prefill": 3.0, "decode": 4.0}, {"prefill": 5, "decode": 6}
    result = Result(outcomes, [], [2e-6], busy_s, num_steps, 10.0, 0.5, setup)
    report = make_report(result, trace="t", policy="p", seed=3, rate_scale=2.0, slo=Slo(2.0, 0.05))
    assert (report.requests, report.finished, report.rejects) == (3, 2, {"late": 1})
    assert report.goodput == pytest.approx(1 / 3)
    assert (report.arrivals_s, report.goodput_per_s, report.goodput_per_s_per_gpu) == (4.0, 1 / 4, 1 / 4 / 8)
    assert report.hit_rate == 100 / 400
    assert (report.local_prefills, report.retried, report.transferred_bytes) == (1, 1, 1500)
    assert report.ttft_s == Percentiles(2.0, pytest.approx(2.8), pytest.approx(2.98))
    assert report.tpot_s == Percentiles(*map(pytest.approx, (0.078125, 0.115625, 0.1240625)))
    assert report.pools == {
        "prefill": PoolReport(2, 4, 64 * BLOCK, pytest.approx(0.15), 5),
        "decode": PoolReport(1, 4, 64 * BLOCK, pytest.approx(0.4), 6),
    }
    assert (report.simulated_s, report.speed_up) == (10.0, 20.0)
    assert list(report.tenants) == ["", "b"]
    assert list(report.priorities.items()) == [("-1", report.tenants["b"]), ("0", report.tenants[""])]
    assert report.tenants[""] == GroupReport(2, 0.5, 0, report.ttft_s, report.tpot_s)
    assert report.tenants["b"] == GroupReport(1, 0.0, 1, None, None)
    alone = make_report(
        replace(result, outcomes=outcomes[:2]), trace="t", policy="p", seed=3, rate_scale=2.0, slo=Slo()
    )
    assert (alone.tenants, alone.priorities) == ({}, {})
