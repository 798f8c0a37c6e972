"""The search of a plan, with profiles of straight lines."""

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import log
from typing import Any

import pytest
from rich.console import Console

from baton.plan_command import plan_table, verdict
from cluster.simulation.plan import NUM_DRAWS, PRECISION, Candidate, Planner, Rated
from cluster.simulation.report import Report, Slo
from cluster.simulation.router import Outcome
from cluster.simulation.simulation import Setup, Simulation
from engine.step_profile import DecodeStep, Measurements, PrefillStep, StepProfile
from tests.cluster.simulation.small import make_setup, random_trace

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
    return Planner(setup, trace, SLO, policy="prefix_aware", tell=lambda *said: tried.append(said))


def test_a_narrow_table_folds_names_and_drops_no_column() -> None:
    rated = planner([]).search(3, [profile(1), profile(2)])
    out = Console(file=io.StringIO(), width=80)
    out.print(plan_table(rated, "t"))
    assert isinstance(out.file, io.StringIO)
    said = out.file.getvalue()
    assert "P / D" in said
    assert "..." not in said
    assert "\N{HORIZONTAL ELLIPSIS}" not in said


@pytest.fixture(scope="module")
def rated() -> list[Rated]:
    """One of each kind."""
    return planner([]).search(2, [profile(1)])


def test_the_rate_found_is_served_and_a_slightly_higher_one_is_not() -> None:
    tried: list[tuple[Candidate, float, Report | None]] = []
    rated = planner(tried).rate(Candidate(2, 1, profile(1), profile(1)))
    assert rated.report is not None
    assert rated.report.goodput >= 0.9
    assert min(scale for _, scale, report in tried if report is None) == pytest.approx(rated.rate_scale * PRECISION)
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


@pytest.mark.parametrize(
    ("num_gpus", "best", "refined"),
    [
        (21, 10, [8, 10]),
        (21, 8, [8, 10]),
        (21, 0, [1]),
        (21, 19, [17, 19]),
        (9, 3, []),  # eight splits
        (41, 13, [13, 17, 12, 14]),  # steps of 5, 2 and 1
    ],
)
def test_of_many_splits_those_around_the_best_are_tried_too(
    rated: list[Rated], monkeypatch: pytest.MonkeyPatch, num_gpus: int, best: int, refined: list[int]
) -> None:
    """Places of splits, which are the worse the further they are from the best."""
    tried: list[int] = []
    report = rated[0].report
    assert report is not None

    def rate(_: Planner, candidate: Candidate, draw: int = 0) -> Rated:
        place = candidate.num_prefill - 1
        if place >= 0 and not draw:
            tried.append(place)
        rate = (100.0 - abs(place - best)) * candidate.gpus
        return Rated(candidate, 1.0, replace(report, goodput_per_s=rate))

    monkeypatch.setattr(Planner, "rate", rate)
    found = planner([]).search(num_gpus, [profile(1)])
    coarse = list(range(0, num_gpus - 1, -(-(num_gpus - 1) // 8)))
    assert tried == [*coarse, *refined]
    assert found[0].candidate.num_prefill == best + 1


@pytest.mark.parametrize(("attainment", "num_heard"), [(0.75, 26), (0.9, 11)])
def test_a_run_stops_with_the_first_request_that_misses_beyond_what_may(
    monkeypatch: pytest.MonkeyPatch, attainment: float, num_heard: int
) -> None:
    """Of 100, of which none is in time."""
    heard: list[Outcome] = []

    class Heard(Simulation):
        def __init__(self, *args: Any, watch: Callable[[Outcome], bool], **options: Any) -> None:
            super().__init__(*args, **options, watch=lambda outcome: heard.append(outcome) or watch(outcome))

    monkeypatch.setattr("cluster.simulation.plan.Simulation", Heard)
    never = Planner(
        setup, random_trace(7, num_requests=100), Slo(0.0, 0.0), policy="prefix_aware", attainment=attainment
    )
    candidate = Candidate(1, 1, profile(1), profile(1))
    assert never._try(candidate, setup(candidate), 1.0, 0) is None
    assert num_heard <= len(heard) <= num_heard + 1  # two may end in one frame


def test_all_candidates_are_tried_at_rates_of_one_grid() -> None:
    tried: list[tuple[Candidate, float, Report | None]] = []
    planner(tried).search(3, [profile(1)])
    steps = [log(scale, PRECISION) for _, scale, _ in tried]
    assert steps == pytest.approx([round(step) for step in steps])


def test_a_rate_does_not_depend_on_what_was_rated_before(rated: list[Rated], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second candidate keeps some rates and misses a lower one."""
    first, second = Candidate(1, 1, profile(1), profile(1)), Candidate(0, 2, profile(1), profile(1))

    def kept(_: Planner, candidate: Candidate, _setup: Setup, scale: float, *_seed: int) -> Report | None:
        served = scale < 1.2 if candidate is first else scale < 1.4 or 2.2 < scale < 3.0
        return rated[0].report if served else None

    monkeypatch.setattr(Planner, "_try", kept)
    one = planner([])
    assert one.rate(first).rate_scale == pytest.approx(1.2, rel=0.05)
    assert one.rate(second) == planner([]).rate(second)


def test_the_best_of_both_kinds_are_rated_at_several_draws_of_the_arrivals() -> None:
    rated = planner([]).search(3, [profile(1)])
    drawn = [each for each in rated if each.draws]
    assert {each.candidate.colocated for each in drawn} == {True, False}
    assert [each.candidate for each in drawn] == [rated[0].candidate, drawn[1].candidate]
    for each in drawn:
        others = [planner([]).rate(each.candidate, draw).per_gpu for draw in range(1, NUM_DRAWS)]
        assert list(each.draws) == [each.per_gpu, *others]


@pytest.mark.parametrize(
    ("best", "other", "said"),
    [
        ((1.0, 1.1, 1.2), (1.0, 1.0, 1.05), "no clear difference between one colocated pool and separate pools here"),
        ((1.04, 1.04, 1.04), (1.0, 1.0, 1.0), "no clear difference between one colocated pool and separate pools here"),
        ((1.1, 1.2, 1.3), (1.0, 1.0, 1.0), "{} better here: 20% above {}"),
    ],
)
def test_a_verdict_is_no_finer_than_the_search(
    rated: list[Rated], best: Sequence[float], other: Sequence[float], said: str
) -> None:
    first, second = replace(rated[0], draws=best), replace(rated[1], draws=other)
    better = "one colocated pool is" if first.candidate.colocated else "separate pools are"
    lines = verdict([first, second], [profile(1)])
    assert lines[1] == said.format(better, second.candidate.name)
    assert lines[2] == "at 3 draws of the arrivals, rates searched in steps of 5%:"
    assert lines[3] == f"  {min(best):.3f} to {max(best):.3f}, {first.candidate.name}"
