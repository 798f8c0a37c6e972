"""Which transports a worker offers or reads with: one list for each role, best first, by the device and the spec.

What needs a GPU's libraries is imported where a worker on a GPU asks for it, and nowhere else.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from cluster.spec import ClusterSpec, PoolSettings
from cluster.spec_errors import SpecError
from engine.errors import TransferError
from engine.executors.base import Executor
from engine.kv.memory import HostMemory
from engine.server import WorkerIdentity
from kv_transfer.transports.base import ServerTransport, SinkTransport
from kv_transfer.transports.shared_memory import SharedMemoryServer, SharedMemorySink
from kv_transfer.transports.tcp import TcpSink
from kv_transfer.transports.tcp_server import TcpServer

if TYPE_CHECKING:
    from engine.kv.device_memory import DeviceMemory

log = logging.getLogger(__name__)

BY_DEVICE = {"cpu": ("shared_memory", "tcp"), "cuda": ("cuda_ipc", "nccl", "tcp")}

T = TypeVar("T")


def server_transports(
    spec: ClusterSpec, pool: PoolSettings, identity: WorkerIdentity, executor: Executor
) -> list[ServerTransport]:
    """What a prefill worker's KV can be read with. Whoever gets them closes them. Raises SpecError."""
    return _usable(spec, pool, lambda name: _server(name, pool, identity, executor))


def sink_transports(
    spec: ClusterSpec, pool: PoolSettings, identity: WorkerIdentity, executor: Executor
) -> list[SinkTransport]:
    """What a decode worker reads with. Raises SpecError."""
    return _usable(spec, pool, lambda name: _sink(name, identity, executor))


def _usable(spec: ClusterSpec, pool: PoolSettings, make: Callable[[str], T]) -> list[T]:
    """The one the spec asks for; with `auto` all that this machine has what they need for."""
    asked = spec.transfer.transport
    if asked != "auto":
        try:
            return [make(asked)]
        except (ImportError, TransferError) as error:
            raise SpecError([f"transfer.transport: {asked!r} cannot be used here: {error}"]) from error
    made = []
    for name in BY_DEVICE[pool.device]:
        try:
            made.append(make(name))
        except (ImportError, TransferError) as error:
            log.warning("KV does not move over %s here: %s", name, error)
    return made


def _server(name: str, pool: PoolSettings, identity: WorkerIdentity, executor: Executor) -> ServerTransport:
    host = identity.advertise_host
    match name:
        case "cuda_ipc":
            from kv_transfer.transports.cuda_ipc import CudaIpcServer

            return CudaIpcServer(device_memory(executor))
        case "nccl":
            from kv_transfer.transports.nccl_server import NcclServer

            return NcclServer(device_memory(executor), host=pool.host, token=identity.token, advertised_host=host)
        case "tcp":
            return TcpServer(executor.memory, host=pool.host, token=identity.token, advertised_host=host)
        case _:
            memory = executor.memory
            assert isinstance(memory, HostMemory), type(memory)
            return SharedMemoryServer(memory)


def _sink(name: str, identity: WorkerIdentity, executor: Executor) -> SinkTransport:
    match name:
        case "cuda_ipc":
            from kv_transfer.transports.cuda_ipc import CudaIpcSink

            return CudaIpcSink(device_memory(executor).device)
        case "nccl":
            from kv_transfer.transports.nccl import NcclSink

            return NcclSink(identity.token, device_memory(executor).device)
        case "tcp":
            return TcpSink(identity.token)
        case _:
            return SharedMemorySink()


def device_memory(executor: Executor) -> "DeviceMemory":
    from engine.kv.device_memory import DeviceMemory

    memory = executor.memory
    assert isinstance(memory, DeviceMemory), type(memory)
    return memory
