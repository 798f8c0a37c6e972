"""The decode kernel against attention written out; on the CPU it runs in Triton's interpreter (TRITON_INTERPRET=1)."""

import os
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
pytestmark = pytest.mark.gpu

LENGTHS = (70, 1, 33, 64, 65, 16, 200)
NUM_LAYERS, LAYER = 3, 1


def attention(queries: Tensor, kv: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """queries [num_heads, head_dim], kv [2, num_kv_heads, tokens, head_dim] -> [num_heads, head_dim], in float64."""
    keys, values = kv.double()[:, :, -(window or 0) :]
    grouped = queries.double().view(keys.shape[0], -1, keys.shape[2])
    scores = grouped @ keys.transpose(1, 2) * scale
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    return (scores.softmax(-1) @ values).view(queries.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32])
@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn] if DEVICE == "cuda" else [None])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size", "window", "softcap"),
    [
        (32, 8, 128, 16, None, None),
        (4, 4, 16, 4, None, None),
        (6, 2, 64, 8, 7, None),
        (8, 1, 128, 16, 100, 2.0),
        (4, 2, 256, 32, None, 5.0),
        (34, 2, 16, 1, None, None),
        (2, 1, 16, 16, 1, None),
    ],
)
def test_every_row_attends_to_its_own_tokens(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    window: int | None,
    softcap: float | None,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None,
) -> None:
    from engine.kernels.decode_attention import decode_attention

    held = [-(-length // block_size) for length in LENGTHS]
    pool = torch.full((sum(held) + 3, NUM_LAYERS, 2, num_kv_heads, block_size, head_dim), torch.nan, device=DEVICE)
    pool = pool.to(kv_dtype or dtype)
    blocks = torch.randperm(len(pool))[: sum(held)]
    indptr = [0, *accumulate(held)]
    lasts = [length - (count - 1) * block_size for length, count in zip(LENGTHS, held, strict=True)]
    queries = torch.randn(len(LENGTHS), num_heads + 2 * num_kv_heads, head_dim, device=DEVICE, dtype=dtype)
    queries = queries[:, :num_heads]
    expected = []
    for row, (length, (start, end)) in enumerate(zip(LENGTHS, pairwise(indptr), strict=True)):
        kv = torch.randn(2, num_kv_heads, length, head_dim, device=DEVICE).to(pool.dtype)
        for i, block in enumerate(blocks[start:end].tolist()):
            part = kv[:, :, i * block_size : (i + 1) * block_size]
            pool[block, LAYER, :, :, : part.shape[2]] = part
        expected.append(2 * attention(queries[row], kv.float(), 0.3, window, softcap))
    out = torch.full((len(LENGTHS), num_heads, head_dim), torch.nan, device=DEVICE, dtype=dtype)
    index = [torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in (blocks.tolist(), indptr, lasts)]
    decode_attention(queries, pool[:, LAYER], *index, 0.3, window=window, softcap=softcap, v_scale=2.0, out=out)
    tolerance = 1e-4 if dtype is torch.float32 and kv_dtype is None else 2e-2
    torch.testing.assert_close(out.double(), torch.stack(expected), rtol=tolerance, atol=tolerance)
