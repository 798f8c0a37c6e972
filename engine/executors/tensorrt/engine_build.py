"""From an ONNX file to a serialized engine, and new weights into one.

Networks are strongly typed: an engine computes in the types that the graph names. Both functions run the library in a
thread of their own and wait for it, so that Ctrl-C is noticed, stops the build at its next step, and is raised after.
"""

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.executors.tensorrt.build_progress import BuildProgress, PhaseTree, make_monitor
from engine.executors.tensorrt.library import Capability, Library, gpu_capability
from engine.executors.tensorrt.locked_files import locked, replace_file

MAX_NAMED = 4  # of a list in an error
Shape = tuple[int, ...]
Sizes = tuple[int, int, int]


class EngineBuildError(ValueError):
    """TensorRT cannot make, or refit, an engine. The message holds what it said."""


@dataclass(frozen=True, slots=True)
class Profile:
    """The sizes an engine takes: tokens of a step and tokens of their past, each (least, tuned for, most)."""

    tokens: Sizes
    past: Sizes

    def __post_init__(self) -> None:
        for name, (least, tuned, most) in (("tokens", self.tokens), ("past", self.past)):
            if not 1 <= least <= tuned <= most < 1 << 31:
                raise ValueError(f"{name} of a profile must ascend from 1 or more, not {least}, {tuned}, {most}")

    def shapes(self, name: str, shape: Shape) -> tuple[Shape, Shape, Shape]:
        """Of the input `name`, whose `shape` has -1 for what varies: the past for inputs named past_*, or the tokens.

        Raises EngineBuildError for a graph that is no range of layers.
        """
        if shape.count(-1) != 1:
            raise EngineBuildError(f"input {name} {list(shape)} has not exactly one size that varies")
        sizes = self.past if name.startswith("past_") else self.tokens
        least, tuned, most = (tuple(size if item == -1 else item for item in shape) for size in sizes)
        return least, tuned, most


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """`capability` None compiles for the GPU at hand. `workspace` bounds the scratch memory, in bytes, of one layer.

    `refit` names the weights that may be exchanged later; others may be folded. Only these are marked, which TensorRT
    calls REFIT_INDIVIDUAL: REFIT would keep every constant of the graph apart, those that give shapes included, and
    REFIT_IDENTICAL takes no other weights than those it was built with.
    """

    profile: Profile
    capability: Capability | None = None
    refit: Collection[str] = ()
    workspace: int | None = None
    timing_cache: Path | None = None  # file; TensorRT-RTX has no use for one


def build_engine(
    library: Library, onnx_path: Path, options: BuildOptions, progress: BuildProgress | None = None
) -> memoryview:
    """The plan, as the library's memory. Raises EngineBuildError."""
    check_target(library, options.capability, refittable=bool(options.refit))
    phases = PhaseTree(progress)
    with library.messages.collected() as said, ThreadPoolExecutor(1) as thread:
        try:  # from before the thread begins: leaving waits for it
            plan = thread.submit(_build, library, onnx_path, options, phases).result()
        except KeyboardInterrupt:
            phases.cancelled = True
            raise
        if plan is None:
            raise EngineBuildError(f"{library.title} cannot compile the graph: {said()}")
    return memoryview(plan).cast("B")


def check_target(library: Library, target: Capability | None, *, refittable: bool) -> None:
    """Raises EngineBuildError where the library cannot do that here. Some builds would fail late, and the process after
    them could build no other."""
    here = gpu_capability()
    if target is None and here is None:
        raise EngineBuildError(
            "there is no GPU here to compile for; name one: --capability 8.9"
            if library.builds_ahead
            else f"{library.title} compiles on the GPU that it is for, and PyTorch finds none here"
        )
    if target is not None and target != here and not library.builds_ahead:
        raise EngineBuildError(f"{library.title} compiles for the GPU it finds, here {here or 'none'}, not {target}")
    if reason := library.why_unsupported(target or here or Capability(0, 0)):
        raise EngineBuildError(reason)
    if refittable and here is None:
        raise EngineBuildError(f"{library.title} needs a GPU to compile an engine that can be refitted; there is none")


