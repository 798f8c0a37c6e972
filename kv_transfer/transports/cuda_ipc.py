"""Between two processes on one host: the sink maps the source's KV in device memory, and its kernels read it there.

The address is "device uuid:offset of the pool:offset of the proof", in the allocation that the handle names; the key
is the handle, then the proof: random bytes that lie behind the pool. A handle holds ids of the source's process,
which may mean another one where the sink runs, so the sink looks for the proof before it believes that it has mapped
the right memory. Both reach it over the link, which has shown that it knows the deployment's token.

The sink reads only what the source announced, and the source announces only what is final on its device: no stream
here waits for anything in another process (docs/decisions/0001-ipc-ordering.md). The mapping keeps the memory alive
when the source dies.
"""

import hmac
import logging
import os

import torch
from torch import Tensor

from engine.errors import TransferError
from engine.kv.device_memory import PROOF_BYTES, DeviceMemory
from kv_transfer.transports import cuda_driver as driver
from kv_transfer.transports.base import ReadGuard
from kv_transfer.transports.shared_memory import host_boot_id

log = logging.getLogger(__name__)

NAME = "cuda_ipc"


class CudaIpcServer:
    """Raise TransferError when this memory cannot be shared with other processes."""

    name = NAME
    checksums = False
    # Half a millisecond to copy. Where both processes share a GPU, each copy makes it change from one to the other.
    worthwhile_bytes = 512 << 20

    def __init__(self, memory: DeviceMemory) -> None:
        self._boot_id = host_boot_id()
        self._proof = os.urandom(PROOF_BYTES)
        index = memory.device.index
        memory.proof.copy_(torch.frombuffer(bytearray(self._proof), dtype=torch.uint8))
        torch.cuda.current_stream(index).synchronize()
        pool = memory.tensor.data_ptr()
        try:
            with driver.context(index):
                start, _ = driver.allocation(pool)
                self._handle = driver.export(start)
        except driver.CudaError as error:
            raise TransferError(f"KV memory on {memory.device} cannot be shared: {error}", retryable=False) from error
        self.address = f"{_uuid(index)}:{pool - start}:{memory.proof.data_ptr() - start}"

    def start(self, guard: ReadGuard) -> None:
        pass

    def reaches(self, boot_id: str) -> bool:
        return boot_id == self._boot_id

    def key(self, link_key: bytes) -> bytes:  # noqa: ARG002
        return self._handle + self._proof

    def close(self) -> None:
        """Sinks that have the memory mapped keep it until they close it."""


class CudaIpcSink:
    """`device` is where the sink's KV is."""

    name = NAME

    def __init__(self, device: torch.device) -> None:
        self._index = device.index

    def connect(self, address: str, key: bytes, size: int) -> "CudaIpcReader":
        parts = address.split(":")
        if (
            len(parts) != 3
            or not all(part.isascii() and part.isdigit() and len(part) < 16 for part in parts[1:])
            or len(key) != driver.HANDLE_BYTES + PROOF_BYTES
        ):
            raise TransferError("the source's CUDA IPC address or key is malformed", retryable=True)
        self._check_reach(parts[0])
        handle, proof = key[: driver.HANDLE_BYTES], key[driver.HANDLE_BYTES :]
        try:
            reader = CudaIpcReader(self._index, handle, int(parts[1]), size)
        except driver.CudaError as error:
            raise TransferError(f"the source's device memory cannot be mapped: {error}", retryable=True) from error
        try:
            reader.prove(int(parts[2]), proof)
        except BaseException as error:
            reader.close()
            if isinstance(error, driver.CudaError | RuntimeError):  # of the driver or of torch
                raise TransferError(f"the source's device memory cannot be read: {error}", retryable=True) from error
            raise
        return reader

    def _check_reach(self, uuid: str) -> None:
        """A device that this process does not see is found out when its memory is opened."""
        for index in range(torch.cuda.device_count()):
            if _uuid(index) != uuid or index == self._index:
                continue
            if not torch.cuda.can_device_access_peer(self._index, index):
                raise TransferError(f"device {self._index} cannot reach the source's device", retryable=True)


class CudaIpcReader:
    """A MappedReader. Owns the mapping. Raise CudaError when there can be none."""

    name = NAME

    def __init__(self, device_index: int, handle: bytes, offset: int, size: int) -> None:
        self._index = device_index
        with driver.context(device_index):
            self._start = driver.open_mapping(handle)
            try:
                start, mapped = driver.allocation(self._start)
            except driver.CudaError:
                driver.close_mapping(self._start)
                raise
        self._mapped = mapped - (self._start - start)
        self._offset = offset
        self._size = size
        self._memory: Tensor | None = None

    @property
    def memory(self) -> Tensor:
        assert self._memory is not None, "closed"
        return self._memory

    def prove(self, proof_offset: int, proof: bytes) -> None:
        """Look for the proof, and make the memory known. Raise TransferError when it is not there."""
        if max(self._offset + self._size, proof_offset + PROOF_BYTES) > self._mapped:
            raise TransferError("the source's device memory has another size", retryable=True)
        stream = torch.cuda.Stream(self._index)  # type: ignore[no-untyped-call]
        with torch.cuda.device(self._index), torch.cuda.stream(stream):
            found = bytes(self._tensor(proof_offset, PROOF_BYTES).cpu().numpy())  # waits for this stream alone
            if not hmac.compare_digest(found, proof):
                raise TransferError("the memory at the source's handle is another one", retryable=True)
            self._memory = self._tensor(self._offset, self._size)

    def close(self) -> None:
        self._memory = None
        try:
            with driver.context(self._index):
                driver.close_mapping(self._start)
        except driver.CudaError as error:  # nothing that the caller could do about it
            log.warning("closing the mapping of a source's memory: %s", error)

    def _tensor(self, offset: int, size: int) -> Tensor:
        return torch.as_tensor(_Mapped(self._start + offset, size))


class _Mapped:
    """What torch makes a tensor of that does not own its memory."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"data": (address, False), "shape": (size,), "typestr": "|u1", "version": 3}


def _uuid(device_index: int) -> str:
    return str(torch.cuda.get_device_properties(device_index).uuid)
