"""`baton profile`: how long one worker's steps take, measured here and written as a step profile for simulations."""

import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.spec import ROLES, ClusterSpec, PoolSettings, Role
from cluster.spec_file import load_spec
from engine.step_profile import Measurements

if TYPE_CHECKING:  # what takes seconds to import is imported by the command
    from baton.step_timer import Measured, Sizes
    from engine.executors.base import Executor

STEP_S, QUICK_STEP_S = 0.3, 0.1  # spent on each step, or a few runs of it if that takes longer


def profile_command(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="A cluster's spec; one worker of it runs here.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The profile to write.")],
    role: Annotated[str, typer.Option(help="Whose worker: that of the prefill or of the decode pool.")] = "decode",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes, and less time for each.")] = False,
) -> None:
    """Measure how long a worker's steps take.

    For simulations: prefill, decode and mixed steps over the sizes that fit its memory and a step of either pool.
    Nothing else should run on the device meanwhile. How KV moves between workers is not measured: the field `transfer`
    of the file is null until somebody puts the link's figures there.
    """
    if role not in get_args(Role):
        raise typer.BadParameter(f"{role!r} is none of {', '.join(get_args(Role))}", param_hint="--role")
    if out.is_dir() or not out.parent.is_dir():
        problem = f"{out} is a directory" if out.is_dir() else f"there is no directory {out.parent}"
        raise typer.BadParameter(problem, param_hint="--out")
    from baton.compose import found_pool

    console = Console(stderr=True, highlight=False)
    began = time.monotonic()
    loaded = load_spec(spec)
    command = f"baton profile {spec} --role {role}{' --quick' if quick else ''}"
    pool = found_pool(loaded, "prefill" if role == "prefill" else "decode")
    # Whatever a worker of either pool may compute in a step.
    pool = replace(pool, max_batch_tokens=max(found_pool(loaded, each).max_batch_tokens for each in ROLES))
    measured = profile_worker(loaded, pool, console, command, quick=quick)
    out.write_text(measured.to_json(), encoding="utf-8")
    counts = f"{len(measured.prefill)} prefill, {len(measured.decode)} decode and {len(measured.mixed)} mixed steps"
    console.print(
        f"{out}: {counts} of {measured.device}, in {time.monotonic() - began:.0f} s", markup=False, soft_wrap=True
    )


def profile_worker(
    spec: ClusterSpec, pool: PoolSettings, console: Console, command: str, *, quick: bool
) -> Measurements:
    """Load one worker's executor, measure it and close it; `command` is what the profile says of its making.

    Raises SpecError.
    """
    import torch

    from baton.compose import make_executor
    from baton.step_timer import choose_sizes, fill

    with console.status("loading the model"):
        executor = make_executor(spec, pool)
        fill(executor.memory)
    try:
        sizes = choose_sizes(executor, pool.max_batch_tokens, pool.max_num_seqs, quick=quick)
        steps = measure_shown(executor, sizes, console, quick=quick)
        layout = executor.layout
        return Measurements(
            device=device_name(pool),
            model=f"{spec.public_model_name}, KV in {layout.dtype}" + (", random weights" * (spec.load == "dummy")),
            kv_bytes_per_token=layout.block_bytes // layout.block_size,
            kv_tokens=executor.memory.num_blocks * layout.block_size,
            commands=[f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}: {command}"],
            prefill=steps.prefill,
            decode=steps.decode,
            mixed=steps.mixed,
        )
    finally:
        executor.close()


def measure_shown(executor: "Executor", sizes: "Sizes", console: Console, *, quick: bool) -> "Measured":
    from baton.step_timer import measure

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("steps", total=sizes.num)

        def tell(step: str) -> None:
            bar.update(task, advance=1, description=step)

        return measure(executor, sizes, time.perf_counter, tell, step_s=QUICK_STEP_S if quick else STEP_S)


def device_name(pool: PoolSettings) -> str:
    if pool.engine == "simulated":
        return "simulated"
    import torch

    if pool.device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
