"""Llama 2 and 3, and the families whose layers differ from it only in what the config says.

Mistral slides a window, Qwen2 has biases on q, k and v, Phi-3 stores its projections fused.
"""

import torch
from torch import Tensor

from engine.attention.base import StepAttention
from engine.layers.attention import SelfAttention
from engine.layers.mlp import GatedMLP
from engine.layers.norm import RMSNorm
from engine.layers.rotary import Rotation
from engine.model_config import ModelConfig
from engine.models.decoder import CausalLM, DecoderLayer


class LlamaLayer(DecoderLayer):
    """Pre-norm attention and feed-forward, each added to the residual stream.

    What a block has to add is handed on as `delta`, so that adding it and the next norm are one operation.
    """

    def __init__(self, config: ModelConfig, index: int, *, normalizes_heads: bool = False) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = SelfAttention(config, index, normalizes_heads=normalizes_heads)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = GatedMLP(config)

    def attend(self, hidden: Tensor, delta: Tensor | None, rotation: Rotation, attention: StepAttention) -> Tensor:
        return self.self_attn.attend(self.input_layernorm.add(hidden, delta), rotation, attention)

    def feed_forward(self, hidden: Tensor, attended: Tensor) -> Tensor:
        attended = self.self_attn.o_proj(attended)
        out: Tensor = self.mlp(self.post_attention_layernorm.add(hidden, attended))
        return out


def make_llama(config: ModelConfig, dtype: torch.dtype) -> CausalLM:
    return CausalLM(config, dtype, LlamaLayer)
