"""RMS normalization (arXiv:1910.07467), alone and together with the residual sum before it."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels.launch import overlaps

TILE = 1024  # elements a program takes when a row has fewer


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., size], in any layout of rows that are contiguous themselves -> a contiguous tensor of x's shape and type.

    weight float32 [size].
    """
    rows = x if x.dim() == 3 else x.reshape(-1, 1, x.shape[-1])
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(rows, rows, out, weight, eps, adds=False)
    return out


def add_rms_norm(hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`hidden += delta` in place; returns the norm of the sum as hidden's type rounds it. Both [num_tokens, size]."""
    out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    _launch(hidden.unsqueeze(1), delta.unsqueeze(1), out, weight, eps, adds=True)
    return out


def _launch(x: Tensor, delta: Tensor, out: Tensor, weight: Tensor, eps: float, *, adds: bool) -> None:
    """x, delta [outer, inner, size]"""
    outer, inner, size = x.shape
    assert x.stride(2) == delta.stride(2) == 1, (x.stride(), delta.stride())
    if x.numel() == 0:
        return
    columns = triton.next_power_of_2(size)
    rows = max(1, TILE // columns)
    pdl = overlaps(x)
    _rms_norm[(triton.cdiv(outer * inner, rows),)](
        x,
        delta,
        out,
        weight,
        eps,
        outer * inner,
        inner,
        size,
        x.stride(0),
        x.stride(1),
        delta.stride(0),
        ADDS=adds,
        ROWS=rows,
        COLUMNS=columns,
        PDL=pdl,
        num_warps=min(16, max(1, rows * columns // 256)),
        launch_pdl=pdl,
    )


@triton.jit
def _rms_norm(
    x,
    delta,
    out,
    weight,
    eps,
    num_rows,
    inner,
    size,
    outer_stride,
    inner_stride,
    delta_stride,
    ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < num_rows) & (column < size)
    scale = tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    places = x + (row // inner) * outer_stride + (row % inner) * inner_stride + column
    values = tl.load(places, mask=mask, other=0.0)
    if ADDS:
        added = tl.load(delta + row * delta_stride + column, mask=mask, other=0.0)
        values = (values.to(tl.float32) + added.to(tl.float32)).to(values.dtype)
        tl.store(places, values, mask=mask)
    wide = values.to(tl.float32)
    mean = tl.sum(wide * wide, axis=1, keep_dims=True) / size
    normalized = wide * tl.rsqrt(mean + eps) * scale
    tl.store(out + row * size + column, normalized.to(values.dtype), mask=mask)
