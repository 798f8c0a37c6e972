"""Which split of some GPUs serves the most requests in time: simulated, one candidate after the other.

A candidate's rate is the highest at which a share of `attainment` of all requests keeps both limits (DistServe's
goodput, with both limits tested together). All are searched on the same grid of rates, by strides and bisection, from
where the candidate's own work says, so no result depends on another's; a run stops as soon as too many requests have
missed.

With some hundred requests chance has a part in it, too: a higher rate may be kept where a lower one is not, and rates
differ by up to 10 % from one draw of the arrivals to the next. So the best split and the best colocated pool are rated
at several draws before they are compared.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from cluster.simulation.bound import busy_rate
from cluster.simulation.report import Report, Slo, make_report
from cluster.simulation.router import Outcome
from cluster.simulation.simulation import Setup, Simulation
from cluster.simulation.trace import Trace
from engine.step_profile import StepProfile

PRECISION = 1.05  # of a rate found: the grid's steps are 5 %
STRIDE = 8  # steps of the grid at a time, until a rate that is served and one that is not are found
NUM_DRAWS = 3  # of the arrivals, at which the best are compared
MIN_SCALE, MAX_SCALE = 0.01, 1000.0  # of the trace's rate, between which is searched
_MIN_STEP, _MAX_STEP = (round(math.log(scale, PRECISION)) for scale in (MIN_SCALE, MAX_SCALE))
MAX_SPLITS = 8  # of two pools with the same profiles, before the search goes on around the best


@dataclass(frozen=True, slots=True)
class Candidate:
    """No prefill workers: one pool of decode workers that prefill by themselves."""

    num_prefill: int
    num_decode: int
    prefill: StepProfile
    decode: StepProfile

    @property
    def colocated(self) -> bool:
        return self.num_prefill == 0

    @property
    def gpus(self) -> int:
        prefill, decode = self.prefill.measured.tensor_parallel, self.decode.measured.tensor_parallel
        return self.num_prefill * prefill + self.num_decode * decode

    @property
    def name(self) -> str:
        """With the tensor parallel sizes where they are not 1."""
        prefill, decode = self.prefill.measured.tensor_parallel, self.decode.measured.tensor_parallel
        if self.colocated:
            return f"{self.num_decode} colocated" + (f", TP {decode}" if decode > 1 else "")
        sizes = f", TP {prefill} + {decode}" if max(prefill, decode) > 1 else ""
        return f"{self.num_prefill} prefill + {self.num_decode} decode{sizes}"


@dataclass(frozen=True, slots=True)
class Rated:
    """`rate_scale` 0: not even MIN_SCALE of the trace's rate is served. `report` is of the run at that rate. `draws` is
    `per_gpu` at each of NUM_DRAWS draws of the arrivals, of the best split and the best colocated pool alone."""

    candidate: Candidate
    rate_scale: float
    report: Report | None
    draws: Sequence[float] = ()

    @property
    def per_gpu(self) -> float:
        """Requests in time per second and GPU."""
        return self.report.goodput_per_s / self.candidate.gpus if self.report is not None else 0.0

    def clearly_above(self, other: "Rated") -> bool:
        """At all draws, and by more than the search is precise."""
        return min(self.draws) > PRECISION * max(other.draws)


class Planner:
    """`setup` makes the cluster of a candidate; `policy` is its name in reports. `tell` hears of each simulation."""

    def __init__(
        self,
        setup: Callable[[Candidate], Setup],
        trace: Trace,
        slo: Slo,
        *,
        policy: str,
        attainment: float = 0.9,
        seed: int = 0,
        tell: Callable[[Candidate, float, Report | None], None] | None = None,
    ) -> None:
        self._setup = setup
        self._trace = trace
        self._slo = slo
        self._policy = policy
        self._attainment = attainment
        self._seed = seed
        self._tell = tell

    def search(self, num_gpus: int, profiles: Sequence[StepProfile]) -> list[Rated]:
        """Best first. Few splits are all tried; of many, some and then those around the best."""
        rated: dict[tuple[str, int], Rated] = {}
        for prefill in profiles:
            for decode in profiles:
                splits = _splits(num_gpus, prefill, decode)
                step = -(-len(splits) // MAX_SPLITS)
                tried: dict[int, Rated] = {}
                while step >= 1:
                    around = max(tried, key=lambda place: tried[place].per_gpu, default=0)
                    places = range(0, len(splits), step) if not tried else (around - step, around + step)
                    for place in places:
                        if 0 <= place < len(splits) and place not in tried:
                            tried[place] = self.rate(splits[place])
                    step = step // 2 if tried else step
                rated |= {(each.candidate.name, each.candidate.gpus): each for each in tried.values()}
        for profile in profiles:
            if num_workers := num_gpus // profile.measured.tensor_parallel:
                each = self.rate(Candidate(0, num_workers, profile, profile))
                rated[each.candidate.name, each.candidate.gpus] = each
        ranked = sorted(rated.values(), key=lambda each: -each.per_gpu)
        best = {each.candidate.colocated: each for each in reversed(ranked)}
        return [self._drawn_again(each) if each is best[each.candidate.colocated] else each for each in ranked]

    def rate(self, candidate: Candidate, draw: int = 0) -> Rated:
        """`draw` numbers the arrivals drawn."""
        setup, best = self._setup(candidate), Rated(candidate, 0.0, None)
        low: int | None = None  # steps of the grid from the trace's rate
        high: int | None = None
        # Below the rate that would keep all workers busy with prompts, for requests have to come in time.
        step = round(math.log(busy_rate(setup, self._trace), PRECISION)) - STRIDE
        step = max(_MIN_STEP, min(step, _MAX_STEP))
        while _MIN_STEP <= step <= _MAX_STEP and (low is None or high is None or high - low > 1):
            report = self._try(candidate, setup, PRECISION**step, self._seed + draw)
            if report is not None:
                low, best = step, Rated(candidate, PRECISION**step, report)
            else:
                high = step
            if low is not None and high is not None:
                step = (low + high) // 2
            else:
                step += STRIDE if high is None else -STRIDE
        return best

    def _drawn_again(self, rated: Rated) -> Rated:
        if rated.report is None:
            return replace(rated, draws=(0.0,))
        others = (self.rate(rated.candidate, draw).per_gpu for draw in range(1, NUM_DRAWS))
        return replace(rated, draws=(rated.per_gpu, *others))

    def _try(self, candidate: Candidate, setup: Setup, scale: float, seed: int) -> Report | None:
        """None: too many requests missed."""
        allowed = math.floor((1.0 - self._attainment) * len(self._trace.requests) + 1e-6)  # 0.1 of 10 is 1
        missed = 0

        def watch(outcome: Outcome) -> bool:
            nonlocal missed
            missed += not self._slo.kept(outcome)
            return missed <= allowed

        result = Simulation(setup, self._trace, seed=seed, rate_scale=scale, watch=watch).run()
        report = None
        if missed <= allowed:
            name, limits = self._trace.name, self._slo
            report = make_report(result, trace=name, policy=self._policy, seed=seed, rate_scale=scale, slo=limits)
        if self._tell is not None:
            self._tell(candidate, scale, report)
        return report


def _splits(num_gpus: int, prefill: StepProfile, decode: StepProfile) -> list[Candidate]:
    """Of two pools that use as many of the GPUs as they can, with fewer prefill workers first."""
    prefill_gpus, decode_gpus = prefill.measured.tensor_parallel, decode.measured.tensor_parallel
    counts: Iterable[int] = range(1, (num_gpus - decode_gpus) // prefill_gpus + 1)
    return [Candidate(count, (num_gpus - count * prefill_gpus) // decode_gpus, prefill, decode) for count in counts]
