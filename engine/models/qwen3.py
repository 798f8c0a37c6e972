"""Qwen3: Llama with every query and key head normalized before rotation."""

import torch

from engine.model_config import ModelConfig
from engine.models.decoder import CausalLM
from engine.models.llama import LlamaLayer


def make_qwen3(config: ModelConfig, dtype: torch.dtype) -> CausalLM:
    return CausalLM(config, dtype, lambda config, index: LlamaLayer(config, index, normalizes_heads=True))
