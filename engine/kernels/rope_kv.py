"""Rotary position embedding and the write of keys and values into the paged KV, in one pass over the heads."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels.launch import overlaps

HEADS = 8  # a program takes


def rotate_and_store(
    heads: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_layer: Tensor,
    slots: Tensor,
    num_heads: int,
    num_kv_heads: int,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: Tensor | None = None,
) -> None:
    """Rotate the queries and keys of `heads` in place; store keys and values at `slots` of `kv_layer`.

    With `out`, of the shape of `heads`, rotated heads and values are written there, and `heads` stays as it was.

    heads [num_tokens, q heads then k heads then v heads, head_dim]; cos and sin as `Rotation` has them;
    kv_layer [num_blocks, 2, num_kv_heads, block_size, head_dim], any strides; slots [num_tokens] =
    block_id * block_size + slot, negative where nothing is to be stored. A float8_e4m3fn `kv_layer` holds
    keys / k_scale and values / v_scale, clamped to its range.
    """
    num_tokens, total, head_dim = heads.shape
    half = cos.shape[-1]
    assert total == num_heads + 2 * num_kv_heads, (heads.shape, num_heads, num_kv_heads)
    assert 2 * half <= head_dim, (half, head_dim)
    assert cos.shape == (num_tokens, 1, 1, half), cos.shape
    assert sin.shape == (num_tokens, 1, 2, half), sin.shape
    assert heads.stride(2) == cos.stride(3) == sin.stride(3) == kv_layer.stride(4) == slots.stride(0) == 1
    if num_tokens == 0:
        return
    copies = out is not None
    out = heads if out is None else out
    assert out.shape == heads.shape, (out.shape, heads.shape)
    assert out.stride(2) == 1, out.stride()
    pdl = overlaps(heads)
    _rotate_and_store[(num_tokens, triton.cdiv(total, HEADS))](
        heads,
        out,
        cos,
        sin,
        kv_layer,
        slots,
        num_heads,
        num_kv_heads,
        half,
        head_dim - 2 * half,
        kv_layer.shape[3],
        k_scale,
        v_scale,
        *heads.stride()[:2],
        *out.stride()[:2],
        cos.stride(0),
        sin.stride(0),
        sin.stride(2),
        *kv_layer.stride()[:4],
        COPIES=copies,
        QUANTIZES=kv_layer.dtype == torch.float8_e4m3fn,
        HEADS=HEADS,
        HALF=triton.next_power_of_2(half),
        REST=triton.next_power_of_2(head_dim - 2 * half) if head_dim > 2 * half else 0,
        PDL=pdl,
        num_warps=2,
        launch_pdl=pdl,
    )


@triton.jit
def _rotate_and_store(
    heads,
    out,
    cos,
    sin,
    kv_layer,
    slots,
    num_heads,
    num_kv_heads,
    half,
    rest,
    block_size,
    k_scale,
    v_scale,
    token_stride,
    head_stride,
    out_token_stride,
    out_head_stride,
    cos_stride,
    sin_stride,
    sign_stride,
    block_stride,
    kv_stride,
    kv_head_stride,
    slot_stride,
    COPIES: tl.constexpr,
    QUANTIZES: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    dim = tl.arange(0, HALF)[None, :]
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    c = tl.load(cos + token * cos_stride + dim, mask=dim < half, other=0.0).to(tl.float32)
    s = tl.load(sin + token * sin_stride + sign_stride + dim, mask=dim < half, other=0.0).to(tl.float32)
    slot = tl.load(slots + token).to(tl.int64)

    rotates = head < num_heads + num_kv_heads
    exists = (head < num_heads + 2 * num_kv_heads) & (dim < half)
    source = heads + token * token_stride + head * head_stride
    x1 = tl.load(source + dim, mask=exists, other=0.0)
    x2 = tl.load(source + half + dim, mask=exists, other=0.0)
    wide1, wide2 = x1.to(tl.float32), x2.to(tl.float32)
    y1 = tl.where(rotates, (wide1 * c - wide2 * s).to(x1.dtype), x1)
    y2 = tl.where(rotates, (wide2 * c + wide1 * s).to(x2.dtype), x2)
    result = out + token * out_token_stride + head * out_head_stride
    changes = exists if COPIES else exists & rotates
    tl.store(result + dim, y1, mask=changes)
    tl.store(result + half + dim, y2, mask=changes)

    kv_head = head - num_heads  # keys, then values
    kind = (kv_head >= num_kv_heads).to(tl.int64)
    place = (slot // block_size) * block_stride + (slot % block_size) * slot_stride
    target = kv_layer + place + kind * kv_stride + (kv_head - kind * num_kv_heads) * kv_head_stride
    scale = tl.where(kind == 0, k_scale, v_scale)
    stores = (kv_head >= 0) & (slot >= 0)
    tl.store(target + dim, _stored(y1, scale, QUANTIZES), mask=exists & stores)
    tl.store(target + half + dim, _stored(y2, scale, QUANTIZES), mask=exists & stores)
    if REST > 0:
        dim = tl.arange(0, REST)[None, :]
        exists = (head < num_heads + 2 * num_kv_heads) & (dim < rest)
        moves = exists if COPIES else exists & stores
        x = tl.load(source + 2 * half + dim, mask=moves, other=0.0)
        if COPIES:
            tl.store(result + 2 * half + dim, x, mask=exists)
        tl.store(target + 2 * half + dim, _stored(x, scale, QUANTIZES), mask=exists & stores)


@triton.jit
def _stored(x, scale, QUANTIZES: tl.constexpr):
    if QUANTIZES:
        x = tl.minimum(tl.maximum(x.to(tl.float32) / scale, -448.0), 448.0).to(tl.float8e4nv)
    return x
