"""Which split of some GPUs serves the most requests in time: simulated, one candidate after the other.

A candidate's rate is the highest at which a share of `attainment` of all requests keeps both limits (DistServe's
goodput, with both limits tested together). It is found by doubling and bisection; a run stops as soon as too many
requests have missed.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cluster.simulation.report import Report, Slo, make_report
from cluster.simulation.router import Outcome
from cluster.simulation.simulation import Setup, Simulation
from cluster.simulation.trace import Trace
from engine.step_profile import StepProfile

PRECISION = 1.05  # of a rate found: within 5 %
MIN_SCALE, MAX_SCALE = 0.01, 1000.0  # of the trace's rate, between which is searched
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
    """`rate_scale` 0: not even MIN_SCALE of the trace's rate is served. `report` is of the run at that rate."""

    candidate: Candidate
    rate_scale: float
    report: Report | None

    @property
    def per_gpu(self) -> float:
        """Requests in time per second and GPU."""
        return self.report.goodput_per_s / self.candidate.gpus if self.report is not None else 0.0


class Planner:
    """`setup` makes the cluster of a candidate; `tell` hears of each simulation that is over."""

    def __init__(
        self,
        setup: Callable[[Candidate], Setup],
        trace: Trace,
        slo: Slo,
        *,
        attainment: float = 0.9,
        seed: int = 0,
        tell: Callable[[Candidate, float, Report | None], None] | None = None,
    ) -> None:
        self._setup = setup
        self._trace = trace
        self._slo = slo
        self._attainment = attainment
        self._seed = seed
        self._tell = tell
        self._start = 1.0  # where the last candidate's search ended: the next begins there

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
        return sorted(rated.values(), key=lambda each: -each.per_gpu)

    def rate(self, candidate: Candidate) -> Rated:
        setup = self._setup(candidate)
        low, best, high, scale = 0.0, None, 0.0, self._start
        while MIN_SCALE <= scale <= MAX_SCALE and (not high or not low or high / low > PRECISION):
            report = self._try(candidate, setup, scale)
            if report is not None:
                low, best = scale, report
            else:
                high = scale
            scale = (low * high) ** 0.5 if low and high else 2 * low if low else high / 2
        self._start = low or self._start
        return Rated(candidate, low, best)

    def _try(self, candidate: Candidate, setup: Setup, scale: float) -> Report | None:
        """None: too many requests missed."""
        allowed = (1.0 - self._attainment) * len(self._trace.requests)
        missed = 0

        def watch(outcome: Outcome) -> bool:
            nonlocal missed
            missed += not self._slo.kept(outcome)
            return missed <= allowed

        result = Simulation(setup, self._trace, seed=self._seed, rate_scale=scale, watch=watch).run()
        report = None
        if missed <= allowed:
            report = make_report(
                result, trace=self._trace.name, policy="", seed=self._seed, rate_scale=scale, slo=self._slo
            )
        if self._tell is not None:
            self._tell(candidate, scale, report)
        return report


def _splits(num_gpus: int, prefill: StepProfile, decode: StepProfile) -> list[Candidate]:
    """Of two pools that use as many of the GPUs as they can, with fewer prefill workers first."""
    prefill_gpus, decode_gpus = prefill.measured.tensor_parallel, decode.measured.tensor_parallel
    counts: Iterable[int] = range(1, (num_gpus - decode_gpus) // prefill_gpus + 1)
    return [Candidate(count, (num_gpus - count * prefill_gpus) // decode_gpus, prefill, decode) for count in counts]
