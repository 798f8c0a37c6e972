"""Matrix products of the model: weights [out, in] as in the checkpoint, several of them fused by rows.

Built by the blocks in this package, filled by `engine.weights`, then `finalize`d once for its device.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKED_FOR_ROWS = 16  # measured: this packing is the best or close to it from 1 row to 512


class Linear(nn.Module):
    """`parts` maps the checkpoint's names of the fused matrices, in row order, to their numbers of rows.

    On the CPU the product runs in oneDNN on a weight packed at load: PyTorch's own float32 path takes
    2 to 4 times as long from 1 row to 512 (see benchmarks/generate_speed.py).
    """

    def __init__(self, in_features: int, parts: Mapping[str, int], *, bias: bool = False) -> None:
        super().__init__()
        self.parts = dict(parts)
        self.weight = nn.Parameter(torch.empty(sum(parts.values()), in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(sum(parts.values())), requires_grad=False) if bias else None
        self.packed: Tensor | None = None

    def finalize(self) -> None:
        """Give the loaded weight the form that its device multiplies fastest."""
        self.packed = pack(self.weight)
        if self.packed is not None:
            self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [num_tokens, in] -> [num_tokens, out]"""
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        return packed_linear(x, self.packed, self.bias)


def pack(weight: Tensor) -> Tensor | None:
    """`weight` in oneDNN's own order of memory, or None where that is no gain."""
    if weight.device.type != "cpu" or weight.dtype is torch.float16 or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)
    return packed


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")
    return product
