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
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        activated = F.gelu(gate, approximate="tanh") if self.uses_gelu else F.silu(gate)
        down: Tensor = self.down_proj(activated.mul_(up))
        return down
