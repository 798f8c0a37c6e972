"""Checkpoint shapes that the model tests run over: every family, and what varies inside a family."""

from collections.abc import Mapping
from typing import Any

ROPE = {"rope_theta": 10000.0}

CASES: Mapping[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama3": {"family": "llama3"},
    "mistral": {"family": "mistral"},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3"},
    "phi3": {"family": "phi3"},
    "gemma2": {"family": "gemma2"},
    "llama multi-query": {"family": "llama", "num_key_value_heads": 1},
    "llama multi-head, head_dim 24": {"family": "llama", "num_key_value_heads": 4, "head_dim": 24},
    "llama tied, sharded": {"family": "llama", "tie_word_embeddings": True, "max_shard_size": 60_000},
    "llama with every bias": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "llama linear rope": {"family": "llama", "rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}},
    "llama dynamic rope": {"family": "llama", "rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 4.0}},
    "llama yarn": {
        "family": "llama",
        "rope_parameters": ROPE | {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128},
    },
    "mistral full attention, sharded": {"family": "mistral", "sliding_window": None, "max_shard_size": 60_000},
    "qwen2 untied, later layers slide": {
        "family": "qwen2",
        "tie_word_embeddings": False,
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
    },
    "qwen3 tied, multi-query": {"family": "qwen3", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "phi3 sliding, part of the head rotates": {
        "family": "phi3",
        "sliding_window": 10,
        "rope_parameters": ROPE | {"rope_type": "default", "partial_rotary_factor": 0.75},
    },
    "phi3 longrope": {
        "family": "phi3",
        "original_max_position_embeddings": 128,
        "rope_parameters": ROPE
        | {"rope_type": "longrope", "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [4.0] * 8},
    },
    "gemma2 untied, multi-head": {"family": "gemma2", "tie_word_embeddings": False, "num_key_value_heads": 4},
}
