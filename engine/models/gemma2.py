"""Gemma 2 (arXiv:2408.00118): norms before and after each block, scaled embeddings, capped logits."""

import torch
from torch import Tensor

from engine.attention.base import StepAttention
from engine.layers.attention import SelfAttention
from engine.layers.mlp import GatedMLP
from engine.layers.norm import RMSNorm
from engine.layers.rotary import Rotation
from engine.model_config import ModelConfig
from engine.models.decoder import CausalLM, DecoderLayer


class Gemma2Layer(DecoderLayer):
    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()

        def make_norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.norm_eps, unit_offset=True)

        self.input_layernorm = make_norm()
        self.self_attn = SelfAttention(config, index)
        self.post_attention_layernorm = make_norm()
        self.pre_feedforward_layernorm = make_norm()
        self.mlp = GatedMLP(config)
        self.post_feedforward_layernorm = make_norm()

    def attend(self, hidden: Tensor, delta: Tensor | None, rotation: Rotation, attention: StepAttention) -> Tensor:
        return self.self_attn.attend(self.input_layernorm.add(hidden, delta), rotation, attention)

    def feed_forward(self, hidden: Tensor, attended: Tensor) -> Tensor:
        attended = self.post_attention_layernorm(self.self_attn.o_proj(attended))
        fed = self.mlp(self.pre_feedforward_layernorm.add(hidden, attended))
        out: Tensor = self.post_feedforward_layernorm(fed)
        return out


def make_gemma2(config: ModelConfig, dtype: torch.dtype) -> CausalLM:
    return CausalLM(config, dtype, Gemma2Layer, embedding_scale=config.hidden_size**0.5, unit_offset_norm=True)
