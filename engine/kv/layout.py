"""How one rank's KV lies in memory: `[block, layer, k|v, kv_head, slot, head_dim]`, C order.

One block of all layers is one contiguous piece, and so is one group of layers inside it: both travel
as one copy. Pure arithmetic, no torch.
"""

from dataclasses import dataclass
from typing import NewType

BlockId = NewType("BlockId", int)

ITEM_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int32": 4}


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Sizes of one rank's KV. `first_layer` and `first_kv_head` place the rank in the whole model."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # slots (tokens) in a block
    dtype: str
    first_layer: int = 0
    first_kv_head: int = 0

    def __post_init__(self) -> None:
        sizes = (self.num_layers, self.num_kv_heads, self.head_dim, self.block_size)
        if min(sizes) < 1 or min(self.first_layer, self.first_kv_head) < 0:
            raise ValueError(f"sizes must be positive: {self}")
        if self.dtype not in ITEM_SIZES:
            raise ValueError(f"dtype must be one of {sorted(ITEM_SIZES)}, not {self.dtype!r}")

    @property
    def head_bytes(self) -> int:
        """Bytes of one kv head's slots in a block: the longest run that different head splits share."""
        return self.block_size * self.head_dim * ITEM_SIZES[self.dtype]

    @property
    def layer_bytes(self) -> int:
        return 2 * self.num_kv_heads * self.head_bytes

    @property
    def block_bytes(self) -> int:
        return self.num_layers * self.layer_bytes

    def shape(self, num_blocks: int) -> tuple[int, int, int, int, int, int]:
        return (num_blocks, self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)
