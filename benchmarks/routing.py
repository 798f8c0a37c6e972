"""Baton's routing against other systems' rules on the same simulated workers, trace and arrivals.

The load is the one at which round robin serves half of the requests in time, found by bisection. Every rule gets the
same workers, reports, index and decode-first admission (cluster/simulation/baselines.py), and the same arrivals, drawn
anew for each seed. `prefix_aware` is Baton's own policy; `-local` does without local prefill, `+slo` is told the limits
(router.slo), so that it refuses what it cannot serve in time; `bound` is what no rule can beat on TTFT alone
(cluster/simulation/bound.py).

    python -m benchmarks.routing --trace conversation_trace.jsonl
    python -m benchmarks.routing --trace conversation_trace.jsonl --replicas 1 2 4 8
    python -m benchmarks.routing --trace conversation_trace.jsonl --sizes 10 100 1000
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from baton.simulate_command import MAX_RATE_SCALE, MIN_RATE_SCALE
from baton.step_profiles import load_profile
from cluster.simulation.bound import goodput_bound
from cluster.simulation.report import Slo, make_report
from cluster.simulation.setup import BASELINES, make_setup, policy_maker
from cluster.simulation.simulation import Simulation
from cluster.simulation.trace import TraceError, load_trace
from cluster.simulation.transfer import TransferSpeed
from cluster.spec import ROLES
from cluster.spec_file import parse_spec

BATON = "prefix_aware"
BATON_SLO = "prefix_aware+slo"
BATON_NO_LOCAL = "prefix_aware-local"
RULES = ("round_robin", "least_loaded", "prefix_only", "sglang", "dynamo", "mooncake", BATON_NO_LOCAL, BATON, BATON_SLO)
BOUND = "bound"
LINK_LATENCY_S = 0.0002
COLUMNS = ("goodput", "seeds", "TTFT p50", "p90", "p99 s", "TPOT p50", "p99 ms", "hits", "busy", "refused", "retried")


@dataclass(frozen=True, slots=True)
class Case:
    trace: Path
    rule: str
    seed: int
    rate_scale: float
    num_prefill: int
    num_decode: int
    kv_memory: str
    profile: str
    bandwidth: float
    slo: Slo
    num_routers: int
    max_requests: int | None


def run(case: Case) -> dict[str, Any]:
    """The report of one simulation, as JSON."""
    router: dict[str, Any] = {"policy": BATON}
    if case.rule == BATON_SLO:
        router["slo"] = {"ttft_s": case.slo.ttft_s, "tpot_s": case.slo.tpot_s}
    if case.rule == BATON_NO_LOCAL:
        router["local_prefill_max_tokens"] = 0
    spec = parse_spec(
        {
            "model": case.profile,
            "kv_cache": {"memory": case.kv_memory},
            "prefill": {"replicas": case.num_prefill},
            "decode": {"replicas": case.num_decode},
            "router": router,
        }
    )
    profile = load_profile(case.profile)
    setup = make_setup(
        spec,
        dict.fromkeys(ROLES, profile),
        policy=policy_maker(spec, case.rule if case.rule in (*BASELINES, "round_robin", "least_loaded") else None),
        speed=TransferSpeed(case.bandwidth * 1e9, LINK_LATENCY_S),
        num_routers=case.num_routers,
    )
    trace = load_trace(case.trace, case.max_requests)
    if case.rule == BOUND:
        return {"goodput": goodput_bound(setup, trace, case.seed, case.rate_scale, case.slo.ttft_s)}
    simulation = Simulation(setup, trace, seed=case.seed, rate_scale=case.rate_scale)
    result = simulation.run()
    simulation.check_invariants()
    report = make_report(
        result, trace=trace.name, policy=case.rule, seed=case.seed, rate_scale=case.rate_scale, slo=case.slo
    )
    return report.to_json()


def run_all(cases: Sequence[Case], processes: int) -> list[dict[str, Any]]:
    """In processes of their own; a line for each on stderr."""
    reports = []
    with ProcessPoolExecutor(processes) as pool:
        for case, report in zip(cases, pool.map(run, cases), strict=True):
            reports.append(report)
            print(f"{case.rule} seed {case.seed} x {case.rate_scale:.3f}: {report['goodput']:.1%}", file=sys.stderr)
    return reports


def half_load(case: Case) -> float:
    """The rate scale at which round robin serves half of the requests in time, within 1 %: its goodput falls with the
    rate."""
    low, high, scale = 0.0, math.inf, case.rate_scale
    while MIN_RATE_SCALE < scale < MAX_RATE_SCALE:
        goodput = run_all([replace(case, rule="round_robin", rate_scale=scale)], 1)[0]["goodput"]
        if abs(goodput - 0.5) <= 0.01 or high <= 1.005 * low:
            return scale
        if goodput > 0.5:
            low = scale
        else:
            high = scale
        scale = (low + high) / 2 if high < math.inf else 2 * low
    share = "more" if low else "less"
    raise SystemExit(f"round robin serves {share} than half of the requests in time at any rate: say --rate-scale")


def compare(base: Case, rules: Sequence[str], seeds: Sequence[int], processes: int) -> list[dict[str, Any]]:
    cases = [replace(base, rule=rule, seed=seed) for rule in (*rules, BOUND) for seed in seeds]
    reports = run_all(cases, processes)
    table = Table(
        title=f"{base.trace.stem} x {base.rate_scale:.2f}, {base.num_prefill} prefill, {base.num_decode} decode workers"
    )
    add_columns(table, "rule", "left")
    for rule in (*rules, BOUND):
        mine = [report for case, report in zip(cases, reports, strict=True) if case.rule == rule]
        table.add_row(rule, *row(mine))
    Console(width=140).print(table)
    return [{"rule": case.rule, "seed": case.seed} | report for case, report in zip(cases, reports, strict=True)]


def add_columns(table: Table, first: str, justify: Literal["left", "right"]) -> None:
    """For `row`, and a first one."""
    table.add_column(first, justify=justify, no_wrap=True)
    for heading in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)


def row(reports: Sequence[dict[str, Any]]) -> Iterable[str]:
    goodputs = [report["goodput"] for report in reports]
    yield f"{statistics.mean(goodputs):.1%}"
    yield f"{min(goodputs):.1%} to {max(goodputs):.1%}"
    if "ttft_s" not in reports[0]:
        return
    for name, percentile, unit in (
        ("ttft_s", "p50", 1.0),
        ("ttft_s", "p90", 1.0),
        ("ttft_s", "p99", 1.0),
        ("tpot_s", "p50", 1e3),
        ("tpot_s", "p99", 1e3),
    ):
        yield f"{statistics.mean(report[name][percentile] for report in reports) * unit:.2f}"
    yield f"{statistics.mean(report['hit_rate'] for report in reports):.1%}"
    yield f"{statistics.mean(map(_busy, reports)):.0%}"
    requests = sum(report["requests"] for report in reports)
    yield f"{sum(sum(report['rejects'].values()) for report in reports) / requests:.1%}"
    yield f"{sum(report['retried'] for report in reports) / requests:.1%}"


def _busy(report: dict[str, Any]) -> float:
    """The part of their time that prefill workers compute; of all workers where they are one pool."""
    pools = report["pools"]
    busy: float = pools.get("prefill", pools["decode"])["busy_share"]
    return busy


def replicas(base: Case, counts: Sequence[int], seeds: Sequence[int], processes: int) -> list[dict[str, Any]]:
    cases = [replace(base, num_routers=count, rule=BATON, seed=seed) for count in counts for seed in seeds]
    reports = run_all(cases, processes)
    table = Table(title=f"{base.trace.stem} x {base.rate_scale:.2f}: router replicas that do not talk to each other")
    add_columns(table, "replicas", "right")
    for count in counts:
        mine = [report for case, report in zip(cases, reports, strict=True) if case.num_routers == count]
        table.add_row(str(count), *row(mine))
    Console(width=140).print(table)
    return [{"replicas": case.num_routers, "seed": case.seed} | each for case, each in zip(cases, reports, strict=True)]


def sizes(base: Case, totals: Sequence[int]) -> list[dict[str, Any]]:
    """One after the other, as decisions are timed. The load per worker is the same for all sizes."""
    table = Table(title=f"{base.trace.stem}: decisions by the number of workers, half of them prefill")
    for heading in ("workers", "decision p50", "p90", "p99 us", "requests/s", "goodput", "hits", "times real time"):
        table.add_column(heading, justify="right", no_wrap=True)
    found = []
    scale = base.rate_scale / (base.num_prefill + base.num_decode)
    for total in totals:
        report = run(replace(base, num_prefill=total // 2, num_decode=total - total // 2, rate_scale=scale * total))
        spent = report["decision_us"]
        table.add_row(
            str(total),
            *(f"{spent[each]:.0f}" for each in ("p50", "p90", "p99")),
            f"{report['requests'] / report['arrivals_s']:.0f}",
            f"{report['goodput']:.1%}",
            f"{report['hit_rate']:.1%}",
            f"{report['speed_up']:.1f}",
        )
        found.append({"workers": total} | report)
    Console(width=140).print(table)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trace = Path(__file__).parents[2] / "shared/traces/mooncake_conversation_trace.jsonl"
    parser.add_argument("--trace", type=Path, default=trace if trace.exists() else None)
    parser.add_argument("--prefill", type=int, default=8)
    parser.add_argument("--decode", type=int, default=8)
    parser.add_argument("--kv-memory", default="100GiB", help="of each worker")
    parser.add_argument("--profile", default="h200-llama-3-8b")
    parser.add_argument("--bandwidth", type=float, default=50.0, help="GB/s of each worker's link for KV")
    parser.add_argument("--ttft", type=float, default=2.0, help="limit in seconds")
    parser.add_argument("--tpot", type=float, default=0.05, help="limit in seconds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rate-scale", type=float, help="instead of looking for the load")
    parser.add_argument("--max-requests", type=int)
    parser.add_argument("--rules", nargs="+", default=RULES, choices=RULES)
    parser.add_argument("--replicas", type=int, nargs="+", help="compare numbers of routers instead of rules")
    parser.add_argument("--sizes", type=int, nargs="+", help="compare numbers of workers instead of rules")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.trace is None:
        parser.error("--trace: give a trace of requests; Mooncake and Azure publish such traces")
    try:
        load_trace(args.trace, args.max_requests)
    except (OSError, TraceError) as error:
        parser.error(f"--trace: {args.trace}: {error}")
    slo = Slo(args.ttft, args.tpot)
    case = Case(
        args.trace, BATON, args.seeds[0], args.rate_scale or 4.0, args.prefill, args.decode, args.kv_memory,
        args.profile, args.bandwidth, slo, 1, args.max_requests,
    )  # fmt: skip
    if args.rate_scale is None:
        case = replace(case, rate_scale=half_load(case))
    if args.replicas:
        found = replicas(case, args.replicas, args.seeds, args.processes)
    elif args.sizes:
        found = sizes(case, args.sizes)
    else:
        found = compare(case, args.rules, args.seeds, args.processes)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
