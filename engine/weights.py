"""Fills a model from a safetensors checkpoint, tensor by tensor, or at random, and names weights by their content.

`load_weights` fills every parameter exactly once or raises ValueError naming what is missing, unexpected
or mis-shaped; matrices that the model fuses are copied into their rows. Every tensor goes straight to the
parameters' device, so that the host never holds more than one.
"""

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from xxhash import xxh3_64_intdigest, xxh3_128

from engine.config_fields import MAX_CONFIG_BYTES, read_json_object
from engine.layers.attention import SelfAttention
from engine.layers.fp8 import FP8, quantize_weight, why_not_fp8
from engine.layers.linear import Linear
from engine.layers.norm import RMSNorm
from engine.model_config import ModelConfig
from engine.quantization import Quantization
from engine.safetensors_files import TensorEntry, open_tensors, read_entries

SAMPLES_PER_TENSOR = 16
SAMPLE_BYTES = 4096
COMPARED_BYTES = 1 << 20
FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
ONE_NUMBER: tuple[list[int], ...] = ([], [1])  # the shapes of a tensor that holds one
MAX_NAMES = 8  # in an error message
DUMMY_INPUT_SCALE = 16 / 448  # random weights keep activations within 16
# Written by tools, of no effect on what the model computes.
VOLATILE_CONFIG_FIELDS = ("_name_or_path", "transformers_version")
# Where checkpoints keep the scale of a layer's FP8 keys: now, by ModelOpt, and formerly. Values alike.
KV_SCALE_NAMES = ("{0}_scale", "{0}_proj.{0}_scale", "{0}_proj.output_scale")

