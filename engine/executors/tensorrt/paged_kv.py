"""Between the paged KV and an engine's tensors: the past gathered from the blocks, new keys and values scattered.

Either is one operation for a range of layers, over rows of head_dim elements: each row of `[block, layer, k|v,
kv_head, slot]` is found by where its token's slot lies, and by an offset for its layer, k or v, and head.
"""

import numpy as np
import torch
from torch import Tensor

from engine.executors.tensorrt.calls import Int32s


class PagedKv:
    """`kv` [block, layer, k|v, kv_head, slot, head_dim] belongs to the executor.

    Raises ValueError when its rows cannot be numbered in 32 bits.
    """

    def __init__(self, kv: Tensor, layers_at_once: int) -> None:
        self.num_blocks, num_layers, _, num_kv_heads, self.block_size, self.head_dim = kv.shape
        self.layers_at_once = layers_at_once
        self.rows_per_layer = 2 * num_kv_heads  # of each token
        self._rows = kv.view(-1, self.head_dim)
        if len(self._rows) >= 1 << 31:
            raise ValueError(f"an engine reads at most {(1 << 31) - 1} rows of KV, and there are {len(self._rows)}")
        self._layer_size = self.rows_per_layer * self.block_size
        self._block_size_in_rows = num_layers * self._layer_size
        offsets = torch.arange(layers_at_once * self.rows_per_layer, device=kv.device) * self.block_size
        self._offsets = offsets[:, None]
        self._narrow_offsets = self._offsets.int()

    def first_rows(self, slots: Int32s) -> Int32s:
        """The row of layer 0's first key head in each of `slots` (block_id * block_size + slot)."""
        rows: Int32s = slots // self.block_size * np.int32(self._block_size_in_rows) + slots % self.block_size
        return rows

    def gather_index(self, first_rows: Tensor, out: Tensor) -> Tensor:
        """int32 [tokens] -> `out` int32 [layers, k|v, kv_head, tokens] flattened, for `gather`."""
        torch.add(self._narrow_offsets, first_rows, out=out.view(-1, first_rows.numel()))
        return out

    def scatter_index(self, first_rows: Tensor) -> Tensor:
        """int32 [tokens] -> int64 [layers * k|v * kv_head, tokens], for `scatter`."""
        return self._offsets + first_rows

    def gather(self, first_layer: int, index: Tensor, out: Tensor) -> None:
        """Into `out` [rows, head_dim] what lies at `index`, whose leading part of as many rows counts."""
        torch.index_select(self._rows[first_layer * self._layer_size :], 0, index[: len(out)], out=out)

    def scatter(self, first_layer: int, index: Tensor, new: Tensor) -> None:
        """Write `new` [layers * k|v * kv_head, at least as many tokens as `index` has, head_dim]."""
        rows = self._rows[first_layer * self._layer_size :]
        rows.index_put_((index[: len(new)],), new[:, : index.shape[1]])
