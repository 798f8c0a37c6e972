"""Files that several processes of a machine share: a lock beside each, and replacement in one step."""

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY = ".tmp"


@contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock of `path`, a file beside it. `waiting` is called once where another process has it.

    The lock is the kernel's and ends with its process. The file stays, for removing it could give two processes the
    lock of two files of one name.
    """
    with path.with_name(f"{path.name}.lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def replace_file(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write `path` such that others see all of it or what was there before. Its lock must be held."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_abandoned(directory: Path) -> None:
    """Remove what processes that died while writing left in `directory`: no one holds the lock of those."""
    for temporary in directory.glob(f"*{TEMPORARY}"):
        path = temporary.with_name(temporary.name.removesuffix(TEMPORARY))
        with path.with_name(f"{path.name}.lock").open("ab") as lock, suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            temporary.unlink(missing_ok=True)
