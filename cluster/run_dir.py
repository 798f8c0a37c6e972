"""The private directory of a cluster on one machine: its spec in effect, logs and lease files.

Whoever starts the cluster holds its lock, so two clusters never share a directory.
"""

import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cluster.spec import ClusterSpec
from cluster.spec_errors import SpecError


def with_run_dir(spec: ClusterSpec, environ: Mapping[str, str]) -> ClusterSpec:
    """`spec` with its `run_dir` filled in. The name is stable, so that other commands find a running cluster."""
    if spec.run_dir is not None:
        path = Path(spec.run_dir)
    else:
        runtime = environ.get("XDG_RUNTIME_DIR")
        base = Path(runtime) / "baton" if runtime else Path(tempfile.gettempdir()) / f"baton-{os.getuid()}"
        path = base / f"{spec.name}-{spec.router.port}"
    return spec.model_copy(update={"run_dir": str(path.resolve())})


def prepare_run_dir(path: Path) -> None:
    """Make it, for this user only. Raises SpecError when someone else made it, or could put another in its place."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        parent, own = path.parent.lstat(), path.lstat()
    except OSError as error:
        raise SpecError([f"run_dir: {str(path)!r} cannot be made: {error.strerror}"]) from None
    shared = parent.st_mode & 0o022 and not parent.st_mode & stat.S_ISVTX
    if shared or parent.st_uid not in (0, os.getuid()):
        raise SpecError([f"run_dir: {str(path.parent)!r} can be changed by other users; needed: one that only you can"])
    if not stat.S_ISDIR(own.st_mode) or own.st_uid != os.getuid() or own.st_mode & 0o022:
        raise SpecError([f"run_dir: {str(path)!r} must be a directory that is yours and that only you can write to"])


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the cluster's lock. Raises SpecError while another process does."""
    with (path / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SpecError(
                [f"run_dir: {str(path)!r} is in use by a running cluster; stop it, or set another name or router.port"]
            ) from None
        yield
