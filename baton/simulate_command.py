"""`baton simulate`: a cluster's answer to a trace of requests, in seconds, on any machine.

The router's policy, index and queue and the workers' schedulers, block pools and leases are the real ones; the steps of
the model are replaced by their measured durations, and time is virtual.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from heapq import nlargest
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from baton.step_profiles import load_profile
from cluster.spec import ClusterSpec
from cluster.spec_errors import SpecError
from cluster.spec_file import load_spec

if TYPE_CHECKING:  # numpy and the router are imported when the command runs
    from cluster.simulation.report import Percentiles, Report, Slo
    from cluster.simulation.trace import Trace
    from cluster.simulation.transfer import TransferSpeed
    from engine.step_profile import StepProfile

DEFAULT_PROFILE = "h200-llama-3-8b"
MAX_SLO_S = 86400
MIN_BANDWIDTH = 0.001  # GB/s: below that a simulation does little but renew leases
MAX_ROUTERS = 256
MIN_RATE_SCALE, MAX_RATE_SCALE = 0.001, 1_000_000  # an hour in six weeks, and all at once
MAX_GROUPS = 12  # tenants, or priorities, that the table shows; JSON has all
POLICIES = "prefix_aware, round_robin, least_loaded, prefix_only, sglang, dynamo, mooncake"

SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="The cluster's spec.")]
TraceFile = Annotated[
    Path,
    typer.Option("--trace", metavar="FILE", help="Requests: Mooncake's JSON lines, or Azure's 2023 CSV."),
]
ProfileName = Annotated[
    str | None,
    typer.Option(
        "--profile",
        metavar="NAME_OR_FILE",
        help=f"Measured step times, from `baton profile`. [default: simulated.profile, or {DEFAULT_PROFILE}]",
    ),
]
SloText = Annotated[
    str,
    typer.Option(
        "--slo",
        metavar="ttft=S,tpot=S",
        help="A request counts for goodput when both are kept: seconds to its first token, and per later token.",
    ),
]
RateScale = Annotated[float, typer.Option(help="Requests come this many times as fast as in the trace.")]
Seed = Annotated[
    int,
    typer.Option(min=0, help="Draws the arrivals within windows of 3 s, and the router of each request."),
]
MaxRequests = Annotated[int | None, typer.Option(min=1, help="Only the first requests of the trace.")]
Bandwidth = Annotated[
    float | None,
    typer.Option(help="GB/s of one worker's link for KV. [default: the profile's transfer, measured on one card]"),
]


def simulate_command(
    spec: SpecFile,
    trace: TraceFile,
    profile: ProfileName = None,
    policy: Annotated[str | None, typer.Option(help=f"Instead of the spec's: {POLICIES}.")] = None,
    slo: SloText = "ttft=2,tpot=0.05",
    rate_scale: RateScale = 1.0,
    seed: Seed = 0,
    routers: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_ROUTERS,
            help="Routers, of which each knows only what it sent itself. [default: router.workers]",
        ),
    ] = None,
    max_requests: MaxRequests = None,
    bandwidth: Bandwidth = None,
    block_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of a simulated KV block. [default: the spec's, at least 128: finer ones cost time]"
        ),
    ] = None,
    bound: Annotated[
        bool, typer.Option("--bound", help="Also say what share of requests any policy could serve in time at most.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Write the report.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="OUT.png", help="Draw it. Needs matplotlib: pip install 'baton-serve[plot]'.")
    ] = None,
) -> None:
    """Run a trace of requests through a simulated cluster and report goodput, latencies and hit rates.

    The pools, limits, policy and KV memory are the spec's; how long a step takes is measured (`baton profile`). Goodput
    is the share of all requests that keep both limits of --slo; requests refused are misses.
    """
    if not MIN_RATE_SCALE <= rate_scale <= MAX_RATE_SCALE:
        allowed = f"from {MIN_RATE_SCALE} to {MAX_RATE_SCALE}"
        raise SpecError([f"--rate-scale: {rate_scale:g} is not allowed; allowed: {allowed}"])
    need_writable("--json", json_file)
    if plot is not None:
        need_plot(plot)
    from cluster.simulation.report import make_report
    from cluster.simulation.setup import make_setup, policy_maker
    from cluster.simulation.simulation import Simulation

    loaded, requests = load_spec(spec), read_trace(trace, max_requests)
    measured = step_profile(loaded, profile)
    setup = make_setup(
        loaded,
        {"prefill": measured, "decode": measured},
        policy=policy_maker(loaded, policy),
        speed=transfer_speed(measured, bandwidth),
        num_routers=routers,
        block_size=block_size,
    )
    console = Console(stderr=True, highlight=False)
    limits = parse_slo(slo)
    with progress_bar(console, "simulating", len(requests.requests)) as advance:
        simulation = Simulation(setup, requests, seed=seed, rate_scale=rate_scale, watch=advance)
        result = simulation.run()
    simulation.check_invariants()
    name = policy or loaded.router.policy
    report = make_report(result, trace=requests.name, policy=name, seed=seed, rate_scale=rate_scale, slo=limits)
    data = report.to_json()
    out = Console(highlight=False)
    out.print(report_table(report))
    if bound:
        from cluster.simulation.bound import goodput_bound

        asked = (setup, requests, seed, rate_scale, limits.ttft_s)
        data["goodput_bound"] = share = goodput_bound(*asked)
        out.print(f"no policy on these workers serves more than {share:.1%} in time (TTFT alone)")
        if loaded.prefill.replicas:
            data["goodput_bound_separate"] = share = goodput_bound(*asked, roles=("prefill",))
            out.print(f"no policy that prefills on prefill workers only serves more than {share:.1%}")
    if json_file is not None:
        json_file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    if plot is not None:
        from cluster.simulation.plot import save_plot

        save_plot(plot, result, report)


def need_writable(option: str, path: Path | None) -> None:
    """Before the work rather than after it. Raises SpecError."""
    if path is not None and (path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK)):
        raise SpecError([f"{option}: {path} cannot be written; allowed: a file in a directory that is there"])


def need_plot(path: Path) -> None:
    """As need_writable. Loads matplotlib, which knows what it can write."""
    need_writable("--plot", path)
    if find_spec("matplotlib") is None:
        raise SpecError(["--plot: needs matplotlib; install it with: pip install 'baton-serve[plot]'"])
    from cluster.simulation.plot import FORMATS

    if path.suffix[1:].lower() not in FORMATS:
        suffixes = ", ".join(f".{name}" for name in sorted(FORMATS))
        raise SpecError([f"--plot: {path} is not allowed; allowed: a file whose suffix says its format: {suffixes}"])


def read_trace(path: Path, max_requests: int | None) -> "Trace":
    """Raises SpecError."""
    from cluster.simulation.trace import TraceError, load_trace

    try:
        return load_trace(path, max_requests)
    except OSError as error:
        raise SpecError([f"--trace: {path} cannot be read: {error.strerror}"]) from None
    except TraceError as error:
        raise SpecError([f"--trace: {path}: {error}"]) from None


def step_profile(spec: ClusterSpec, name: str | None) -> "StepProfile":
    if name is not None:
        return load_profile(name, "--profile")
    return load_profile(spec.simulated.profile or DEFAULT_PROFILE)


def transfer_speed(profile: "StepProfile", bandwidth: float | None) -> "TransferSpeed | None":
    from cluster.simulation.transfer import TransferSpeed

    if bandwidth is None:
        return None
    if not MIN_BANDWIDTH <= bandwidth < math.inf:
        raise SpecError([f"--bandwidth: {bandwidth:g} is not allowed; allowed: finite, at least {MIN_BANDWIDTH}"])
    transfer = profile.measured.transfer
    return TransferSpeed(bandwidth * 1e9, transfer.latency_s if transfer else 0.0)


def parse_slo(text: str) -> "Slo":
    """Raises SpecError."""
    from cluster.simulation.report import Slo

    values: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            seconds = float(value)
        except ValueError:
            seconds = 0.0
        values[name.strip()] = 0.0 if name.strip() in values else seconds
    if set(values) != {"ttft", "tpot"} or not all(0 < value <= MAX_SLO_S for value in values.values()):
        allowed = f"both once, in seconds, above 0 and at most {MAX_SLO_S}, such as ttft=2,tpot=0.05"
        raise SpecError([f"--slo: {text!r} is not allowed; allowed: {allowed}"])
    return Slo(values["ttft"], values["tpot"])


@contextmanager
def progress_bar(console: Console, what: str, total: int) -> Iterator[Callable[[object], bool]]:
    """Yields the function that is told of each that is done, and says to go on. Gone when done; terminals only."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)

        def advance(_done: object) -> bool:
            bar.advance(task)
            return True

        yield advance


