"""`baton plan`: how to split GPUs into prefill and decode workers for a trace and latency limits, by simulation."""

import json
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from baton.simulate_command import (
    DEFAULT_PROFILE,
    Bandwidth,
    Seed,
    SloText,
    SpecFile,
    TraceFile,
    need_writable,
    parse_slo,
    read_trace,
    step_profile,
    transfer_speed,
)
from cluster.spec import ClusterSpec, SloSpec
from cluster.spec_errors import SpecError
from cluster.spec_file import load_spec, parse_spec, plain_data

if TYPE_CHECKING:  # numpy and the router are imported when the command runs
    from cluster.simulation.plan import Candidate, Rated
    from cluster.simulation.report import Report
    from cluster.simulation.simulation import Setup
    from engine.step_profile import StepProfile

FEW_REQUESTS, FEW_SECONDS = 100, 30.0  # of a trace, below which the arrivals drawn decide more than the split


def plan_command(
    spec: SpecFile,
    trace: TraceFile,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="How many there are to split. [default: those of the spec's workers]"),
    ] = None,
    slo: SloText = "ttft=2,tpot=0.05",
    profile: Annotated[
        list[str] | None,
        typer.Option(
            "--profile",
            metavar="NAME_OR_FILE",
            help="Measured step times; again for each other tensor parallel size to try. "
            f"[default: simulated.profile, or {DEFAULT_PROFILE}]",
        ),
    ] = None,
    attainment: Annotated[
        float, typer.Option(help="Share of requests that must keep both limits at the rate searched for.")
    ] = 0.9,
    max_requests: Annotated[int, typer.Option(min=1, help="Only the first requests of the trace.")] = 2000,
    seed: Seed = 0,
    bandwidth: Bandwidth = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Write all candidates.")] = None,
) -> None:
    """Search the split of GPUs that serves the most requests in time, per GPU.

    Tries numbers of prefill and decode workers, each with every profile given, and one pool of workers that do both;
    of each the highest rate of the trace at which enough requests keep the limits of --slo. The spec says everything
    else: kv_cache.memory is what each GPU has, and of its numbers of replicas the sum counts where there is no --gpus.
    """
    if not 0 < attainment < 1:
        raise SpecError([f"--attainment: {attainment:g} is not allowed; allowed: between 0 and 1"])
    need_writable("--json", json_file)
    from cluster.routing import make_policy
    from cluster.simulation.plan import Planner
    from cluster.simulation.setup import make_setup

    loaded, requests, limits = load_spec(spec), read_trace(trace, max_requests), parse_slo(slo)
    if len(requests.requests) < 2:
        raise SpecError([f"--trace: {trace} holds one request, which has no rate; allowed: at least two"])
    profiles = _profiles(loaded, profile)
    if gpus is None:
        gpus = (loaded.prefill.replicas + loaded.decode.replicas) * profiles[0].measured.tensor_parallel
    # Routers of a cluster with these limits would be told them.
    told = SloSpec(ttft_s=limits.ttft_s, tpot_s=limits.tpot_s)

    def setup(candidate: "Candidate") -> "Setup":
        return make_setup(
            _with_replicas(loaded, candidate),
            {"prefill": candidate.prefill, "decode": candidate.decode},
            policy=lambda: make_policy(loaded.router, told),
            speed=transfer_speed(candidate.decode, bandwidth),
        )

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True, highlight=False)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("simulating", total=None)

        def tell(candidate: "Candidate", scale: float, report: "Report | None") -> None:
            said = "too many miss" if report is None else f"{report.goodput:.1%} in time"
            bar.update(task, description=f"{candidate.name} at {scale:.2f} times the trace's rate: {said}")

        policy = loaded.router.policy
        planner = Planner(setup, requests, limits, policy=policy, attainment=attainment, seed=seed, tell=tell)
        rated = planner.search(gpus, profiles)
    if not rated:
        raise SpecError([f"--gpus: {gpus} is fewer than one worker of the profile has"])
    out = Console(highlight=False)
    out.print(plan_table(rated, f"{requests.name}, {gpus} GPUs, {attainment:.0%} within {slo}"))
    for line in verdict(rated, profiles):
        out.print(line)
    if len(requests.requests) < FEW_REQUESTS or requests.seconds < FEW_SECONDS:
        few = f"{len(requests.requests)} requests in {requests.seconds:.0f} s"
        out.print(f"the trace has only {few}: what it says of rates is mostly chance", style="yellow")
    if json_file is not None:
        json_file.write_text(json.dumps([_data(each) for each in rated], indent=2) + "\n", encoding="utf-8")


