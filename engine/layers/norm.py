"""Root-mean-square normalization (arXiv:1910.07467), in float32 whatever the model's type."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Over the last dimension. With `unit_offset` the checkpoint stores the weight's distance from one."""

    def __init__(self, size: int, eps: float, *, unit_offset: bool = False) -> None:
        super().__init__()
        self.shape = (size,)
        self.eps = eps
        self.unit_offset = unit_offset
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.float32), requires_grad=False)

    def finalize(self) -> None:
        if self.unit_offset:
            self.weight.add_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            from engine.kernels.norm import rms_norm

            return rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x.float(), self.shape, self.weight, self.eps).to(x.dtype)

    def add(self, hidden: Tensor, delta: Tensor | None) -> Tensor:
        """`hidden += delta` in place; returns the norm of the sum."""
        if delta is not None:
            if hidden.is_cuda:
                from engine.kernels.norm import add_rms_norm

                return add_rms_norm(hidden, delta, self.weight, self.eps)
            hidden.add_(delta)
        return self.forward(hidden)
