"""Activations of the gated feed-forward block (arXiv:2002.05202)."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from engine.kernels.launch import overlaps

BLOCK = 1024


def gated(gate_up: Tensor, kind: str) -> Tensor:
    """gate_up [num_tokens, gate then up] -> activation(gate) * up; kind is "silu" or "gelu_tanh"."""
    num_tokens, width = gate_up.shape
    assert kind in ("silu", "gelu_tanh"), kind
    assert width % 2 == 0, width
    assert gate_up.stride(1) == 1, gate_up.stride()
    size = width // 2
    out = torch.empty((num_tokens, size), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        pdl = overlaps(gate_up)
        grid = (num_tokens, triton.cdiv(size, BLOCK))
        _gated[grid](gate_up, out, size, gate_up.stride(0), KIND=kind, BLOCK=BLOCK, PDL=pdl, launch_pdl=pdl)
    return out


@triton.jit
def _gated(gate_up, out, size, stride, KIND: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(gate_up + token * stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * stride + size + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * size + column, activate(gate, KIND) * up, mask=mask)


@triton.jit
def activate(x, KIND: tl.constexpr):
    """x float32. The tanh form of GELU is x * (1 + tanh(u)) / 2 = x * sigmoid(2 u)."""
    steepness = x if KIND == "silu" else 1.5957691216057308 * (x + 0.044715 * x * x * x)  # 2 sqrt(2 / pi)
    return x * tl.sigmoid(steepness)
