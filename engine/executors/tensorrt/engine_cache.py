"""Compiled engines on disk, under a key of everything that matters.

A file is a header, which holds the key and a checksum, and the plan. It is used only if its key is the one asked for
and all of it is there and unchanged; any other is built again in its place. A lock per file makes of several workers
that start together one builder and others that wait. Callers: `prepare`, which builds, and who runs or inspects one.
"""

import json
import mmap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from xxhash import xxh3_128

from engine.executors.tensorrt.locked_files import locked, remove_abandoned, replace_file

FORMAT = 1  # of the graphs we export and of these files: one more with each change that old engines do not fit
MAGIC = b"baton engine\n\0\0\0"
MAX_HEADER_BYTES = 1 << 16
PIECE_BYTES = 1 << 24
ALIGNMENT = 256
SUFFIX = ".engine"


class EngineFileError(ValueError):
    """The file is no engine, or not whole."""


@dataclass(frozen=True, slots=True)
class EngineKey:
    """What decides what an engine computes, in which shapes, and where it runs."""

    model_hash: str  # of configuration and weights
    graph: str  # of what shapes the graph besides the weights: equal where weights can be exchanged
    first_layer: int
    end_layer: int
    dtype: str
    quantization: str  # "" without
    tokens: tuple[int, int, int]  # of the profile
    past: tuple[int, int, int]
    library: str
    version: str
    capability: str
    gpu: str  # the name of the GPU that kernels were timed on; "" where they were not
    refittable: bool
    workspace: int | None
    format: int = FORMAT

    @property
    def file_name(self) -> str:
        digest = xxh3_128(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]
        return f"{self.kind}-{digest}{SUFFIX}"

    @property
    def kind(self) -> str:
        """For who lists the directory."""
        capability = self.capability.replace(".", "")
        return f"layers-{self.first_layer}-{self.end_layer}-{self.dtype}-sm{capability}"

    def serves(self, asked: "EngineKey") -> bool:
        """Whether this engine does what `asked` names: also one that can be refitted, or was given less scratch."""
        if (asked.refittable and not self.refittable) or asked.workspace not in (None, self.workspace):
            return False
        return replace(self, refittable=asked.refittable, workspace=asked.workspace) == asked


class EngineFile(NamedTuple):
    """A checked file. `plan` is mapped memory: replacing the file does not change it."""

    key: EngineKey
    plan: memoryview


class EngineCache:
    """Engines in `directory`, which is made. Several processes may use it at once."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        remove_abandoned(directory)
        self.directory = directory

    def path(self, key: EngineKey) -> Path:
        return self.directory / key.file_name

    def find(self, key: EngineKey) -> Path | None:
        """A whole file that serves `key`, its own before others."""
        others = sorted(path for path in self.directory.glob(f"{key.kind}-*{SUFFIX}") if path != self.path(key))
        for path in (self.path(key), *others):
            with suppress(OSError, EngineFileError):
                if read_key(path).serves(key) and read_engine(path).key.serves(key):
                    return path
        return None

    def get(
        self, key: EngineKey, build: Callable[[], bytes | memoryview], waiting: Callable[[], None] | None = None
    ) -> Path:
        """The file of `key`, built where there is none to trust. `waiting` is called once if another process has it."""
        path = self.path(key)
        with locked(path, waiting):
            if not is_whole(path, key):
                write_engine(path, key, build())
        return path


def default_directory() -> Path:
    return Path("~/.cache/baton/engines").expanduser()


def is_whole(path: Path, key: EngineKey) -> bool:
    try:
        return read_engine(path).key == key
    except (OSError, EngineFileError):
        return False


def write_engine(path: Path, key: EngineKey, plan: bytes | memoryview) -> None:
    """The lock of `path` must be held."""
    plan = memoryview(plan).cast("B")
    header = {"key": asdict(key), "plan_bytes": plan.nbytes, "plan_xxh3_128": xxh3_128(plan).hexdigest()}
    text = json.dumps(header).encode()
    start = MAGIC + len(text).to_bytes(4, "little") + text
    replace_file(path, [start, bytes(-len(start) % ALIGNMENT), plan])


def read_key(path: Path) -> EngineKey:
    """As `read_engine`, but of the file's beginning, and without looking at the rest."""
    with path.open("rb") as file:
        return _key(_read_header(file, path)[0], path)


def read_engine(path: Path) -> EngineFile:
    """Key and plan of a file, checked. Raises EngineFileError, and OSError where it cannot be read."""
    with path.open("rb") as file:
        header, start = _read_header(file, path)
        key = _key(header, path)
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    plan = mapped[start:]
    if plan.nbytes != header.get("plan_bytes"):
        raise EngineFileError(f"{path} is cut off: {plan.nbytes} bytes of {header.get('plan_bytes')}")
    digest = xxh3_128()
    for offset in range(0, plan.nbytes, PIECE_BYTES):
        digest.update(plan[offset : offset + PIECE_BYTES])
    if digest.hexdigest() != header.get("plan_xxh3_128"):
        raise EngineFileError(f"{path} is damaged: its checksum is another")
    return EngineFile(key, plan)


def _read_header(file: BinaryIO, path: Path) -> tuple[dict[str, Any], int]:
    """The header and where the plan begins."""
    start = file.read(len(MAGIC) + 4)
    size = int.from_bytes(start[len(MAGIC) :], "little")
    if start[: len(MAGIC)] != MAGIC or len(start) < len(MAGIC) + 4 or size > MAX_HEADER_BYTES:
        raise EngineFileError(f"{path} is not an engine of Baton")
    try:
        header = json.loads(file.read(size))
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise EngineFileError(f"{path} is damaged: its header cannot be read")
    end = len(start) + size
    return header, end + -end % ALIGNMENT


def _key(header: dict[str, Any], path: Path) -> EngineKey:
    values = header.get("key")
    if not isinstance(values, dict) or set(values) != {field.name for field in fields(EngineKey)}:
        raise EngineFileError(f"{path} was written by another version of Baton")
    key: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return EngineKey(**key)
