"""Within one process: the sink copies out of the source's memory, found by name in a registry both were given.

For tests and for colocated roles. The registry is an ordinary dict, handed to both ends.
"""

from collections.abc import MutableMapping, Sequence
from threading import Event
from typing import TYPE_CHECKING

from engine.errors import TransferError
from engine.kv.memory import HostMemory, KvMemory
from kv_transfer.transports.base import Arrived, Fetch, Reader, ReadGuard

if TYPE_CHECKING:
    from torch import Tensor

NAME = "loopback"

Registry = MutableMapping[str, KvMemory]


class LoopbackServer:
    name = NAME

    def __init__(self, memory: KvMemory, registry: Registry, address: str) -> None:
        self.checksums = isinstance(memory, HostMemory)
        self.worthwhile_bytes = 0
        self._memory = memory
        self._registry = registry
        self.address = address

    def start(self, guard: ReadGuard) -> None:  # noqa: ARG002
        self._registry[self.address] = self._memory

    def reaches(self, boot_id: str) -> bool:  # noqa: ARG002
        return True

    def key(self, link_key: bytes) -> bytes:  # noqa: ARG002
        return b""

    def close(self) -> None:
        self._registry.pop(self.address, None)


class LoopbackSink:
    name = NAME

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def connect(self, address: str, key: bytes, size: int) -> Reader:  # noqa: ARG002
        memory = self._registry.get(address)
        if memory is None or memory.size != size:
            raise TransferError("the source's memory is not in this process", retryable=True)
        if isinstance(memory, HostMemory):
            return LoopbackReader(memory)
        from engine.kv.device_memory import DeviceMemory  # loads torch

        assert isinstance(memory, DeviceMemory), memory
        return MappedLoopbackReader(memory.tensor[:size])


class LoopbackReader:
    name = NAME
    batch_bytes = 1 << 20

    def __init__(self, memory: HostMemory) -> None:
        self._memory = memory

    def read(self, lease_id: str, fetches: Sequence[Fetch], arrived: Arrived, stop: Event) -> None:  # noqa: ARG002
        for fetch in fetches:
            if stop.is_set():
                raise TransferError("stopped", retryable=True)
            fetch.into[:] = self._memory.buffer[fetch.offset : fetch.offset + len(fetch.into)]
            arrived(fetch.into)

    def close(self) -> None:
        pass


class MappedLoopbackReader:
    name = NAME

    def __init__(self, memory: "Tensor") -> None:
        self.memory = memory

    def close(self) -> None:
        pass
