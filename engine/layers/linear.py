"""Matrix products of the model: weights [out, in] as in the checkpoint, several of them fused by rows.

Built by the blocks in this package, `allocate`d and filled by `engine.weights`, then `finalize`d once for its
device.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.layers.fp8 import FP8, dequantize_weight, fp8_linear

SKINNY_ROWS = range(2, 65)  # where it beats cuBLAS: benchmarks/gpu/kernels.py
PACKED_FOR_ROWS = 16  # measured: this packing is the best or close to it from 1 row to 512


class Linear(nn.Module):
    """`parts` maps the checkpoint's names of the fused matrices, in row order, to their numbers of rows.

    The weight has no memory before `allocate`, since only the checkpoint tells whether it is FP8. On the CPU the
    product runs in oneDNN on a weight packed at load: PyTorch's own float32 path takes 2 to 4 times as long from
    1 row to 512 (see benchmarks/generate_speed.py).
    """

    def __init__(self, in_features: int, parts: Mapping[str, int], *, bias: bool = False) -> None:
        super().__init__()
        self.parts = dict(parts)
        self.device, self.dtype = torch.get_default_device(), torch.get_default_dtype()  # dtype: where not FP8
        self.weight = nn.Parameter(torch.empty(sum(parts.values()), in_features, device="meta"), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(sum(parts.values())), requires_grad=False) if bias else None
        self.weight_scale: Tensor | None = None  # [out] float32, of an FP8 weight
        self.input_scale: Tensor | None = None  # [] float32, where an FP8 checkpoint says it
        self.one: Tensor | None = None  # beside an FP8 weight
        self.packed: Tensor | None = None

    def allocate(self, *, fp8: bool) -> None:
        weight = torch.empty(self.weight.shape, dtype=FP8 if fp8 else self.dtype, device=self.device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        if fp8:
            self.weight_scale = torch.empty(weight.shape[0], dtype=torch.float32, device=self.device)
            self.one = torch.ones((), dtype=torch.float32, device=self.device)

    def fill(self, rows: slice, weight: Tensor, scale: Tensor | None) -> None:
        """Set `rows` to `weight`, which is FP8 where there is a `scale` ([1] or one per row)."""
        if scale is not None and self.weight_scale is None:
            weight, scale = dequantize_weight(weight, scale), None
        self.weight[rows].copy_(weight)
        if self.weight_scale is not None:
            assert scale is not None, "an FP8 layer is filled with FP8"
            self.weight_scale[rows] = scale

    def finalize(self) -> None:
        """Give the loaded weight the form that its device multiplies fastest."""
        self.packed = pack(self.weight)
        if self.packed is not None:
            self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [num_tokens, in] -> [num_tokens, out]"""
        if self.packed is not None:
            return packed_linear(x, self.packed, self.bias)
        if self.weight_scale is not None and self.one is not None:
            return fp8_linear(x, self.weight, self.weight_scale, self.input_scale, self.one, self.bias)
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [num_tokens, in], weight [out, in] -> [num_tokens, out]"""
    if x.is_cuda and x.shape[0] == 1:
        from engine.kernels.gemv import gemv

        return gemv(x, weight, bias)
    if x.is_cuda and x.dtype is not torch.float32 and x.shape[0] in SKINNY_ROWS:
        from engine.kernels.skinny import skinny_linear

        return skinny_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def pack(weight: Tensor) -> Tensor | None:
    """`weight` in oneDNN's own order of memory, or None where that is no gain."""
    if weight.device.type != "cpu" or weight.dtype in (torch.float16, FP8) or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)
    return packed


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")
    return product