def report_table(report: "Report") -> Table:
    title = f"{_shown(report.trace)} x {report.rate_scale:g}, {report.policy}"
    table = Table(title=title, show_header=False, title_justify="left")
    slo = report.slo
    table.add_row(
        "goodput", f"{report.goodput:.1%} of {report.requests} requests (TTFT {slo.ttft_s:g} s, TPOT {slo.tpot_s:g} s)"
    )
    table.add_row("", f"{report.goodput_per_s:.2f} requests/s, {report.goodput_per_s_per_gpu:.3f} per GPU")
    table.add_row("TTFT p50 / p90 / p99", _line(report.ttft_s, 1.0, "{:.3f}", "s"))
    table.add_row("TPOT p50 / p90 / p99", _line(report.tpot_s, 1e3, "{:.2f}", "ms"))
    table.add_row("prompt tokens cached", f"{report.hit_rate:.1%}")
    table.add_row(
        "KV moved", f"{report.transferred_bytes / 1e9:.0f} GB; {report.local_prefills} prompts prefilled in place"
    )
    for role, pool in report.pools.items():
        work = f"{pool.workers}, busy {pool.busy_share:.1%} of the time, {pool.steps} steps"
        table.add_row(f"{role} workers", f"{work}\nKV of {pool.kv_tokens:,} tokens each")
    for what, groups in (("tenant", report.tenants), ("priority", report.priorities)):
        large = set(nlargest(MAX_GROUPS, groups, key=lambda name: groups[name].requests))
        for name, group in groups.items():
            if name in large:
                ttft = _line(group.ttft_s, 1.0, "{:.3f}", "s")
                goodput = f"{group.goodput:.1%} of {group.requests}, {group.refused} refused"
                table.add_row(f"{what} {_shown(name)}" if name else f"no {what}", f"{goodput}\nTTFT {ttft}")
        if len(groups) > len(large):
            table.add_row("", f"and {len(groups) - len(large)} more")
    if report.rejects:
        table.add_row("refused", "; ".join(f"{count}: {reason}" for reason, count in report.rejects.items()))
    table.add_row("decision p50 / p90 / p99", _line(report.decision_us, 1.0, "{:.0f}", "us, on this machine"))
    table.add_row(
        "simulated", f"{report.simulated_s:.0f} s in {report.wall_s:.1f} s: {report.speed_up:.0f} times real time"
    )
    return table


def _shown(name: str) -> str:
    """A name from a trace, as the terminal may have it."""
    return escape(name if name.isprintable() else ascii(name))


def _line(values: "Percentiles | None", unit: float, form: str, name: str) -> str:
    if values is None:
        return "none"
    return " / ".join(form.format(each * unit) for each in (values.p50, values.p90, values.p99)) + f" {name}"
