"""Products of a few rows (2 to 64) with a weight matrix, bound by the reading of the weight.

The weight's rows are the long side of the tensor cores' tile and the few rows of x its short side. Where the
output is too short to keep every multiprocessor reading, two programs share a row and a second kernel adds up.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels.launch import overlaps

MAX_ROWS = 64
LONG = 16384  # rows of a weight that are tiles enough for a whole GPU
SUM_BLOCK = 1024


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [rows, in] of at most 64 rows, weight [out, in], bias [out] -> [rows, out]"""
    rows, num_in = x.shape
    num_out = weight.shape[0]
    assert rows <= MAX_ROWS, rows
    assert weight.shape[1] == num_in, (x.shape, weight.shape)
    assert x.stride(1) == weight.stride(1) == 1, (x.stride(), weight.stride())
    out = torch.empty((rows, num_out), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    block_out, block_in, stages = tile(num_out, x.dtype)
    parts = 2 if num_out < LONG and num_in % (2 * block_in) == 0 else 1
    target = out if parts == 1 else torch.empty((parts, rows, num_out), dtype=torch.float32, device=x.device)
    pdl = overlaps(x)
    _product[(triton.cdiv(num_out, block_out), parts)](
        x,
        weight,
        bias if parts == 1 else None,
        target,
        rows,
        num_out,
        num_in,
        num_in // parts,
        x.stride(0),
        weight.stride(0),
        ROWS=max(16, triton.next_power_of_2(rows)),
        OUT=block_out,
        IN=block_in,
        EVEN=num_out % block_out == 0 and num_in % block_in == 0,
        STAGES=stages,
        PDL=pdl,
        num_warps=4,
        launch_pdl=pdl,
    )
    if parts > 1:
        grid = (rows, triton.cdiv(num_out, SUM_BLOCK))
        _sum[grid](target, bias, out, rows, num_out, PARTS=parts, BLOCK=SUM_BLOCK, PDL=pdl, launch_pdl=pdl)
    return out


def tile(num_out: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Rows and columns of the weight that a program multiplies at once, and how many tiles it has under way."""
    if dtype == torch.float32:
        return 32, 32, 2  # exact products leave the tensor cores out
    # With 5 tiles of 64 rows two programs fit on a multiprocessor, and those that start early crowd onto the first
    # ones to be free: 8 % slower for a whole model at 2 to 16 rows.
    return (128, 128, 4) if num_out >= LONG else (64, 128, 6)


@triton.jit
def _product(
    x,
    weight,
    bias,
    out,
    num_rows,
    num_out,
    num_in,
    share,
    x_stride,
    stride,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    place = tl.program_id(0) * OUT + tl.arange(0, OUT)
    begin = tl.program_id(1) * share
    column = tl.arange(0, IN)
    row = tl.arange(0, ROWS)
    weights = weight + place.to(tl.int64)[:, None] * stride + (begin + column)[None, :]
    values = x + row[None, :] * x_stride + (begin + column)[:, None]
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    sums = tl.zeros((OUT, ROWS), tl.float32)
    for start in tl.range(0, share, IN, num_stages=STAGES):
        if EVEN:
            w = tl.load(weights + start, eviction_policy="evict_first")
            v = tl.load(values + start, mask=(row < num_rows)[None, :], other=0.0)
        else:
            inside = begin + start + column < num_in
            w = tl.load(weights + start, mask=(place < num_out)[:, None] & inside[None, :], other=0.0)
            v = tl.load(values + start, mask=(row < num_rows)[None, :] & inside[:, None], other=0.0)
        sums = tl.dot(w, v, sums, input_precision="ieee")
    if bias is not None:
        sums += tl.load(bias + place, mask=place < num_out, other=0.0).to(tl.float32)[:, None]
    part = tl.program_id(1).to(tl.int64) * num_rows * num_out
    exists = (place < num_out)[:, None] & (row < num_rows)[None, :]
    tl.store(out + part + row[None, :] * num_out + place[:, None], sums, mask=exists)


@triton.jit
def _sum(parts, bias, out, num_rows, num_out, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0)
    exists = place < num_out
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + (part * num_rows + row) * num_out + place, mask=exists, other=0.0)
    if bias is not None:
        total += tl.load(bias + place, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + row * num_out + place, total, mask=exists)