Progress = Callable[[int, int], None]  # bytes loaded so far, bytes in all
Target = tuple[int, int] | None  # the compute capability of the GPU that a model is loaded for, if not the device here
KvScales = tuple[tuple[float, float], ...]  # of the keys and values of each layer: a value is its FP8 times the scale

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix as the checkpoint has it: some rows of a layer, which may fuse several."""

    name: str  # of its module
    layer: Linear
    rows: slice
    scheme: Quantization | None  # None: stays in floating point


@dataclass(frozen=True, slots=True)
class Plan:
    """What every tensor of a checkpoint is for, by its name."""

    matrices: Mapping[str, Matrix]
    parameters: Mapping[str, Tensor]  # all others: the memory they fill
    scales: Mapping[str, tuple[list[int], ...]]  # with the shapes they may have
    kv_scales: tuple[tuple[str | None, str | None], ...]  # of keys and values of each layer, None where there is none

    @property
    def names(self) -> set[str]:
        return {*self.matrices, *self.parameters, *self.scales}


def load_weights(
    model: nn.Module,
    path: Path,
    progress: Progress | None = None,
    quantization: Quantization | None = None,
    target: Target = None,
) -> KvScales:
    """Load the checkpoint in directory `path`, cast to the parameters' types, and finalize the layers.

    `quantization` is that of the model's config. Where the device has no FP8 products for a layer, its FP8 weights
    become what they stand for in the model's type; `target` is asked instead where it is given, and a model with FP8
    layers on another device can be exported but not run. Returns the scales for FP8 keys and values, one where the
    checkpoint has none.
    """
    entries = read_entries(path)
    plan = make_plan(model, {entry.name for entry in entries}, quantization)
    _check_names(plan, {entry.name for entry in entries})
    scales = _read_scales(plan, entries)
    _allocate(list(plan.matrices.values()), target)
    total, done = sum(entry.size for entry in entries), 0
    for file, tensors_of_file in _by_file(entries):
        with open_tensors(file) as tensors:
            for entry in tensors_of_file:
                if entry.name in plan.matrices:
                    _load_matrix(plan.matrices[entry.name], tensors.get_tensor(entry.name), scales)
                elif entry.name in plan.parameters:
                    _load_parameter(plan.parameters[entry.name], tensors.get_tensor(entry.name), entry.name)
                done += entry.size
                if progress is not None:
                    progress(done, total)
    _finalize(model)
    return tuple((_kv_scale(scales, k), _kv_scale(scales, v)) for k, v in plan.kv_scales)


def dummy_weights(
    model: nn.Module, seed: int = 0, quantization: Quantization | None = None, target: Target = None
) -> None:
    """Random weights, made on the parameters' device, and finalize the layers.

    Matrices are uniform with a standard deviation of 1/sqrt(row length), so that activations and logits keep the
    size of their inputs; norms do nothing. Each parameter has a stream of its own, from `seed` and its name: equal
    on every worker of one kind of device, whichever layers it holds. Another kind of device gives other weights.
    `target` as for `load_weights`.
    """
    matrices = make_plan(model, set(), quantization).matrices.values()
    _allocate(list(matrices), target)
    layers = {id(matrix.layer): matrix.scheme for matrix in matrices}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, Linear) and name == "weight" and layers[id(module)] is not None:
                weight = torch.empty(parameter.shape, dtype=module.dtype, device=module.device)
                _fill_randomly(weight, f"{seed} {module_name}.{name}")
                module.fill(slice(None), *quantize_weight(weight))
            else:
                _fill_randomly(parameter, f"{seed} {module_name}.{name}")
        if isinstance(module, RMSNorm):
            module.weight.fill_(0.0 if module.unit_offset else 1.0)
        if isinstance(module, Linear) and quantization is not None and quantization.has_input_scales:
            module.input_scale = torch.tensor(DUMMY_INPUT_SCALE, device=module.device)
    _finalize(model)


def _fill_randomly(tensor: Tensor, stream: str) -> None:
    generator = torch.Generator(tensor.device).manual_seed(xxh3_64_intdigest(stream.encode()) >> 1)
    bound = math.sqrt(3 / tensor.shape[-1])
    tensor.uniform_(-bound, bound, generator=generator)


def dummy_model_hash(config: ModelConfig, device: torch.device, seed: int = 0) -> str:
    """What `model_hash` is to a checkpoint, for `dummy_weights` made on this kind of device."""
    made_of = ["dummy", device.type, seed, asdict(config)]
    return xxh3_128(json.dumps(made_of, sort_keys=True, default=sorted).encode()).hexdigest()


def model_hash(path: Path, quantization: Quantization | None = None) -> str:
    """xxh3-128 over config.json and, per tensor by name, its type, shape and a sample of its bytes.

    The sample is 16 pieces of 4 KiB spread evenly, the whole of a small tensor: enough to tell apart any two
    trainings, in a fraction of a second for any size and however the file is sharded. It does not detect an
    edit made to escape it. Weights that are quantized at load are other weights.
    """
    config = read_json_object(path / "config.json", MAX_CONFIG_BYTES)
    for name in VOLATILE_CONFIG_FIELDS:
        config.pop(name, None)
    digest = xxh3_128(json.dumps(config, sort_keys=True).encode())
    for entry in sorted(read_entries(path), key=lambda entry: entry.name):
        digest.update(json.dumps([entry.name, entry.dtype, entry.shape]).encode())
        with entry.file.open("rb") as file:
            for offset in _sample_offsets(entry.size):
                file.seek(entry.offset + offset)
                digest.update(file.read(min(SAMPLE_BYTES, entry.size - offset)))
    if quantization is not None and not quantization.is_stored:
        digest.update(b"quantized at load")
    return digest.hexdigest()


def has_own_head(path: Path) -> bool:
    """Whether the checkpoint holds a head that is not its embedding. Then the head counts, also where config.json says
    that they are tied, as some trainings leave it; `transformers` decides the same."""
    entries = {entry.name: entry for entry in read_entries(path)}
    if "lm_head.weight" not in entries or "model.embed_tokens.weight" not in entries:
        return False
    head, embedding = entries["lm_head.weight"], entries["model.embed_tokens.weight"]
    if (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
        return True
    with head.file.open("rb") as one, embedding.file.open("rb") as other:
        one.seek(head.offset)
        other.seek(embedding.offset)
        left = head.size
        while left:
            size = min(left, COMPARED_BYTES)
            if one.read(size) != other.read(size):
                return True
            left -= size
    return False


def num_parameters(path: Path) -> int:
    """Elements of all tensors of the checkpoint."""
    return sum(math.prod(entry.shape) for entry in read_entries(path))


def _sample_offsets(size: int) -> Iterable[int]:
    if size <= SAMPLES_PER_TENSOR * SAMPLE_BYTES:
        return range(0, size, SAMPLE_BYTES)
    return [(size - SAMPLE_BYTES) * i // (SAMPLES_PER_TENSOR - 1) for i in range(SAMPLES_PER_TENSOR)]


def make_plan(model: nn.Module, found: set[str], quantization: Quantization | None) -> Plan:
    """The tensors that `model` needs; the `found` names tell which of several forms the checkpoint has."""
    matrices: dict[str, Matrix] = {}
    parameters: dict[str, Tensor] = {}
    scales: dict[str, tuple[list[int], ...]] = {}
    kv_scales: list[tuple[str | None, str | None]] = []
    for module_name, module in model.named_modules():
        if isinstance(module, Linear):
            for matrix in _matrices(module_name, module, found, quantization):
                matrices[f"{matrix.name}.weight"] = matrix
                scales |= _scale_shapes(matrix)
                if module.bias is not None:
                    parameters[f"{matrix.name}.bias"] = module.bias[matrix.rows]
        else:
            parameters |= {f"{module_name}.{name}": item for name, item in module.named_parameters(recurse=False)}
        if isinstance(module, SelfAttention):
            keys, values = (_kv_scale_name(module_name, letter, found, quantization) for letter in "kv")
            scales |= {name: ONE_NUMBER for name in (keys, values) if name is not None}
            kv_scales.append((keys, values))
    return Plan(matrices, parameters, scales, tuple(kv_scales))


def _matrices(module_name: str, layer: Linear, found: set[str], quantization: Quantization | None) -> Iterator[Matrix]:
    """The layer's parts, or the layer itself where the checkpoint has it fused."""
    prefix, dot, _ = module_name.rpartition(".")
    parts = {f"{prefix}{dot}{part}": num_rows for part, num_rows in layer.parts.items()}
    if f"{module_name}.weight" in found:
        parts = {module_name: sum(parts.values())}
    first = 0
    for name, num_rows in parts.items():
        scheme = quantization if quantization is not None and quantization.covers(name) else None
        yield Matrix(name, layer, slice(first, first + num_rows), scheme)
        first += num_rows