def _profiles(spec: ClusterSpec, names: list[str] | None) -> "list[StepProfile]":
    profiles = [step_profile(spec, name) for name in names or (None,)]
    sizes = [each.measured.tensor_parallel for each in profiles]
    if len(set(sizes)) < len(sizes):
        raise SpecError([f"--profile: tensor_parallel {sizes} are not all different; give one profile for each size"])
    return profiles


def _with_replicas(spec: ClusterSpec, candidate: "Candidate") -> ClusterSpec:
    data = plain_data(spec)
    for role, count in (("prefill", candidate.num_prefill), ("decode", candidate.num_decode)):
        data[role] = data.get(role, {}) | {"replicas": count}
    return parse_spec(data)


def plan_table(rated: "list[Rated]", title: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("workers", overflow="fold")
    for name in ("in time\nreq/s", "per\nGPU", "TTFT\np90, s", "TPOT\np90, ms", "cached", "busy, %\nP / D"):
        table.add_column(name, justify="right", min_width=max(map(len, name.split("\n"))))
    for place, each in enumerate(rated):
        report = each.report
        if report is None or report.ttft_s is None or report.tpot_s is None:
            table.add_row(each.candidate.name, "none", "0", *[""] * 4)
            continue
        pools = [report.pools.get(role) for role in ("prefill", "decode")]
        table.add_row(
            each.candidate.name,
            f"{report.goodput_per_s:.2f}",
            f"{each.per_gpu:.3f}",
            f"{report.ttft_s.p90:.2f}",
            f"{report.tpot_s.p90 * 1e3:.1f}",
            f"{report.hit_rate:.1%}",
            " / ".join(f"{pool.busy_share * 100:.0f}" for pool in pools if pool is not None),
            style="bold" if place == 0 else None,
        )
    return table


def verdict(rated: "list[Rated]", profiles: "list[StepProfile]") -> list[str]:
    """What to do, in words."""
    from cluster.simulation.plan import PRECISION

    best = rated[0]
    if best.report is None:
        return ["no candidate keeps the limits for enough requests, at any rate"]
    lines = [f"best: {best.candidate.name}, {best.per_gpu:.3f} requests/s in time per GPU"]
    other = next((each for each in rated if each.candidate.colocated != best.candidate.colocated), None)
    if other is not None:
        if best.clearly_above(other):
            better = "one colocated pool is" if best.candidate.colocated else "separate pools are"
            margin = f"{fmean(best.draws) / fmean(other.draws) - 1:.0%}" if other.per_gpu else "far"
            lines.append(f"{better} better here: {margin} above {other.candidate.name}")
        else:
            lines.append("no clear difference between one colocated pool and separate pools here")
        lines.append(f"at {len(best.draws)} draws of the arrivals, rates searched in steps of {PRECISION - 1:.0%}:")
        lines += [f"  {min(each.draws):.3f} to {max(each.draws):.3f}, {each.candidate.name}" for each in (best, other)]
    if len(profiles) == 1:
        size = profiles[0].measured.tensor_parallel
        lines.append(f"other TP sizes than {size} are not searched: there is no profile of them (--profile)")
    return lines


def _data(rated: "Rated") -> dict[str, Any]:
    candidate = rated.candidate
    return {
        "prefill_workers": candidate.num_prefill,
        "prefill_tensor_parallel": candidate.prefill.measured.tensor_parallel,
        "decode_workers": candidate.num_decode,
        "decode_tensor_parallel": candidate.decode.measured.tensor_parallel,
        "gpus": candidate.gpus,
        "rate_scale": rated.rate_scale,
        "goodput_per_s_per_gpu": rated.per_gpu,
        "goodput_per_s_per_gpu_draws": list(rated.draws),
        "report": asdict(rated.report) if rated.report is not None else None,
    }
