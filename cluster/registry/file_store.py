"""Leases as small JSON files in one directory: the registry of a single machine, with nothing to install.

One file per worker id, replaced by renaming, so a reader sees the old lease or the new one, never a part.
"""

import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cluster.registry.base import Lease, RegistryUnavailable
from cluster.spec import WorkerId

log = logging.getLogger(__name__)

SUFFIX = ".lease"


def clear_leases(directory: Path) -> None:
    """For whoever starts a fresh cluster in `directory`: its workers are not there yet."""
    for path in directory.glob(f"*{SUFFIX}"):
        path.unlink(missing_ok=True)


class _Stored(msgspec.Struct, frozen=True):
    lease: Lease
    expires_at: float  # wall clock


@dataclass(frozen=True, slots=True)
class _Read:
    version: tuple[int, int]  # inode and time of change: another file lies there when they differ
    stored: _Stored | None  # None: malformed


class FileLeaseStore:
    def __init__(self, directory: Path, wall_clock: Callable[[], float] = time.time) -> None:
        """Raises OSError when the directory cannot be made."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory
        self._wall_clock = wall_clock
        self._files: dict[str, _Read] = {}  # by file name

    async def put(self, lease: Lease) -> None:
        name = re.sub(r"[^\w.-]", "_", lease.record.worker_id)
        fresh = self._directory / f".{name}.{os.getpid()}"
        try:
            fresh.write_bytes(msgspec.json.encode(_Stored(lease, self._wall_clock() + lease.ttl)))
            fresh.replace(self._directory / f"{name}{SUFFIX}")
        except OSError as error:
            raise RegistryUnavailable(str(error)) from None

    async def get(self, worker_id: WorkerId) -> Lease | None:
        return next((lease for lease in await self.scan() if lease.record.worker_id == worker_id), None)

    async def scan(self) -> list[Lease]:
        try:
            entries = [entry for entry in os.scandir(self._directory) if entry.name.endswith(SUFFIX)]
        except OSError as error:
            raise RegistryUnavailable(str(error)) from None
        self._files = {entry.name: read for entry in entries if (read := self._read(entry))}
        now = self._wall_clock()
        return [read.stored.lease for read in self._files.values() if read.stored and read.stored.expires_at > now]

    async def aclose(self) -> None:
        self._files.clear()

    def _read(self, entry: os.DirEntry[str]) -> _Read | None:
        """None when the file has just gone. A version is read, and complained about, once."""
        try:
            status = entry.stat()
            data = Path(entry.path).read_bytes()
        except OSError:
            return None
        version = (status.st_ino, status.st_mtime_ns)
        known = self._files.get(entry.name)
        if known and known.version == version:
            return known
        try:
            return _Read(version, msgspec.json.decode(data, type=_Stored))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            log.warning("ignoring the lease file %s: %s", entry.path, error)
            return _Read(version, None)
