"""Triton kernels around FP8 (e4m3) matrix products: activations to FP8, scales and bias of a product.

Called by `engine.layers.fp8` on CUDA. Launches depend on shapes alone, so CUDA graphs can hold them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels.launch import overlaps

MAX_BLOCK = 16384  # elements of a row that one program holds at a time
SCALED_BLOCK = 1024


def quantize_rows(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [num_tokens, size] -> FP8 of the same shape and float32 scales [num_tokens, 1]: x = FP8 * scale.

    A row's scale takes its largest magnitude to the end of the range; with `scale`, one float32, every row has
    that, and what lies outside is clipped.
    """
    num_tokens, size = x.shape
    assert x.stride(1) == 1, x.stride()
    quantized = torch.empty(num_tokens, size, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(num_tokens, 1, dtype=torch.float32, device=x.device)
    if num_tokens == 0:
        return quantized, scales
    block = min(triton.next_power_of_2(size), MAX_BLOCK)
    pdl = overlaps(x)
    _quantize_rows[(num_tokens,)](
        x,
        scales if scale is None else scale,
        quantized,
        scales,
        x.stride(0),
        size,
        BLOCK=block,
        IS_STATIC=scale is not None,
        PDL=pdl,
        num_warps=min(max(block // 512, 1), 16),
        launch_pdl=pdl,
    )
    return quantized, scales


@triton.jit
def _quantize_rows(
    x,
    static_scale,
    quantized,
    scales,
    stride,
    size: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_STATIC: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    x += row * stride
    quantized += row * size
    if IS_STATIC:
        scale = tl.load(static_scale)
    else:
        largest = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, size, BLOCK):
            values = tl.load(x + start + columns, mask=start + columns < size, other=0.0)
            largest = tl.maximum(largest, tl.abs(values.to(tl.float32)))
        scale = tl.maximum(tl.max(largest, axis=0) / 448.0, 1e-12)
    tl.store(scales + row, scale)
    for start in range(0, size, BLOCK):
        inside = start + columns < size
        values = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32) / scale
        values = tl.minimum(tl.maximum(values, -448.0), 448.0)
        tl.store(quantized + start + columns, values.to(tl.float8e4nv), mask=inside)


def scale_product_(product: Tensor, scales: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    """`product` [num_tokens, out] times scales [num_tokens, 1] times weight_scale [out], plus bias [out], in place."""
    num_tokens, size = product.shape
    pdl = overlaps(product)
    _scale_product[(triton.cdiv(size, SCALED_BLOCK), num_tokens)](
        product,
        scales,
        weight_scale,
        weight_scale if bias is None else bias,
        size,
        BLOCK=SCALED_BLOCK,
        HAS_BIAS=bias is not None,
        PDL=pdl,
        num_warps=4,
        launch_pdl=pdl,
    )


@triton.jit
def _scale_product(
    product, scales, weight_scale, bias, size, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    inside = column < size
    scale = tl.load(weight_scale + column, mask=inside, other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    scale *= tl.load(scales + row)
    places = product + row * size + column
    scaled = tl.load(places, mask=inside, other=0.0).to(tl.float32) * scale
    if HAS_BIAS:
        scaled += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(places, scaled.to(product.dtype.element_ty), mask=inside)
