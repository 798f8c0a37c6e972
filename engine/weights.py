"""Loads safetensors checkpoints into a model, shard by shard, and names a checkpoint by its content.

`load_weights` fills every parameter exactly once or raises ValueError naming what is missing, unexpected
or mis-shaped; matrices that the model fuses are copied into their rows. Nothing is ever unpickled, and a
shard index may only name plain files beside it.
"""

import json
import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from xxhash import xxh3_128

from engine.layers.linear import Linear
from engine.layers.norm import RMSNorm
from engine.model_config import MAX_CONFIG_BYTES, read_json_object

MAX_INDEX_BYTES = 64 << 20
MAX_HEADER_BYTES = 100 << 20  # the format's own limit
SAMPLES_PER_TENSOR = 16
SAMPLE_BYTES = 4096
FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_NAMES = 8  # in an error message
# Written by tools, of no effect on what the model computes.
VOLATILE_CONFIG_FIELDS = ("_name_or_path", "transformers_version")

Progress = Callable[[int, int], None]  # bytes loaded so far, bytes in all


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies, from the header of a safetensors file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # in the file
    size: int


def load_weights(model: nn.Module, path: Path, progress: Progress | None = None) -> None:
    """Load the checkpoint in directory `path`, cast to the parameters' types, and finalize the layers."""
    entries = read_entries(path)
    destinations = _destinations(model)
    _check_names(model, destinations, {entry.name for entry in entries})
    total, done = sum(entry.size for entry in entries), 0
    for file in sorted({entry.file for entry in entries}):
        with _open(file) as tensors:
            for entry in entries:
                if entry.file == file:
                    if entry.name in destinations:
                        _copy(tensors.get_tensor(entry.name), destinations[entry.name], entry.name)
                    done += entry.size
                    if progress is not None:
                        progress(done, total)
    for module in model.modules():
        if isinstance(module, Linear | RMSNorm):
            module.finalize()


def model_hash(path: Path) -> str:
    """xxh3-128 over config.json and, per tensor by name, its type, shape and a sample of its bytes.

    The sample is 16 pieces of 4 KiB spread evenly, the whole of a small tensor: enough to tell apart any two
    trainings, in a fraction of a second for any size and however the file is sharded. It does not detect an
    edit made to escape it.
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
    return digest.hexdigest()


def num_parameters(path: Path) -> int:
    """Elements of all tensors of the checkpoint."""
    return sum(math.prod(entry.shape) for entry in read_entries(path))


def _sample_offsets(size: int) -> Iterable[int]:
    if size <= SAMPLES_PER_TENSOR * SAMPLE_BYTES:
        return range(0, size, SAMPLE_BYTES)
    return [(size - SAMPLE_BYTES) * i // (SAMPLES_PER_TENSOR - 1) for i in range(SAMPLES_PER_TENSOR)]


def read_entries(path: Path) -> list[TensorEntry]:
    """Every tensor of the checkpoint, from the headers of its shards. Raises ValueError."""
    entries = [entry for file in shard_files(path) for entry in _read_header(file)]
    if not entries:
        raise ValueError(f"{path} holds no tensors")
    return entries


def shard_files(path: Path) -> list[Path]:
    """model.safetensors, or the files that its index names."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise ValueError(f"{path} holds neither {single.name} nor {index.name}; only safetensors are loaded")
    weight_map = read_json_object(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index.name}: weight_map must map tensor names to file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(f"{index.name} names {name!r:.80}, which is not a plain .safetensors file name")
        if not (path / name).is_file():
            raise ValueError(f"{index.name} names {name!r:.80}, which is missing")
    return [path / name for name in names]


def _read_header(path: Path) -> list[TensorEntry]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > min(MAX_HEADER_BYTES, path.stat().st_size):
            raise ValueError(f"{path.name} is not a safetensors file: its header would have {size} bytes")
        text = file.read(size)
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        header = json.loads(text)
        header.pop("__metadata__", None)
        return [_entry(path, name, fields, 8 + size) for name, fields in header.items()]
    raise ValueError(f"{path.name} is not a safetensors file: its header cannot be read")


def _entry(file: Path, name: str, fields: dict[str, Any], data_start: int) -> TensorEntry:
    begin, end = (int(offset) for offset in fields["data_offsets"])
    shape = tuple(int(size) for size in fields["shape"])
    return TensorEntry(file, name, str(fields["dtype"]), shape, data_start + begin, end - begin)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file.name} is not a valid safetensors file: {error}") from None


def _destinations(model: nn.Module) -> dict[str, Tensor]:
    """Checkpoint name -> the memory it fills. A fused matrix is found under its own name and its parts'."""
    destinations: dict[str, Tensor] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            destinations[f"{module_name}.{name}"] = parameter
            if isinstance(module, Linear):
                first = 0
                for part, num_rows in zip(_part_names(module_name, module), module.parts.values(), strict=True):
                    destinations[f"{part}.{name}"] = parameter[first : first + num_rows]
                    first += num_rows
    return destinations


def _part_names(module_name: str, module: Linear) -> list[str]:
    prefix, dot, _ = module_name.rpartition(".")
    return [f"{prefix}{dot}{part}" for part in module.parts]


def _check_names(model: nn.Module, destinations: dict[str, Tensor], found: set[str]) -> None:
    unexpected = {name for name in found - destinations.keys() if not _is_redundant(name, destinations)}
    missing: set[str] = set()
    for module_name, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            if f"{module_name}.{name}" not in found:
                parts = _part_names(module_name, module) if isinstance(module, Linear) else [module_name]
                missing.update(f"{part}.{name}" for part in parts if f"{part}.{name}" not in found)
    for names, problem in ((missing, "lacks"), (unexpected, "has tensors that the model does not know:")):
        if names:
            listed = ", ".join(sorted(names)[:MAX_NAMES])
            more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
            raise ValueError(f"the checkpoint {problem} {listed}{more}")


def _is_redundant(name: str, destinations: dict[str, Tensor]) -> bool:
    """Buffers that old checkpoints carry, and the head's copy of an embedding it is tied to."""
    return name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and name not in destinations)


def _copy(source: Tensor, destination: Tensor, name: str) -> None:
    if source.dtype not in FLOAT_TYPES:
        raise ValueError(f"tensor {name} has type {source.dtype}; quantized checkpoints are not supported")
    if source.shape != destination.shape:
        raise ValueError(f"tensor {name} has shape {list(source.shape)}, the model wants {list(destination.shape)}")
    destination.copy_(source)