def _scale_shapes(matrix: Matrix) -> dict[str, tuple[list[int], ...]]:
    scheme = matrix.scheme
    if scheme is None or not scheme.is_stored:
        return {}
    num_rows = matrix.rows.stop - matrix.rows.start
    shapes: dict[str, tuple[list[int], ...]] = {
        f"{matrix.name}.weight_scale": ([num_rows, 1], [num_rows]) if scheme.scale_per_row else ONE_NUMBER
    }
    if scheme.has_input_scales:
        shapes[f"{matrix.name}.input_scale"] = ONE_NUMBER
    return shapes


def _kv_scale_name(module_name: str, letter: str, found: set[str], quantization: Quantization | None) -> str | None:
    if quantization is None or not quantization.is_stored:
        return None
    names = [f"{module_name}.{form.format(letter)}" for form in KV_SCALE_NAMES]
    present = [name for name in names if name in found]
    if len(present) > 1:
        raise ValueError(f"the checkpoint has {present[0]} and also {present[1]}, which says the same")
    return present[0] if present else names[0] if quantization.has_kv_scales else None


def _check_names(plan: Plan, found: set[str]) -> None:
    unexpected = {name for name in found - plan.names if not _is_redundant(name)}
    for names, problem in (
        (plan.names - found, "lacks"),
        (unexpected, "has tensors that the model does not know:"),
    ):
        if names:
            listed = ", ".join(sorted(names)[:MAX_NAMES])
            more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
            raise ValueError(f"the checkpoint {problem} {listed}{more}")


def _is_redundant(name: str) -> bool:
    """Buffers that old checkpoints carry, and, where the model has no head, the copy of the embedding it is tied to."""
    return name.endswith(".rotary_emb.inv_freq") or name == "lm_head.weight"


