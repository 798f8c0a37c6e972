"""Between two processes of one user on one host: the sink maps the source's memory file, read-only.

The address is "pid:pool fd:key fd". A process id says nothing about who answers to it in this sink's process
namespace, so the source keeps a second memory file with random bytes which the link also carries: the pool is only
opened in the process where the key file holds them. Both are looked up under one open handle of /proc/<pid>, which
goes stale with that process, so an id that is reused in between is not followed.
"""

import hmac
import mmap
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from threading import Event

import numpy as np

from engine.errors import TransferError
from engine.kv.memory import HostMemory
from kv_transfer.transports.base import PART_BYTES, Arrived, Fetch, ReadGuard

NAME = "shared_memory"
KEY_BYTES = 32


def host_boot_id() -> str:
    """Equal for two processes only if they run on one host."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class SharedMemoryServer:
    name = NAME
    checksums = True
    worthwhile_bytes = 0

    def __init__(self, memory: HostMemory) -> None:
        self._memory = memory
        self._boot_id = host_boot_id()
        self._key = os.urandom(KEY_BYTES)
        self._key_fd = os.memfd_create("baton-kv-key", os.MFD_CLOEXEC)
        os.pwrite(self._key_fd, self._key, 0)

    @property
    def address(self) -> str:
        return f"{os.getpid()}:{self._memory.fd}:{self._key_fd}"

    def start(self, guard: ReadGuard) -> None:
        pass

    def reaches(self, boot_id: str) -> bool:
        return boot_id == self._boot_id

    def key(self, link_key: bytes) -> bytes:  # noqa: ARG002
        return self._key

    def close(self) -> None:
        if self._key_fd >= 0:
            os.close(self._key_fd)
            self._key_fd = -1


class SharedMemorySink:
    name = NAME

    def connect(self, address: str, key: bytes, size: int) -> "SharedMemoryReader":
        parts = address.split(":")
        if len(parts) != 3 or not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
            raise TransferError("the source's shared memory address is malformed", retryable=True)
        if len(key) != KEY_BYTES:
            raise TransferError("the source's shared memory key is malformed", retryable=True)
        pid, pool_fd, key_fd = parts
        try:
            process = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                return SharedMemoryReader(_map_pool(process, pool_fd, key_fd, key, size))
            finally:
                os.close(process)
        except OSError as error:
            raise TransferError(f"the source's memory cannot be mapped: {error.strerror}", retryable=True) from error


def _map_pool(process: int, pool_fd: str, key_fd: str, key: bytes, size: int) -> mmap.mmap:
    fd = _open_memory_file(process, key_fd, KEY_BYTES)
    try:
        if not hmac.compare_digest(os.pread(fd, KEY_BYTES, 0), key):
            raise TransferError("the process at the source's address is another one", retryable=True)
    finally:
        os.close(fd)
    fd = _open_memory_file(process, pool_fd, size)
    try:
        return mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
    finally:
        os.close(fd)


def _open_memory_file(process: int, fd: str, size: int) -> int:
    """Look before opening: opening whatever else has that number could block or do something."""
    status = os.stat(f"fd/{fd}", dir_fd=process)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 0 or status.st_size != size:
        raise TransferError("the process at the source's address is another one", retryable=True)
    return os.open(f"fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=process)


class SharedMemoryReader:
    name = NAME
    batch_bytes = 8 << 20

    def __init__(self, mapping: mmap.mmap) -> None:
        self._mapping = mapping

    def read(self, lease_id: str, fetches: Sequence[Fetch], arrived: Arrived, stop: Event) -> None:  # noqa: ARG002
        for fetch in fetches:
            if stop.is_set():
                raise TransferError("stopped", retryable=True)
            # numpy, because it copies without the interpreter lock
            source = np.frombuffer(self._mapping, np.uint8, count=len(fetch.into), offset=fetch.offset)
            for start in range(0, len(fetch.into), PART_BYTES):
                part = fetch.into[start : start + PART_BYTES]
                np.copyto(np.frombuffer(part, np.uint8), source[start : start + PART_BYTES])
                arrived(part)

    def close(self) -> None:
        self._mapping.close()
