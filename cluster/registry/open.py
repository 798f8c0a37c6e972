"""From the spec's `registry` line to a registry."""

from pathlib import Path

from cluster.registry.base import Registry
from cluster.registry.file_store import FileLeaseStore
from cluster.spec import ClusterSpec
from cluster.spec_errors import SpecError


def open_registry(spec: ClusterSpec) -> Registry:
    """The registry of a deployment; the caller closes it. Raises SpecError."""
    if not spec.registry.startswith("file"):
        from cluster.registry.redis_store import RedisLeaseStore  # here, for lease files need no client

        try:
            return Registry(RedisLeaseStore(spec.registry, spec.name))
        except ValueError as error:
            raise SpecError([f"registry: {spec.registry!r} is not allowed: {error}"]) from None
    try:
        return Registry(FileLeaseStore(lease_directory(spec)))
    except OSError as error:
        raise SpecError([f"registry: {spec.registry!r} cannot be used: {error}"]) from None


def lease_directory(spec: ClusterSpec) -> Path:
    if spec.registry != "file":
        return Path(spec.registry.removeprefix("file:"))
    assert spec.run_dir is not None, "with_run_dir comes first"
    return Path(spec.run_dir) / "workers"
