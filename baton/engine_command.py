"""`baton engine`: TensorRT engines of a model's layers, compiled ahead of the workers that run them.

Workers compile what they lack at their first start, which takes minutes for a large model. These commands do it before,
also on a machine without a GPU where TensorRT-RTX is installed, and show what a compiled file holds.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from baton.progress import loading_bar
from cluster.checkpoint import resolve_model
from cluster.devices import MAX_BATCH_TOKENS
from cluster.spec import ClusterSpec, Load
from cluster.spec_errors import SpecError
from cluster.spec_file import load_spec

if TYPE_CHECKING:  # what takes seconds to import is imported by the commands
    from engine.executors.model_loading import Loaded
    from engine.executors.tensorrt.engine_build import Profile
    from engine.executors.tensorrt.library import Capability, Library
    from engine.executors.tensorrt.prepare import Progress as Tell

HELP = """Compile, check, refit and inspect TensorRT engines of a model's layers.

Prefill workers with `engine: tensorrt` run them, and compile those that are missing when they start.

TensorRT compiles on the GPU that runs the engine: pip install tensorrt-cu13 (cu12 for a PyTorch of CUDA 12).
TensorRT-RTX also compiles where there is no GPU, for GPUs of 7.5 to 8.9 and 12.x: pip install
tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings. Where both are installed, TensorRT is taken.
"""
SPEC_SUFFIXES = (".yaml", ".yml")
DTYPES = ("auto", "float32", "bfloat16", "float16")

Target = Annotated[
    str,
    typer.Argument(
        metavar="SPEC_OR_CHECKPOINT",
        help="A cluster's spec (*.yaml), for engines that its prefill workers use; or a checkpoint: path or hub id.",
    ),
]
Dtype = Annotated[
    str | None, typer.Option(help=f"What to compute in: {', '.join(DTYPES)}. [default: the spec's, or auto]")
]
LayersPerEngine = Annotated[
    int | None, typer.Option(min=1, help="Layers of each engine. [default: a worker's own groups, about a quarter]")
]

engine_app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@dataclass(frozen=True, slots=True)
class Asked:
    """What the engines are of and for. None: the model's own limit."""

    model: str
    load: Load = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    max_batch_tokens: int = MAX_BATCH_TOKENS["cuda"]
    max_call_tokens: int | None = None
    max_model_len: int | None = None
    cache_dir: str | None = None


def asked_for(target: str, dtype: str | None) -> Asked:
    """Raises SpecError."""
    if dtype is not None and dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(DTYPES)}", param_hint="--dtype")
    asked = of_spec(load_spec(target)) if Path(target).suffix in SPEC_SUFFIXES else Asked(target)
    return asked if dtype is None else replace(asked, dtype=dtype)


def of_spec(spec: ClusterSpec) -> Asked:
    pool = spec.pool("prefill", "cuda")
    return Asked(
        spec.model,
        spec.load,
        spec.dtype,
        spec.quantization,
        pool.max_batch_tokens,
        spec.tensorrt.max_tokens,
        spec.max_model_len,
        spec.tensorrt.cache_dir,
    )


