"""Attention of one query token per sequence over the paged KV, each sequence read from end to end by one program.

For batches large enough to keep the GPU busy that way. There it reads KV at nearly the speed of memory, where
kernels made for prompts, whose tiles hold many query tokens, stay a third below (benchmarks/gpu/attention.py).
The softmax is taken as the KV goes by (arXiv:1805.02867).
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels.launch import overlaps

LOG2_E = 1.4426950408889634
MANY_PROGRAMS = 768


def decode_attention(
    queries: Tensor,
    kv_layer: Tensor,
    block_ids: Tensor,
    block_indptr: Tensor,
    last_block_lengths: Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    v_scale: float = 1.0,
    out: Tensor,
) -> None:
    """queries and out [rows, num_heads, head_dim]; kv_layer [num_blocks, 2, num_kv_heads, block_size, head_dim].

    Row i attends to the blocks `block_ids[block_indptr[i] : block_indptr[i + 1]]`, of the last one to the first
    `last_block_lengths[i]` tokens; with `window` to the last `window` tokens. FP8 keys and values stand for
    themselves times a scale, that of the keys being part of `scale`. head_dim is a power of two from 16 on.
    """
    rows, num_heads, head_dim = queries.shape
    num_kv_heads, block_size = kv_layer.shape[2:4]
    group = num_heads // num_kv_heads
    assert queries.stride(2) == out.stride(2) == kv_layer.stride(4) == 1
    assert queries.stride(1) == out.stride(1) == head_dim, (queries.stride(), out.stride())
    tokens, stages, num_warps = (32, 4, 1) if rows * num_kv_heads >= MANY_PROGRAMS else (64, 3, 2)
    if head_dim > 128:
        stages, num_warps = 2, 2 * num_warps
    pdl = overlaps(queries)
    _decode_attention[(rows, num_kv_heads)](
        queries,
        kv_layer,
        block_ids,
        block_indptr,
        last_block_lengths,
        out,
        scale * LOG2_E if softcap is None else scale,
        window or 0,
        softcap or 0.0,
        v_scale,
        queries.stride(0),
        out.stride(0),
        *kv_layer.stride()[:4],
        GROUP=group,
        QUERIES=max(16, triton.next_power_of_2(group)),  # what the tensor cores take at least
        DIM=head_dim,
        BLOCK=block_size,
        TOKENS=tokens,
        STAGES=stages,
        WINDOW=window is not None,
        SOFTCAP=softcap is not None,
        PDL=pdl,
        num_warps=num_warps,
        launch_pdl=pdl,
    )


@triton.jit
def _decode_attention(
    queries,
    kv_layer,
    block_ids,
    block_indptr,
    last_block_lengths,
    out,
    scale,
    window,
    softcap,
    v_scale,
    query_stride,
    out_stride,
    block_stride,
    kv_stride,
    kv_head_stride,
    slot_stride,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    dim = tl.arange(0, DIM)
    token = tl.arange(0, TOKENS)
    query = tl.arange(0, QUERIES)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    first_block = tl.load(block_indptr + row)
    num_blocks = tl.load(block_indptr + row + 1) - first_block
    length = (num_blocks - 1) * BLOCK + tl.load(last_block_lengths + row)
    begin = 0
    if WINDOW:
        begin = tl.maximum(length - window, 0)
    places = (kv_head * GROUP + query)[:, None] * DIM + dim[None, :]
    exists = (query < GROUP)[:, None]
    q = tl.load(queries + row * query_stride + places, mask=exists, other=0.0)
    keys = kv_layer + kv_head * kv_head_stride
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, DIM], tl.float32)
    for start in tl.range(begin // TOKENS * TOKENS, length, TOKENS, num_stages=STAGES):
        position = start + token
        seen = (position < length) & (position >= begin)
        block = tl.load(block_ids + first_block + position // BLOCK, mask=seen, other=0).to(tl.int64)
        slot = block * block_stride + (position % BLOCK) * slot_stride
        k = tl.load(keys + slot[None, :] + dim[:, None], mask=seen[None, :], other=0.0)
        score = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale
        if SOFTCAP:
            capped = 2 * softcap * tl.sigmoid(2 * score / softcap) - softcap  # softcap * tanh(score / softcap)
            score = capped * 1.4426950408889634
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(largest, tl.max(score, axis=1))
        weight = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(largest - higher)
        v = tl.load(keys + kv_stride + slot[:, None] + dim[None, :], mask=seen[:, None], other=0.0)
        total = total * shrink + tl.sum(weight, axis=1)
        sums = tl.dot(weight.to(q.dtype), v.to(q.dtype), sums * shrink[:, None], input_precision="ieee")
        largest = higher
    attended = sums / total[:, None] * v_scale
    tl.store(out + row * out_stride + places, attended.to(q.dtype), mask=exists)
