"""The bytes of one rank's KV pool in the memory of a device, as one tensor. On the CPU device it serves for tests.

On CUDA the tensor has a memory segment (cudaMalloc) for itself, because the handle under which another process opens
it names a whole segment: nothing else may lie in there, and nothing that others free may give it back.
"""

import torch

from engine.kv.layout import KvLayout

PROOF_BYTES = 64
ALIGNMENT = 256  # of the proof's place


class DeviceMemory:
    """A KvMemory of zeroed bytes on `device`, which is named with its index ("cuda:0") or is the CPU.

    `spare_blocks` lie behind the pool's blocks and are no part of it (`num_blocks` and `size` leave them out, no
    transport reads or writes them): places for writes that nobody wants, such as those of a padded batch.
    Raise torch.OutOfMemoryError when the device has too little memory.
    """

    def __init__(self, layout: KvLayout, num_blocks: int, device: torch.device, spare_blocks: int = 0) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.spare_blocks = spare_blocks
        self.size = num_blocks * layout.block_bytes
        self.device = device
        end = (num_blocks + spare_blocks) * layout.block_bytes
        proof = -(-end // ALIGNMENT) * ALIGNMENT
        self._pool: torch.cuda.MemPool | None = None
        if device.type == "cuda":
            assert device.index is not None, device
            self._pool = torch.cuda.MemPool()
            with torch.cuda.device(device), torch.cuda.use_mem_pool(self._pool):
                storage = torch.empty(proof + PROOF_BYTES, dtype=torch.uint8, device=device)
                storage.zero_()
                torch.cuda.current_stream().synchronize()  # other streams and processes look at it from now on
        else:
            storage = torch.zeros(proof + PROOF_BYTES, dtype=torch.uint8, device=device)
        self._storage = storage
        self._end = end
        self._proof = proof

    @property
    def tensor(self) -> torch.Tensor:
        """uint8 [size and the spare blocks' bytes], contiguous."""
        return self._storage[: self._end]

    @property
    def proof(self) -> torch.Tensor:
        """uint8 [PROOF_BYTES] behind the last block, in the same segment: for who exports the memory.

        What lies there shows whoever has opened the memory by a handle that it is the memory that was meant.
        """
        return self._storage[self._proof :]

    def kv(self, dtype: torch.dtype) -> torch.Tensor:
        """All blocks, the spare ones last: `[block, layer, k|v, kv_head, slot, head_dim]`, a view."""
        return self.tensor.view(dtype).view(self.layout.shape(self.num_blocks + self.spare_blocks))

    def close(self) -> None:
        """Give the memory back once no view of it is left."""
        self._storage = torch.empty(0, dtype=torch.uint8)
        self._end = self._proof = 0
        self._pool = None
