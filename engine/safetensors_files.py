"""The safetensors files of a checkpoint, read with suspicion: no header sizes anything before it is checked.

Nothing is ever unpickled, and a shard index may only name plain files beside it.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from engine.config_fields import read_json_object

MAX_INDEX_BYTES = 64 << 20
MAX_HEADER_BYTES = 100 << 20  # the format's own limit


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies, from the header of a safetensors file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # in the file
    size: int


def read_entries(path: Path) -> list[TensorEntry]:
    """Every tensor of the checkpoint, from the headers of its shards. Raises ValueError."""
    entries = [entry for file in shard_files(path) for entry in _read_header(file)]
    if not entries:
        raise ValueError(f"{path} holds no tensors")
    files: dict[str, Path] = {}
    for entry in entries:
        if (other := files.setdefault(entry.name, entry.file)) != entry.file:
            raise ValueError(f"tensor {entry.name} is in both {other.name} and {entry.file.name}")
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


@contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """`get_tensor(name)` reads one tensor. A ValueError raised meanwhile is given the file's name."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file.name} is not a valid safetensors file: {error}") from None
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from None
