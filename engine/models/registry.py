"""Which maker builds the model of each architecture that `engine.model_config` accepts."""

from collections.abc import Callable, Mapping

import torch

from engine.model_config import ModelConfig
from engine.models.decoder import CausalLM
from engine.models.gemma2 import make_gemma2
from engine.models.llama import make_llama
from engine.models.qwen3 import make_qwen3

MAKERS: Mapping[str, Callable[[ModelConfig, torch.dtype], CausalLM]] = {
    "LlamaForCausalLM": make_llama,
    "MistralForCausalLM": make_llama,
    "Qwen2ForCausalLM": make_llama,
    "Qwen3ForCausalLM": make_qwen3,
    "Phi3ForCausalLM": make_llama,
    "Gemma2ForCausalLM": make_gemma2,
}
