"""The `baton` command: parses, loads the spec, hands over. Environment and arguments are read here.

Exit status: 0, 1 for what failed while running, 2 for wrong usage or a wrong spec. What a command does not need is
imported inside the commands that do, so that `baton --help` is instant and `baton up` loads no model code.
"""

import asyncio
import json
import logging
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from baton.chat import chat_command
from baton.demo import demo_command
from baton.engine_command import engine_app
from baton.generate import generate_command
from baton.plan_command import plan_command
from baton.profile_command import profile_command
from baton.simulate_command import simulate_command
from cluster.credentials import check_secrets
from cluster.run_dir import with_run_dir
from cluster.spec import ClusterSpec, Role
from cluster.spec_errors import SpecError
from cluster.spec_file import explained_yaml, load_spec, parse_spec, plain_data
from cluster.supervisor import ClusterFailed

DISTRIBUTION = "baton-serve"
DEFAULT_URL = "http://127.0.0.1:8000"
LOG_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"

SpecFile = Annotated[
    Path, typer.Option("--spec", metavar="SPEC", help="The cluster's spec; `baton spec` prints every field.")
]
Index = Annotated[int, typer.Option(min=0, help="Which replica this is, from 0. Each needs its own.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log debug messages too.")]

app = typer.Typer(
    help="Serve language models with prefill and decode on separate workers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo_command)
app.command("chat")(chat_command)
app.command("generate")(generate_command)
app.command("profile")(profile_command)
app.command("simulate")(simulate_command)
app.command("plan")(plan_command)
app.add_typer(engine_app, name="engine")


def main() -> None:
    """Entry point: what users can correct is said in words, without a traceback."""
    try:
        app()
    except SpecError as error:
        _fail(error.problems, 2)
    except (ClusterFailed, ConnectionError, OSError) as error:
        _fail([str(error)], 1)


def _fail(lines: list[str], status: int) -> None:
    for line in lines:
        typer.echo(f"baton: {line}", err=True)
    sys.exit(status)


def _load(path: Path) -> ClusterSpec:
    """The spec with the run directory that every command of the cluster agrees on."""
    return with_run_dir(load_spec(path), os.environ)


@app.command()
def up(
    spec: Annotated[Path, typer.Argument(help="The cluster's spec. One line is enough: model: PATH.")],
    port: Annotated[int | None, typer.Option(help="HTTP port, instead of the spec's; 0: any free one.")] = None,
) -> None:
    """Start a whole cluster on this machine and serve until Ctrl-C."""
    data = plain_data(load_spec(spec))
    if port is not None:
        data["router"] = data.get("router", {}) | {"port": port}
    asyncio.run(_up(parse_spec(data)))


async def _up(spec: ClusterSpec) -> None:
    from cluster.launcher import LocalCluster

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    cluster = LocalCluster(
        spec, progress=console.is_terminal, report=lambda ended: console.print(str(ended), markup=False)
    )
    async with cluster:
        console.print(f"serving {cluster.spec.public_model_name} at {cluster.url} until Ctrl-C", markup=False)
        console.print(f"logs: {cluster.run_dir / 'logs'}", markup=False)
        await cluster.wait()
        console.print("stopping")


@app.command()
def router(
    spec: SpecFile,
    index: Index = 0,
    workers: Annotated[
        int | None, typer.Option(min=1, max=256, help="Processes that share the port. [default: router.workers]")
    ] = None,
    process: Annotated[
        int | None, typer.Option(min=0, hidden=True, help="Which of these processes this is, from 0.")
    ] = None,
    metrics_dir: Annotated[Path | None, typer.Option(hidden=True, help="Where they share their metrics.")] = None,
    verbose: Verbose = False,
) -> None:
    """Run one router: the HTTP port and the choice of workers."""
    _log(verbose)
    loaded = _load(spec)
    if process is None and (workers or loaded.router.workers) > 1:
        from baton.router_processes import run_router_processes

        settings = loaded.router.model_copy(update={"workers": workers or loaded.router.workers})
        loaded = loaded.model_copy(update={"router": settings})
        asyncio.run(run_router_processes(loaded, spec, index=index, options=["--verbose"] if verbose else []))
        return
    import uvloop

    from baton.compose import run_router

    uvloop.run(run_router(loaded, index=index, process=process, metrics_dir=metrics_dir))


@app.command()
def prefill(spec: SpecFile, index: Index = 0, verbose: Verbose = False) -> None:
    """Run one prefill worker."""
    _run_worker(spec, "prefill", index, verbose)


@app.command()
def decode(spec: SpecFile, index: Index = 0, verbose: Verbose = False) -> None:
    """Run one decode worker."""
    _run_worker(spec, "decode", index, verbose)


def _run_worker(spec: Path, role: Role, index: int, verbose: bool) -> None:
    from baton.compose import run_worker

    _log(verbose)
    run_worker(_load(spec), role, index=index)


def _log(verbose: bool) -> None:
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, format=LOG_FORMAT)
    for chatty in ("httpx", "httpcore", "asyncio", "huggingface_hub"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


@app.command()
def status(
    spec: Annotated[Path | None, typer.Argument(help="Spec of a cluster on this machine.")] = None,
    url: Annotated[str | None, typer.Option(help=f"Router to ask. [default: {DEFAULT_URL}]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the router's answer as it is.")] = False,
    api_key: Annotated[str | None, typer.Option(envvar="BATON_API_KEY", help="The server's key.")] = None,
) -> None:
    """Show the workers, their load, and the queue."""
    from baton.status import fetch_status, render_status
    from cluster.launcher import router_url

    if spec is not None and url is not None:
        raise typer.BadParameter("give a SPEC or --url, not both")
    where = url or (router_url(_load(spec)) if spec else DEFAULT_URL)
    answer = fetch_status(where, api_key)
    if as_json:
        typer.echo(json.dumps(answer, indent=2))
    else:
        Console(highlight=False).print(render_status(answer))


@app.command("spec")
def spec_command(
    path: Annotated[Path | None, typer.Argument(metavar="SPEC", help="A spec; without it, the defaults.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only say whether SPEC is right.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema, for editors and charts.")] = False,
    show: Annotated[
        bool, typer.Option("--print", help="Print every field with its value and meaning (default).")
    ] = False,
) -> None:
    """Print or check a spec."""
    if check + schema + show > 1:
        raise typer.BadParameter("give one of --check, --schema and --print")
    if check and path is None:
        raise typer.BadParameter("--check needs a SPEC")
    loaded = load_spec(path) if path else None
    if schema:
        typer.echo(json.dumps(ClusterSpec.model_json_schema(), indent=2))
    elif check and loaded is not None:
        typer.echo(f"{path} is right")
        for problem in _problems_here(loaded):
            typer.echo(f"baton: on this machine: {problem}", err=True)
    else:
        typer.echo(explained_yaml(loaded), nl=False)


def _problems_here(spec: ClusterSpec) -> list[str]:
    """Of the files that the spec names: the machines that it is for may have others."""
    from baton.step_profiles import load_profile

    def check_profile(spec: ClusterSpec) -> None:
        if spec.simulated.profile is not None:
            load_profile(spec.simulated.profile)

    problems = []
    for check in (check_secrets, check_profile):
        try:
            check(spec)
        except SpecError as error:
            problems += error.problems
    return problems


@app.command("version")
def version_command() -> None:
    """Print Baton's version."""
    typer.echo(version(DISTRIBUTION))
