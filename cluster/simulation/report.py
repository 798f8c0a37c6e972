"""The figures of a simulation, for people and as JSON."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cluster.simulation.router import Outcome
from cluster.simulation.simulation import Result


@dataclass(frozen=True, slots=True)
class Slo:
    """Both in seconds: to the first token, and for each later one in the mean."""

    ttft_s: float = 2.0
    tpot_s: float = 0.05

    def kept(self, outcome: Outcome) -> bool:
        ttft, tpot = outcome.ttft, outcome.tpot
        return ttft is not None and tpot is not None and ttft <= self.ttft_s and tpot <= self.tpot_s


@dataclass(frozen=True, slots=True)
class Percentiles:
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class PoolReport:
    workers: int
    gpus: int
    kv_tokens: int  # that each has room for
    busy_share: float  # of the time until the last request was over
    steps: int


@dataclass(frozen=True, slots=True)
class GroupReport:
    """Of the requests of one tenant, or of one priority."""

    requests: int
    goodput: float
    refused: int
    ttft_s: Percentiles | None
    tpot_s: Percentiles | None


@dataclass(frozen=True, slots=True)
class Report:
    """Times in seconds unless the name says otherwise; `None` where there is nothing to take a percentile of."""

    trace: str
    policy: str
    seed: int
    rate_scale: float
    routers: int
    slo: Slo
    requests: int
    finished: int
    goodput: float  # share of all requests that kept both limits; rejects are misses
    goodput_per_s: float  # such requests per second of arrivals
    goodput_per_s_per_gpu: float
    ttft_s: Percentiles | None
    tpot_s: Percentiles | None
    hit_rate: float  # tokens found cached where the prompt was prefilled, of all prompt tokens
    local_prefills: int
    transferred_bytes: int
    retried: int
    rejects: dict[str, int]  # by reason
    pools: dict[str, PoolReport]
    tenants: dict[str, GroupReport]  # where there are several
    priorities: dict[str, GroupReport]  # likewise, the most urgent first
    decision_us: Percentiles | None  # of real time on this machine
    arrivals_s: float
    simulated_s: float
    wall_s: float

    @property
    def speed_up(self) -> float:
        return self.simulated_s / self.wall_s if self.wall_s else 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"speed_up": self.speed_up}


def make_report(result: Result, *, trace: str, policy: str, seed: int, rate_scale: float, slo: Slo) -> Report:
    outcomes = result.outcomes
    finished = [each for each in outcomes if each.finished is not None]
    kept = sum(slo.kept(each) for each in outcomes)
    arrivals_s = outcomes[-1].arrived - outcomes[0].arrived if len(outcomes) > 1 else 0.0
    gpus = sum(pool.num_workers * pool.gpus for pool in result.setup.pools)
    goodput_per_s = kept / arrivals_s if arrivals_s else 0.0
    num_prompt_tokens = sum(each.num_prompt_tokens for each in finished)
    return Report(
        trace=trace,
        policy=policy,
        seed=seed,
        rate_scale=rate_scale,
        routers=result.setup.num_routers,
        slo=slo,
        requests=len(outcomes),
        finished=len(finished),
        goodput=kept / max(1, len(outcomes)),
        goodput_per_s=goodput_per_s,
        goodput_per_s_per_gpu=goodput_per_s / max(1, gpus),
        ttft_s=_ttft(outcomes),
        tpot_s=_tpot(outcomes),
        hit_rate=sum(each.cached_tokens for each in finished) / max(1, num_prompt_tokens),
        local_prefills=sum(each.prefill_worker is None for each in finished),
        transferred_bytes=sum(each.transferred_bytes for each in outcomes),
        retried=sum(each.num_attempts > 1 for each in outcomes),
        rejects=dict(Counter(each.refused for each in outcomes if each.refused)),
        pools=_pools(result),
        tenants=_groups(outcomes, lambda each: each.hints.tenant, slo),
        priorities=_groups(outcomes, lambda each: each.hints.priority, slo),
        decision_us=percentiles([seconds * 1e6 for seconds in result.decision_s]),
        arrivals_s=arrivals_s,
        simulated_s=result.seconds,
        wall_s=result.wall_s,
    )


def _groups(outcomes: Sequence[Outcome], key: Callable[[Outcome], Any], slo: Slo) -> dict[str, GroupReport]:
    groups: dict[Any, list[Outcome]] = {}
    for each in outcomes:
        groups.setdefault(key(each), []).append(each)
    if len(groups) < 2:
        return {}
    return {
        str(name): GroupReport(
            requests=len(group),
            goodput=sum(map(slo.kept, group)) / len(group),
            refused=sum(bool(each.refused) for each in group),
            ttft_s=_ttft(group),
            tpot_s=_tpot(group),
        )
        for name, group in sorted(groups.items())
    }


def _ttft(outcomes: Sequence[Outcome]) -> Percentiles | None:
    return percentiles([each.ttft for each in outcomes if each.ttft is not None])


def _tpot(outcomes: Sequence[Outcome]) -> Percentiles | None:
    return percentiles([each.tpot for each in outcomes if each.tpot is not None])


def percentiles(values: Sequence[float]) -> Percentiles | None:
    if not values:
        return None
    p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
    return Percentiles(p50, p90, p99)


def _pools(result: Result) -> dict[str, PoolReport]:
    return {
        pool.role: PoolReport(
            pool.num_workers,
            pool.num_workers * pool.gpus,
            pool.num_blocks * pool.block_size,
            result.busy_s[pool.role] / (pool.num_workers * result.seconds) if result.seconds else 0.0,
            result.num_steps[pool.role],
        )
        for pool in result.setup.pools
        if pool.num_workers
    }
