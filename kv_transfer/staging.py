"""Device memory as the CPU sees it: read window by window into pinned memory, for transports that send from the CPU.

What is read is final, so nothing has to be waited for but the copy itself, on a stream of its own.
"""

from collections.abc import Iterator, Sequence

import torch

from engine.kv.device_memory import DeviceMemory
from kv_transfer.checksum import Digests

WINDOW_BYTES = 4 << 20


class HostWindow:
    """Belongs to one thread at a time."""

    def __init__(self, memory: DeviceMemory) -> None:
        cuda = memory.device.type == "cuda"
        self._memory = memory
        self._host = torch.empty(WINDOW_BYTES, dtype=torch.uint8, pin_memory=cuda)
        self._stream = torch.cuda.Stream(memory.device, priority=0) if cuda else None  # type: ignore[no-untyped-call]

    def chunks(self, ranges: Sequence[tuple[int, int]]) -> Iterator[memoryview]:
        """The bytes of (offset, size) ranges one after another. Each chunk is good until the next one is asked for."""
        pool = self._memory.tensor[: self._memory.size]
        for offset, size in ranges:
            for start in range(offset, offset + size, WINDOW_BYTES):
                data = pool[start : min(start + WINDOW_BYTES, offset + size)]
                host = self._host[: len(data)]
                if self._stream is None:
                    host.copy_(data)
                else:
                    with torch.cuda.stream(self._stream):
                        host.copy_(data, non_blocking=True)
                    self._stream.synchronize()
                yield host.numpy().data


class DeviceChecksums:
    """The PieceChecksums of device memory. Called from one thread."""

    inline_bytes = 0

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        self._window: HostWindow | None = None  # most links need none

    def of(self, block_ids: Sequence[int], offset: int, piece_bytes: int) -> list[int]:
        if self._window is None:
            self._window = HostWindow(self._memory)
        digests = Digests(piece_bytes for _ in block_ids)
        block_bytes = self._memory.layout.block_bytes
        for chunk in self._window.chunks([(block_id * block_bytes + offset, piece_bytes) for block_id in block_ids]):
            digests.arrived(chunk)
        return digests.done