@engine_app.command()
def build(
    target: Target,
    capability: Annotated[
        str | None,
        typer.Option(help="Compile for GPUs of this compute capability, such as 8.9. [default: this machine's]"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where engines are kept. [default: the spec's, or ~/.cache/baton/engines]"),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens one call takes. [default: as a worker of the spec asks]")
    ] = None,
    past: Annotated[
        int | None, typer.Option(min=1, help="Tokens before those, of all prompts of a call. [default: max_model_len]")
    ] = None,
    dtype: Dtype = None,
    layers_per_engine: LayersPerEngine = None,
    refit: Annotated[
        bool,
        typer.Option("--refit", help="Let `baton engine refit` exchange the weights; may run slower. Needs a GPU."),
    ] = False,
    workspace: Annotated[
        int | None, typer.Option(min=1, metavar="MIB", help="GPU memory a kernel may use as scratch. [default: any]")
    ] = None,
) -> None:
    """Compile a model's layers, an engine for each group.

    Every group is exported as an ONNX graph and held against the model on the CPU before it is compiled; a graph that
    computes something else stops the build. What the output directory has already is kept. Prints the engines' files.

    A worker uses an engine whose model, types, sizes, layers, library and GPU are those it would compile for itself.
    """
    console = Console(stderr=True, highlight=False)
    with reported_errors(console):
        from engine.executors.tensorrt.engine_build import check_target
        from engine.executors.tensorrt.engine_cache import EngineCache, default_directory
        from engine.executors.tensorrt.library import Capability
        from engine.executors.tensorrt.prepare import EngineOptions, prepare_ranges

        wanted = None if capability is None else Capability.parse(capability)
        library = library_for(wanted)
        check_target(library, wanted, refittable=refit)
        asked = asked_for(target, dtype)
        loaded = load_layers(asked, console, wanted)
        profile = profile_for(asked, loaded, tokens, past)
        options = EngineOptions(profile, wanted, refit, workspace << 20 if workspace else None)
        ends = group_ends(loaded, layers_per_engine)
        cache = EngineCache(output or (Path(asked.cache_dir).expanduser() if asked.cache_dir else default_directory()))
        console.print(f"{library.title}, {sizes_text(profile)}", markup=False)
        with engine_bar(console) as tell:
            prepared = prepare_ranges(loaded, ends, options, library, cache, tell)
        for _first, _end, path in prepared:
            typer.echo(path)


@engine_app.command()
def check(target: Target, dtype: Dtype = None, layers_per_engine: LayersPerEngine = None) -> None:
    """Check the graphs of a model's layers; compile nothing.

    The layers are exported, and the graphs held against the model.
    Runs in onnxruntime on the CPU, in float32 whatever the model's type; needs no TensorRT. Exit status 1 and the worst
    tensor where a graph computes something else.
    """
    console = Console(stderr=True, highlight=False)
    with reported_errors(console):
        from engine.executors.tensorrt.layer_range import LayerRange
        from engine.executors.tensorrt.onnx_check import check_range
        from engine.executors.tensorrt.onnx_export import export_range
        from engine.executors.tensorrt.prepare import range_name, ranges

        loaded = load_layers(asked_for(target, dtype), console)
        for first, end in ranges(group_ends(loaded, layers_per_engine)):
            layers = LayerRange(loaded.model, first, end)
            with (
                tempfile.TemporaryDirectory(prefix="baton-onnx-") as scratch,
                console.status(range_name(first, end)),
            ):
                report = check_range(layers, export_range(layers, Path(scratch)))
            worst = report.worst
            typer.echo(
                f"{range_name(first, end)}: right in {report.num_cases} steps; "
                f"largest difference {worst.error:.1e} of {report.tolerance:.0e} allowed, in {worst.tensor}"
            )


@engine_app.command()
def refit(
    engine: Annotated[Path, typer.Argument(metavar="ENGINE", help="A file that `baton engine build --refit` made.")],
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="The model whose weights it gets: directory or hub id.")
    ],
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the new engine is kept. [default: beside ENGINE]")
    ] = None,
) -> None:
    """Put the weights of another model into an engine.

    Into a new file, without compiling again.
    The models must be alike in everything but weights: a fine-tuned one and its base, say. Needs a GPU that the engine
    runs on. Prints the new file.
    """
    console = Console(stderr=True, highlight=False)
    with reported_errors(console):
        from engine.executors.tensorrt.engine_cache import EngineCache, read_engine
        from engine.executors.tensorrt.library import Capability
        from engine.executors.tensorrt.prepare import range_name, refit_file

        key = read_engine(engine).key
        capability = Capability.parse(key.capability)
        library = library_for(capability)
        loaded = load_layers(Asked(checkpoint, dtype=key.dtype), console, capability)
        cache = EngineCache(output or engine.parent)
        with console.status(range_name(key.first_layer, key.end_layer)):
            refitted = refit_file(engine, loaded, library, cache)
        typer.echo(refitted.path)


