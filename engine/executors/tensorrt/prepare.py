"""From a loaded model to engine files, one for each range of its layers: export, check, compile, keep.

Called by a worker at its start and by `baton engine build`. Where the cache has an engine nothing is exported. ONNX
files are temporary, and no engine is made from one that does not compute what the model does.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from xxhash import xxh3_128

from engine.executors.model_loading import Loaded
from engine.executors.tensorrt.engine_build import (
    BuildOptions,
    EngineBuildError,
    Profile,
    build_engine,
    check_target,
    refit_engine,
)
from engine.executors.tensorrt.engine_cache import EngineCache, EngineKey, read_engine
from engine.executors.tensorrt.layer_range import LayerRange
from engine.executors.tensorrt.library import Capability, Library, gpu_capability
from engine.executors.tensorrt.onnx_check import check_range
from engine.executors.tensorrt.onnx_export import export_range
from engine.model_config import ModelConfig

TIMINGS = "timings"
# Of a range's time, about: what the export and its check have taken when compiling begins.
EXPORTED, CHECKED = 0.2, 0.5
# What the graph has as constants besides weights. Rotation is computed outside.
GRAPH_FIELDS = (
    "architecture",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "norm_eps",
    "activation",
    "attention_scale",
    "attention_softcap",
    "qkv_bias",
    "output_bias",
    "mlp_bias",
)

Progress = Callable[[str, float], None]  # what is being done, and the part of everything that is done


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """As BuildOptions. `refittable`: weights can be exchanged later, at some cost in speed."""

    profile: Profile
    capability: Capability | None = None
    refittable: bool = False
    workspace: int | None = None


class PreparedRange(NamedTuple):
    """The checked engine file of layers `first .. end - 1`."""

    first: int
    end: int
    path: Path


def prepare_ranges(
    loaded: Loaded,
    layer_groups: Sequence[int],
    options: EngineOptions,
    library: Library,
    cache: EngineCache,
    progress: Progress | None = None,
) -> list[PreparedRange]:
    """Engines of the ranges that end at `layer_groups`, which are exclusive and ascend.

    Raises GraphMismatch where an exported graph computes something else, and EngineBuildError.
    """
    prepared: list[PreparedRange] = []
    for index, (first, end) in enumerate(ranges(layer_groups)):
        stage = Stage(range_name(first, end), index, len(layer_groups), progress)
        layers = LayerRange(loaded.model, first, end)
        key = range_key(layers, loaded.model_hash, options, library)
        try:
            path = cache.find(key) or cache.get(
                key,
                partial(compile_range, layers, options, library, cache.directory, stage),
                waiting=partial(stage, "another process compiles", 0.0),
            )
        except EngineBuildError as error:
            raise EngineBuildError(f"{stage.name}: {error}") from error
        stage("ready", 1.0)
        prepared.append(PreparedRange(first, end, path))
    return prepared


@dataclass(frozen=True, slots=True)
class Stage:
    """Tells `progress` of one range, the one at `index` of `num_ranges`."""

    name: str
    index: int
    num_ranges: int
    progress: Progress | None

    def __call__(self, what: str, part: float) -> None:
        if self.progress is not None:
            self.progress(f"{self.name}: {what}", (self.index + part) / self.num_ranges)


def range_name(first: int, end: int) -> str:
    return f"layer {first}" if end == first + 1 else f"layers {first} to {end - 1}"


def ranges(layer_groups: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip([0, *layer_groups[:-1]], layer_groups, strict=True))


def compile_range(
    layers: LayerRange, options: EngineOptions, library: Library, directory: Path, stage: Stage
) -> memoryview:
    """`directory` is where the timings of kernels are kept. The ONNX file is gone afterwards."""
    # Before the long part. Attention might be compiled in separate operators instead, but then it would need memory for
    # the scores of all heads: tokens x (past and tokens).
    if layers.dtype is torch.float32:
        raise EngineBuildError("TensorRT has no attention kernel for float32; compute in bfloat16 or float16 (dtype)")
    check_target(library, options.capability, refittable=options.refittable)
    build_options = BuildOptions(
        options.profile,
        options.capability,
        refit=refittable_weights(layers) if options.refittable else (),
        workspace=options.workspace,
        timing_cache=directory / f"{TIMINGS}-{library.version}",
    )

    def compiling(part: float) -> None:
        stage("compiling", CHECKED + (1 - CHECKED) * part)

    with tempfile.TemporaryDirectory(prefix="baton-onnx-") as scratch:
        onnx_path = export_checked(layers, Path(scratch), stage)
        compiling(0.0)
        return build_engine(library, onnx_path, build_options, compiling)


def refittable_weights(layers: LayerRange) -> set[str]:
    """All but the zero points of quantization, which are never anything else."""
    return {name for name in layers.weights() if not name.endswith(".zero_point")}


def export_checked(layers: LayerRange, directory: Path, stage: Progress) -> Path:
    stage("exporting", 0.0)
    onnx_path = export_range(layers, directory)
    stage("checking", EXPORTED)
    check_range(layers, onnx_path)
    return onnx_path


def range_key(layers: LayerRange, model_hash: str, options: EngineOptions, library: Library) -> EngineKey:
    here = gpu_capability()
    return EngineKey(
        model_hash=model_hash,
        graph=graph_hash(layers.config, layers.first, layers.end),
        first_layer=layers.first,
        end_layer=layers.end,
        dtype=dtype_of(layers),
        quantization=quantization_of(layers),
        tokens=options.profile.tokens,
        past=options.profile.past,
        library=library.name,
        version=library.version,
        capability=str(options.capability or here),
        gpu=torch.cuda.get_device_name(0) if library.keeps_timings and here is not None else "",
        refittable=options.refittable,
        workspace=options.workspace,
    )


def dtype_of(layers: LayerRange) -> str:
    return str(layers.dtype).removeprefix("torch.")


def quantization_of(layers: LayerRange) -> str:
    """ "fp8" where the graph has FP8 weights. A device without FP8 products loads those of a checkpoint as others."""
    return "fp8" if any(name.endswith(".weight_scale") for name in layers.weights()) else ""


def graph_hash(config: ModelConfig, first: int, end: int) -> str:
    """Equal for models whose graphs of these layers differ in nothing but weights."""
    values = asdict(config)
    constants = {name: values[name] for name in GRAPH_FIELDS} | {"windows": config.windows[first:end]}
    return xxh3_128(json.dumps(constants, sort_keys=True).encode()).hexdigest()


def refit_file(path: Path, loaded: Loaded, library: Library, cache: EngineCache) -> PreparedRange:
    """The engine in the file `path` with the weights of another model, as a new file in the cache.

    Only weights may differ. Raises EngineFileError, GraphMismatch, and EngineBuildError, which says what else differs.
    """
    file = read_engine(path)
    first, end = file.key.first_layer, file.key.end_layer
    if end > loaded.model.config.num_layers:
        raise EngineBuildError(f"{path.name} has layers up to {end - 1}, the model {loaded.model.config.num_layers}")
    layers = LayerRange(loaded.model, first, end)
    key = replace(
        file.key,
        model_hash=loaded.model_hash,
        graph=graph_hash(layers.config, first, end),
        dtype=dtype_of(layers),
        quantization=quantization_of(layers),
        library=library.name,
        version=library.version,
    )
    for name in ("graph", "dtype", "quantization", "library", "version"):
        ours, theirs = getattr(file.key, name), getattr(key, name)
        if ours != theirs:
            raise EngineBuildError(f"{path.name} cannot be refitted: its {name} is {ours!r}, and not {theirs!r}")
    if not file.key.refittable:
        raise EngineBuildError(f"{path.name} was not compiled to be refitted; build it with --refit")

    def refit() -> memoryview:
        with tempfile.TemporaryDirectory(prefix="baton-onnx-") as scratch:
            onnx_path = export_checked(layers, Path(scratch), lambda _what, _part: None)
            return refit_engine(library, file.plan, onnx_path)

    return PreparedRange(first, end, cache.get(key, refit))
