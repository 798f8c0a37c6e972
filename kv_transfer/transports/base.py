"""How the bytes of pieces travel from a source's memory into a sink's. See the modules beside this one.

A piece is one source block's bytes of one group of layers, contiguous in the source's memory. The source runs a
`ServerTransport` for each way it can be read; a sink makes one reader for each link, with the transport that the
source chose at the first message. There are three kinds of reader, by what can be done with the source's memory:

  PieceReader    the CPU brings each piece to an address of host memory (shared memory, TCP)
  MappedReader   the source's memory is within reach of the sink's device (CUDA IPC): its kernels read it in place
  StageReader    pieces arrive packed in a buffer on the sink's device (NCCL), from where they are scattered

`kv_transfer.copier` says which kinds can fill which kind of memory. Readers only ever write into the buffers that
they were given, only inside the call.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:  # the host path never loads it
    from torch import Tensor

LINK_ID_BYTES = 16
LINK_KEY_BYTES = 48  # link id, then a secret known to the two ends of the link alone


@dataclass(frozen=True, slots=True)
class Run:
    """Final pieces of consecutive blocks of one layer group, as one announcement has them or a part of it.

    `checksums`: one for each piece, or none at all where the bytes pass through no CPU (`ServerTransport.checksums`).
    """

    layer_group: int
    first_block: int  # in the order of the lease
    num_blocks: int
    checksums: Sequence[int] = ()
    num_failures: int = 0  # times it was tried in vain

    def part(self, start: int, stop: int, num_more_failures: int = 0) -> "Run":
        """Its pieces from `start` to before `stop`, counted from its first."""
        return Run(
            self.layer_group,
            self.first_block + start,
            stop - start,
            self.checksums[start:stop],
            self.num_failures + num_more_failures,
        )


@dataclass(frozen=True, slots=True)
class Fetch:
    """`into` is a writable contiguous buffer of exactly the piece's size."""

    layer_group: int
    block_index: int  # in the order of the lease
    offset: int  # of the piece in the source's memory
    into: memoryview


# Parts are verified as they arrive, while they are in the cache: 5 to 10 % faster than after a piece of 2 MiB.
Arrived = Callable[[memoryview], None]
PART_BYTES = 256 << 10


@runtime_checkable
class PieceReader(Protocol):
    """The sink's end. `read` is called from several copy threads at once; `close` when none runs any more."""

    name: str
    batch_bytes: int  # about how much to ask for in one `read`

    def read(self, lease_id: str, fetches: Sequence[Fetch], arrived: Arrived, stop: Event) -> None:
        """Fill the buffers, one after another, and call `arrived` with each part of them once it is in place, in order.

        Raise TransferError when that cannot be done, or soon after `stop` is set.
        """
        ...

    def close(self) -> None: ...


@runtime_checkable
class MappedReader(Protocol):
    """The sink's end where kernels of the sink's device can read the source's memory.

    The memory stays readable until `close`, however the source ends; what its bytes mean is only known afterwards,
    when the source confirms that the lease held. `close` is called when no copy runs any more.
    """

    name: str

    @property
    def memory(self) -> "Tensor":
        """uint8 [size of the source's memory], contiguous. Read only."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class StageReader(Protocol):
    """The sink's end where pieces arrive packed. Called from several copy threads at once, each with its own stage.

    `close` is called when none runs any more.
    """

    name: str
    batch_bytes: int  # about how much to ask for in one call; a stage may be smaller

    def read_into(self, lease_id: str, runs: Sequence[Run], sizes: Sequence[int], stage: "Tensor", stop: Event) -> None:
        """Fill `stage`, uint8 [exactly the bytes of all pieces], with the pieces in order, without gaps.

        `sizes`: the bytes of one piece of each run. Blocking: when it returns, the bytes are in the device's memory,
        final and visible to work that is submitted to any stream afterwards. When it raises, nothing may write into
        the stage any more: it is used for something else at once. Raise TransferError when it cannot be done, when
        the peer is silent beyond the transport's own deadline, or soon after `stop` is set.
        """
        ...

    def close(self) -> None: ...


Reader = PieceReader | MappedReader | StageReader


class SinkTransport(Protocol):
    name: str

    def connect(self, address: str, key: bytes, size: int) -> Reader:
        """Blocking. `size`: bytes of the source's memory. Raise TransferError when the source cannot be read so."""
        ...


class ReadGuard(Protocol):
    """What a sending transport asks of its source. Any thread."""

    def link_key(self, link_id: bytes) -> bytes | None:
        """The key of a live link."""
        ...

    def begin_read(
        self, link_id: bytes, lease_id: str, pieces: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int]] | None:
        """(offset, size) of each (layer group, block index), which stay as they are until `end_read`.

        None when the link has not opened the lease, the lease has ended, or a piece is not final.
        """
        ...

    def end_read(self, lease_id: str) -> None: ...


class ServerTransport(Protocol):
    """The source's end.

    One that sends from a device's memory packs the pieces of a request with `CopyStream.run(memory.tensor, stage,
    packed(ranges), stop)` (kv_transfer/copy_stream.py), where `ranges` is what `ReadGuard.begin_read` gave.
    """

    name: str

    @property
    def checksums(self) -> bool:
        """Whether the bytes pass through a CPU, so that announcements carry the checksum of every piece."""
        ...

    @property
    def worthwhile_bytes(self) -> int:
        """How much KV of a prompt is worth an announcement before the prompt is complete."""
        ...

    @property
    def address(self) -> str: ...

    def reaches(self, boot_id: str) -> bool:
        """Whether a sink on the host with this boot id may be able to read."""
        ...

    def start(self, guard: ReadGuard) -> None: ...

    def key(self, link_key: bytes) -> bytes:
        """What the sink of a link must know to read."""
        ...

    def close(self) -> None:
        """Blocking. No read runs afterwards."""
        ...