@engine_app.command()
def inspect(
    engine: Annotated[Path, typer.Argument(metavar="ENGINE", help="A file that `baton engine build` made.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what an engine is of, and that it is whole.

    Its tensors, their sizes and its kernels are shown where TensorRT can load it: on a GPU of its kind.
    """
    console = Console(stderr=True, highlight=False)
    with reported_errors(console):
        from engine.executors.tensorrt.engine_cache import read_engine

        file = read_engine(engine)
        about: dict[str, Any] = {**asdict(file.key), "plan_bytes": file.plan.nbytes}
        about |= plan_contents(file.key.capability, file.plan)
        if as_json:
            typer.echo(json.dumps(about))
            return
        for name, value in about.items():
            if isinstance(value, list):
                typer.echo(f"{name}:")
                for item in value:
                    typer.echo(f"  {item if isinstance(item, str) else binding_text(item)}")
            else:
                typer.echo(f"{name}: {'-' if value in (None, '') else value}")


def plan_contents(capability: str, plan: memoryview) -> dict[str, Any]:
    """Tensors and kernels of the plan, or why they cannot be told here."""
    from engine.executors.tensorrt.engine_inspection import inspect_plan
    from engine.executors.tensorrt.library import Capability

    try:
        contents = inspect_plan(library_for(Capability.parse(capability)), plan)
    except ValueError as error:
        return {"contents": f"not shown: {error}"}
    return {
        "scratch_bytes": contents.scratch_bytes,
        "bindings": [asdict(binding) for binding in contents.bindings],
        "layers": list(contents.layers),
    }


def binding_text(binding: dict[str, Any]) -> str:
    direction = "in " if binding["is_input"] else "out"
    profiles = "; ".join(" | ".join(str(list(shape)) for shape in sizes) for sizes in binding["profiles"])
    return f"{direction} {binding['name']} {binding['dtype']} {list(binding['shape'])} {profiles}".rstrip()


def library_for(capability: "Capability | None") -> "Library":
    """The library for GPUs of `capability`, None: for this machine's. Raises LibraryMissing."""
    from engine.executors.tensorrt.library import gpu_capability, load_library

    here = gpu_capability()
    return load_library("tensorrt", capability or here, ahead=here is None or (capability or here) != here)


def load_layers(asked: Asked, console: Console, target: "Capability | None" = None) -> "Loaded":
    """The model, on this machine's GPU if it has one. What is FP8 stays it for GPUs of `target` that multiply it, None:
    for this machine's."""
    import torch

    from engine.executors.model_loading import choose_dtype, load
    from engine.model_config import load_model_config, with_quantization

    path = resolve_model(asked.model, asked.load)
    config = with_quantization(load_model_config(path), asked.quantization)
    dtype = choose_dtype(asked.dtype, config, torch.device("cuda"))  # for a GPU, wherever it is loaded
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    with loading_bar(console) as progress:
        return load(path, config, dtype, device, dummy=asked.load == "dummy", progress=progress, target=target)


def profile_for(asked: Asked, loaded: "Loaded", tokens: int | None, past: int | None) -> "Profile":
    """What a prefill worker asks for, with `tokens` and `past` as the largest sizes instead where they are given."""
    from engine.executors.tensorrt.limits import call_limits
    from engine.executors.tensorrt.loading import profile_of
    from engine.kv.layout import KvLayout

    config = loaded.model.config
    dtype = str(loaded.model.rotary.dtype).removeprefix("torch.")
    layout = KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, block_size=1, dtype=dtype)
    longest = past or asked.max_model_len or config.max_position_embeddings
    largest = tokens or asked.max_call_tokens
    return profile_of(call_limits(layout, "cuda", tokens or asked.max_batch_tokens, longest, largest))


def group_ends(loaded: "Loaded", layers_per_engine: int | None) -> tuple[int, ...]:
    from engine.executors.torch_executor import layer_group_ends

    return layer_group_ends(loaded.model.config.num_layers, layers_per_engine)


def sizes_text(profile: "Profile") -> str:
    return f"calls of up to {profile.tokens[-1]} tokens after up to {profile.past[-1]}"


@contextmanager
def engine_bar(console: Console) -> Iterator["Tell"]:
    """Yields the function that is told what is being done, and which part of all is done. No terminal: a line each."""
    if not console.is_terminal:
        said: set[str] = set()

        def say(what: str, _part: float) -> None:
            if what not in said:
                said.add(what)
                console.print(what, markup=False)

        yield say
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, part: bar.update(task, description=what, completed=part)


@contextmanager
def reported_errors(console: Console) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        console.print("stopped", style="red")
        raise typer.Exit(130) from None
    except (SpecError, ValueError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"
        console.print(text, style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