def _build(library: Library, onnx_path: Path, options: BuildOptions, phases: PhaseTree) -> Any:
    """The plan, or None with the reason in the library's messages."""
    builder = library.builder()
    network = parse(library, builder, onnx_path)
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        profile.set_shape(tensor.name, *options.profile.shapes(tensor.name, tuple(tensor.shape)))
    if config.add_optimization_profile(profile) < 0:
        return None
    config.progress_monitor = monitor = make_monitor(library.module, phases)  # must outlive the build
    if options.workspace is not None:
        config.set_memory_pool_limit(library.module.MemoryPoolType.WORKSPACE, options.workspace)
    if library.builds_ahead and (target := options.capability or gpu_capability()) is not None:
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(library.target(target), 0):
            return None
    if options.refit:
        config.set_flag(library.module.BuilderFlag.REFIT_INDIVIDUAL)
        if unknown := [name for name in sorted(options.refit) if not network.mark_weights_refittable(name)]:
            raise EngineBuildError(f"the graph has no weights of its own for {_names(unknown)}")
    timings = options.timing_cache if library.keeps_timings else None
    if timings is not None:
        _use_timings(config, timings)
    plan = builder.build_serialized_network(network, config)
    if timings is not None and plan is not None:
        _keep_timings(config, timings)
    del monitor
    return plan


def parse(library: Library, builder: Any, onnx_path: Path) -> Any:
    """The network of an ONNX file, whose weights may lie in a file beside it. Raises EngineBuildError naming nodes."""
    strongly_typed = 1 << int(library.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strongly_typed)
    parser = library.module.OnnxParser(network, library.log)
    if not parser.parse_from_file(str(onnx_path)):
        raise EngineBuildError(f"{library.title} cannot read the graph: {_parser_errors(parser)}")
    return network


def _parser_errors(parser: Any) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    texts = [
        f"node {error.node_name()} ({error.node_operator()}): {error.desc()}" if error.node_name() else error.desc()
        for error in errors
    ]
    return "; ".join(texts[:MAX_NAMED]) or "it gave no reason"


def _use_timings(config: Any, path: Path) -> None:
    """Spare the timing of kernels that an earlier build has timed. A file of another version or GPU is not used."""
    with locked(path):
        kept = path.read_bytes() if path.exists() else b""
    cache = config.create_timing_cache(kept)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _keep_timings(config: Any, path: Path) -> None:
    """Add what this build timed to the file, and what another has written there meanwhile to that."""
    cache = config.get_timing_cache()
    with locked(path):
        if path.exists() and (others := config.create_timing_cache(path.read_bytes())) is not None:
            cache.combine(others, ignore_mismatch=False)
        replace_file(path, [memoryview(cache.serialize()).cast("B")])


def refit_engine(library: Library, plan: bytes | memoryview, onnx_path: Path) -> memoryview:
    """The plan with the weights of the graph in `onnx_path`, which must be that of the engine in all but weights.

    Every weight that can be exchanged is. Needs a GPU that the engine runs on. Raises EngineBuildError.
    """
    if gpu_capability() is None:
        raise EngineBuildError(f"{library.title} refits an engine on the GPU that runs it, and PyTorch finds none here")
    with library.messages.collected() as said, ThreadPoolExecutor(1) as thread:
        refitted = thread.submit(_refit, library, plan, onnx_path).result()
        if refitted is None:
            raise EngineBuildError(f"{library.title} cannot refit the engine: {said()}")
    return memoryview(refitted).cast("B")


def _refit(library: Library, plan: bytes | memoryview, onnx_path: Path) -> Any:
    engine = library.runtime().deserialize_cuda_engine(plan)
    if engine is None:
        return None
    if not engine.refittable:
        raise EngineBuildError("the engine was not compiled to be refitted; build it with --refit")
    refitter = library.module.Refitter(engine, library.log)
    needed = set(refitter.get_all_weights())
    parser = library.module.OnnxParserRefitter(refitter, library.log)
    if not parser.refit_from_file(str(onnx_path)):
        raise EngineBuildError(f"the new weights do not fit the engine: {_parser_errors(parser)}")
    if missing := [*refitter.get_missing_weights(), *(needed - initializer_names(onnx_path))]:
        raise EngineBuildError(f"the new weights lack {_names(sorted(set(missing)))}")
    return engine.serialize() if refitter.refit_cuda_engine() else None


def initializer_names(onnx_path: Path) -> set[str]:
    import onnx

    graph = onnx.load(onnx_path, load_external_data=False).graph
    return {initializer.name for initializer in graph.initializer}


def _names(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
