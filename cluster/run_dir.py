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
        return spec
    runtime = environ.get("XDG_RUNTIME_DIR")
    base = Path(runtime) / "baton" if runtime else Path(tempfile.gettempdir()) / f"baton-{os.getuid()}"
    return spec.model_copy(update={"run_dir": str(base / f"{spec.name}-{spec.router.port}")})


def prepare_run_dir(path: Path) -> None:
    """Make it, for this user only. Raises SpecError when it is another's, or open to others."""
    for directory in (path.parent, path):
        try:
            directory.mkdir(mode=0o700, parents=directory is path.parent, exist_ok=True)
            status = directory.lstat()
        except OSError as error:
            raise SpecError([f"run_dir: {str(directory)!r} cannot be made: {error.strerror}"]) from None
    # In a directory that others may write to, the name could have been taken by a link or another user's directory.
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise SpecError([f"run_dir: {str(path)!r} must be a directory that only its owner, this user, can write to"])


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
