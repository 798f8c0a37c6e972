"""The gated feed-forward block (arXiv:2002.05202)."""

import torch.nn.functional as F
from torch import Tensor, nn

from engine.layers.linear import Linear
from engine.model_config import ModelConfig


class GatedMLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.intermediate_size
        parts = {"gate_proj": size, "up_proj": size}
        self.gate_up_proj = Linear(config.hidden_size, parts, bias=config.mlp_bias)
        self.down_proj = Linear(size, {"down_proj": config.hidden_size}, bias=config.mlp_bias)
        self.uses_gelu = config.activation == "gelu_pytorch_tanh"

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down_proj(self._gated(x))
        return down

    def _gated(self, x: Tensor) -> Tensor:
        layer = self.gate_up_proj
        if x.is_cuda and x.shape[0] == 1 and layer.bias is None:
            from engine.kernels.gemv import gemv_gated

            return gemv_gated(x, layer.weight, "gelu_tanh" if self.uses_gelu else "silu", layer.weight_scale)
        return gated(layer(x), self.uses_gelu)


def gated(gate_up: Tensor, uses_gelu: bool) -> Tensor:
    """gate_up [num_tokens, gate then up] -> activation(gate) * up"""
    if gate_up.is_cuda:
        from engine.kernels.activation import gated as fused

        return fused(gate_up, "gelu_tanh" if uses_gelu else "silu")
    gate, up = gate_up.chunk(2, dim=-1)
    activated = F.gelu(gate, approximate="tanh") if uses_gelu else F.silu(gate)
    return activated.mul_(up)