def _by_file(entries: Iterable[TensorEntry]) -> list[tuple[Path, list[TensorEntry]]]:
    files: dict[Path, list[TensorEntry]] = {}
    for entry in entries:
        files.setdefault(entry.file, []).append(entry)
    return sorted(files.items())


def _read_scales(plan: Plan, entries: Iterable[TensorEntry]) -> dict[str, Tensor]:
    """All scales, float32 [1] or [num_rows] on the host: they are small, and a matrix may come before its own."""
    scales: dict[str, Tensor] = {}
    for file, entries_of_file in _by_file(entry for entry in entries if entry.name in plan.scales):
        with open_tensors(file) as tensors:
            for entry in entries_of_file:
                scales[entry.name] = _checked_scale(tensors.get_tensor(entry.name), entry.name, plan.scales[entry.name])
    return scales


def _checked_scale(scale: Tensor, name: str, shapes: tuple[list[int], ...]) -> Tensor:
    _check_type(scale, name, FLOAT_TYPES)
    if list(scale.shape) not in shapes:
        raise ValueError(f"tensor {name} has shape {list(scale.shape)}, the model wants {shapes[0]}")
    scale = scale.float().flatten()
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise ValueError(f"tensor {name} must hold positive numbers")
    return scale


def _kv_scale(scales: Mapping[str, Tensor], name: str | None) -> float:
    return 1.0 if name is None else scales[name].item()


def _allocate(matrices: Iterable[Matrix], target: Target) -> None:
    """A layer is FP8 if all its matrices are and its device, or the target, can multiply it so."""
    layers: dict[int, list[Matrix]] = {}
    for matrix in matrices:
        layers.setdefault(id(matrix.layer), []).append(matrix)
    reasons: list[str] = []
    for members in layers.values():
        layer = members[0].layer
        is_fp8 = all(matrix.scheme is not None for matrix in members)
        reason = why_not_fp8(layer.device, layer.dtype, *layer.weight.shape, target=target) if is_fp8 else None
        reasons += [reason] if reason else []
        layer.allocate(fp8=is_fp8 and reason is None)
    if reasons:
        logger.warning("%d of %d linear layers are not multiplied in FP8: %s", len(reasons), len(layers), reasons[0])


def _load_matrix(matrix: Matrix, source: Tensor, scales: Mapping[str, Tensor]) -> None:
    layer, scheme = matrix.layer, matrix.scheme
    name = f"{matrix.name}.weight"
    _check_type(source, name, (FP8,) if scheme is not None and scheme.is_stored else FLOAT_TYPES)
    _check_shape(source, name, layer.weight[matrix.rows].shape)
    weight = source.to(layer.device)
    if scheme is None:
        layer.fill(matrix.rows, weight, None)
    elif not scheme.is_stored:
        layer.fill(matrix.rows, *quantize_weight(weight))
    else:
        layer.fill(matrix.rows, weight, scales[f"{matrix.name}.weight_scale"].to(layer.device))
    if scheme is not None and scheme.is_stored and scheme.has_input_scales:
        scale = scales[f"{matrix.name}.input_scale"].max().to(layer.device)
        # Fused matrices share their input, and the largest scale clips none of it.
        layer.input_scale = scale if layer.input_scale is None else torch.maximum(layer.input_scale, scale)


def _load_parameter(parameter: Tensor, source: Tensor, name: str) -> None:
    _check_type(source, name, FLOAT_TYPES)
    _check_shape(source, name, parameter.shape)
    parameter.copy_(source.to(parameter.device))


def _check_type(tensor: Tensor, name: str, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(f"tensor {name} has type {tensor.dtype}, the model wants {wanted}")


def _check_shape(tensor: Tensor, name: str, wanted: torch.Size) -> None:
    if tensor.shape != wanted:
        raise ValueError(f"tensor {name} has shape {list(tensor.shape)}, the model wants {list(wanted)}")


def _finalize(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, Linear | RMSNorm):
            module.finalize()
