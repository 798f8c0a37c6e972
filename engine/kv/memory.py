"""The bytes of one rank's KV pool: what every kind of memory has in common, and the kind that lies in host memory.

Host memory is an anonymous memory file (memfd), shareable with other processes of the same user: another process on
the host can map it through `/proc/<pid>/fd/<fd>`, and it vanishes with its last user, however that one died.
`engine.kv.device_memory` has the kind that lies in a device's memory.
"""

import contextlib
import fcntl
import mmap
import os
from typing import Protocol

from engine.kv.layout import KvLayout


class KvMemory(Protocol):
    """`size` = `num_blocks * layout.block_bytes` bytes, block after block, owned until `close`.

    The executor writes KV into them, transports read and write them; who may touch which block when is the block
    pool's and the leases' business.
    """

    @property
    def layout(self) -> KvLayout: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def size(self) -> int: ...

    def close(self) -> None:
        """Give the memory back. Tensors and views made from it must not be used afterwards."""
        ...


class HostMemory:
    """A KvMemory of zeroed bytes in a memory file. `buffer` is writable and C-contiguous."""

    def __init__(self, layout: KvLayout, num_blocks: int) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.size = num_blocks * layout.block_bytes
        self.fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.truncate(self.fd, self.size)
            # A file that shrinks would kill whoever has it mapped.
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._mapping = mmap.mmap(self.fd, self.size)
        except BaseException:
            os.close(self.fd)
            raise
        self.buffer = memoryview(self._mapping)

    def block(self, block_id: int) -> memoryview:
        """Bytes of one block, all layers."""
        assert 0 <= block_id < self.num_blocks, (block_id, self.num_blocks)
        size = self.layout.block_bytes
        return self.buffer[block_id * size : (block_id + 1) * size]

    def close(self) -> None:
        """Give the memory back. Tensors and views made from `buffer` must not be used afterwards."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self.buffer.release()
            with contextlib.suppress(BufferError):  # a tensor still points into it: the mapping goes with that one
                self._mapping.close()
