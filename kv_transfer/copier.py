"""How the pieces of one lease get into the sink's blocks: what a pull asks for, and who can do it.

A copier is made by the sink for each pull, of the kind that the sink's memory and the link's reader need, and called
from copy threads:

  sink's memory   PieceReader                     MappedReader        StageReader
  host            HostCopier                      -                   -
  device          DeviceCopier, by pinned memory  DeviceCopier        DeviceCopier
"""

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, Protocol

from engine.errors import TransferError
from engine.kv.memory import HostMemory, KvMemory
from kv_transfer.host_copier import HostCopier
from kv_transfer.plan import TransferPlan
from kv_transfer.target import Target
from kv_transfer.transports.base import PieceReader, Reader, Run

if TYPE_CHECKING:
    from kv_transfer.copy_stream import CopyStream


class Copier(Protocol):
    """Writes only into the blocks that it was given, only inside `fetch`."""

    groups: tuple[range, ...]  # the source's layers of each group
    needed_groups: frozenset[int]  # those of which the sink wants anything
    job_bytes: int  # about how much one `fetch` should be given
    checksums: bool  # whether each run must have the checksums of its pieces

    def piece_bytes(self, layer_group: int) -> int: ...

    def fetch(self, runs: Sequence[Run], stop: Event) -> tuple[list[Run], str]:
        """Copy, verify and place; returns what did not arrive right, and why. Blocking. What is not in that list is
        in place, and verified where it has checksums."""
        ...


@dataclass(frozen=True, slots=True)
class CopierConfig:
    """`stage_bytes`: of one buffer on the device; there is one for each copy thread of a link that needs them."""

    job_bytes: int
    copy_threads: int
    stage_bytes: int


def warm_up(memory: KvMemory) -> None:
    """Compile what copies into device memory need, before anybody waits for it. Seconds, the first time."""
    if isinstance(memory, HostMemory):
        return
    from engine.kv.device_memory import DeviceMemory
    from kv_transfer.copy_stream import CopyStream

    assert isinstance(memory, DeviceMemory), memory
    CopyStream(memory.device, num_slots=1)


def open_stream(memory: KvMemory, reader: Reader, config: CopierConfig) -> "CopyStream | None":
    """What the copiers of one link need on the device; None for host memory. Raise TransferError when they cannot be.

    Each link has its own, so that a source that stalls while it fills a stage holds up nobody else.
    """
    if isinstance(memory, HostMemory):
        if not isinstance(reader, PieceReader):
            raise TransferError(f"{reader.name} cannot fill host memory", retryable=False)
        return None
    from engine.kv.device_memory import DeviceMemory
    from kv_transfer.device_copier import open_device_stream

    assert isinstance(memory, DeviceMemory), memory
    return open_device_stream(memory, reader, config.copy_threads, config.stage_bytes)


def make_copier(
    reader: Reader, plan: TransferPlan, memory: KvMemory, target: Target, stream: "CopyStream | None", job_bytes: int
) -> Copier:
    """`stream` is what `open_stream` made. Raise TransferError when the target's pieces are too large for it."""
    if stream is None:
        assert isinstance(memory, HostMemory), memory
        assert isinstance(reader, PieceReader), reader
        return HostCopier(reader, plan, memory, target, job_bytes)
    from engine.kv.device_memory import DeviceMemory
    from kv_transfer.device_copier import DeviceCopier

    assert isinstance(memory, DeviceMemory), memory
    return DeviceCopier(reader, plan, memory, target, stream)
