"""The search of a plan, with profiles of straight lines."""

from collections.abc import Sequence

import pytest

from cluster.simulation.plan import PRECISION, Candidate, Planner
from cluster.simulation.report import Report, Slo
from cluster.simulation.simulation import Setup
from engine.step_profile import DecodeStep, Measurements, PrefillStep, StepProfile
from tests.cluster.simulation.small import make_setup
from tests.cluster.simulation.test_simulation import random_trace

SLO = Slo(ttft_s=0.6, tpot_s=0.05)


def profile(tensor_parallel: int) -> StepProfile:
    """Only its tensor parallel size is looked at here: the setup has step times of its own."""
    return StepProfile(
        Measurements(
            device="d",
            model="m",
            tensor_parallel=tensor_parallel,
            kv_bytes_per_token=1000,
            commands=[],
            prefill=[PrefillStep(tokens=100, past=0, seconds=0.02)],
            decode=[DecodeStep(batch=1, context=0, seconds=0.011)],
        )
    )


def setup(candidate: Candidate) -> Setup:
    return make_setup(candidate.num_prefill, candidate.num_decode)


def planner(tried: list[tuple[Candidate, float, Report | None]]) -> Planner:
    trace = random_trace(7, num_requests=100)
    return Planner(setup, trace, SLO, tell=lambda *said: tried.append(said))


def test_the_rate_found_is_served_and_a_slightly_higher_one_is_not() -> None:
    tried: list[tuple[Candidate, float, Report | None]] = []
    rated = planner(tried).rate(Candidate(2, 1, profile(1), profile(1)))
    assert rated.report is not None
    assert rated.report.goodput >= 0.9
    assert min(scale for _, scale, report in tried if report is None) <= rated.rate_scale * PRECISION
    assert rated.per_gpu == pytest.approx(rated.report.goodput_per_s / 3)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([1], {(1, 2), (2, 1), (0, 3)}),
        ([2], {(0, 1)}),
        ([1, 2], {(1, 2), (2, 1), (0, 3), (1, 1), (0, 1)}),
    ],
)
def test_every_split_of_few_gpus_is_tried(sizes: Sequence[int], expected: set[tuple[int, int]]) -> None:
    rated = planner([]).search(3, [profile(size) for size in sizes])
    assert {(each.candidate.num_prefill, each.candidate.num_decode) for each in rated} == expected
    assert all(each.candidate.gpus <= 3 for each in rated)
    assert [each.per_gpu for each in rated] == sorted((each.per_gpu for each in rated), reverse=True)
