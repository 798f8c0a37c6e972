"""Products of one row with a weight matrix at the speed at which memory delivers the weight.

A program takes a few rows of the weight. It asks for its first tile before it waits for the kernel ahead of
it, so that weights already travel while that kernel ends.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels.activation import activate
from engine.kernels.launch import overlaps

ONE_WAVE = 16 * 2 * 132  # rows of a weight


def gemv(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """x [1, in], weight [out, in], bias [out] -> [1, out]

    An FP8 weight has a float32 `scale` [out]. x keeps its type: the product is only as fast as the weight is read.
    """
    out = torch.empty((1, weight.shape[0]), dtype=x.dtype, device=x.device)
    _launch(x, weight, bias, scale, out, "none")
    return out


def gemv_gated(x: Tensor, weight: Tensor, kind: str, scale: Tensor | None = None) -> Tensor:
    """x [1, in], weight [gate rows then up rows, in] -> activation(gate) * up [1, size]; kind as in `gated`."""
    assert kind in ("silu", "gelu_tanh"), kind
    assert weight.shape[0] % 2 == 0, weight.shape
    out = torch.empty((1, weight.shape[0] // 2), dtype=x.dtype, device=x.device)
    _launch(x, weight, None, scale, out, kind)
    return out


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, out: Tensor, kind: str) -> None:
    assert x.shape == (1, weight.shape[1]), (x.shape, weight.shape)
    assert x.stride(1) == weight.stride(1) == out.stride(1) == 1, (x.stride(), weight.stride(), out.stride())
    num_out, num_in = out.shape[1], weight.shape[1]
    if num_out == 0:
        return
    rows, columns, num_warps = tile(num_out, num_in, weight.element_size())
    pdl = overlaps(x)
    _gemv[(triton.cdiv(num_out, rows),)](
        x,
        weight,
        bias,
        scale,
        out,
        num_out,
        num_in,
        weight.stride(0),
        KIND=kind,
        ROWS=rows,
        COLUMNS=columns,
        EVEN=num_out % rows == 0 and num_in % columns == 0,
        PDL=pdl,
        num_warps=num_warps,
        launch_pdl=pdl,
    )


def tile(num_out: int, num_in: int, item_size: int) -> tuple[int, int, int]:
    """Rows and columns of the weight that a program multiplies at once, and its warps (measured on an H200).

    A short output goes in one wave of programs, two on each multiprocessor, so that the next kernel's find room
    at once; a long one in many small programs.
    """
    if item_size == 1:
        rows, columns, num_warps = 2, 2048, 4
    else:
        rows, columns, num_warps = (16, 512, 8) if num_out <= ONE_WAVE else (1, 2048, 2)
    return rows, min(columns, triton.next_power_of_2(num_in)), num_warps


@triton.jit
def _gemv(
    x,
    weight,
    bias,
    scale,
    out,
    num_out,
    num_in,
    stride,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    GATED: tl.constexpr = (KIND == "silu") or (KIND == "gelu_tanh")
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    places = weight + row.to(tl.int64)[:, None] * stride + column[None, :]
    other_places = places
    if GATED:
        other_places = weight + (row + num_out).to(tl.int64)[:, None] * stride + column[None, :]
    row_mask = (row < num_out)[:, None]
    mask = row_mask if EVEN else row_mask & (column < num_in)[None, :]
    ahead = _weights(places, mask, EVEN)
    other_ahead = _weights(other_places, mask, EVEN) if GATED else ahead
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    other_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, num_in, COLUMNS):
        tile, other = ahead, other_ahead
        following = start + COLUMNS
        # Asked for before the tile at hand is used. Past the end nothing is read.
        remains = row_mask & (following + column < num_in)[None, :]
        ahead = _weights(places + following, remains, False)
        if GATED:
            other_ahead = _weights(other_places + following, remains, False)
        if EVEN:
            values = tl.load(x + start + column).to(tl.float32)[None, :]
        else:
            values = tl.load(x + start + column, mask=start + column < num_in, other=0.0).to(tl.float32)[None, :]
        sums += tile.to(tl.float32) * values
        if GATED:
            other_sums += other.to(tl.float32) * values
    result = tl.sum(sums, axis=1)
    other_result = tl.sum(other_sums, axis=1)
    exists = row < num_out
    if scale is not None:
        result *= tl.load(scale + row, mask=exists, other=0.0)
        if GATED:
            other_result *= tl.load(scale + num_out + row, mask=exists, other=0.0)
    if bias is not None:
        result += tl.load(bias + row, mask=exists, other=0.0).to(tl.float32)
    if GATED:
        result = activate(result, KIND) * other_result
    tl.store(out + row, result, mask=exists)


@triton.jit
def _weights(places, mask, EVEN: tl.constexpr):
    """A tile of the weight, which nothing reads again in this step."""
    if EVEN:
        tile = tl.load(places, eviction_policy="evict_first")
    else:
        tile = tl.load(places, mask=mask, other=0.0, eviction_policy="evict_first")
    return tile
