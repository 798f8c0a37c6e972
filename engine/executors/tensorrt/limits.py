"""The sizes that the calls of a worker's segments take."""

import math
from collections.abc import Callable

from engine.executors.tensorrt.calls import CallLimits, exactly, ladder
from engine.executors.tensorrt.staging import ALIGNMENT
from engine.kv.layout import ITEM_SIZES, KvLayout
from engine.model_config import ModelConfig

# Bounds the attention mask, tokens x (past and tokens). Products are at their best before: steps of 1024, 2048 and 4096
# tokens of Llama-3-8B take 23.2 to 23.9 us a token on an H200 (benchmarks/gpu/step_times.py).
MAX_CALL_TOKENS = 2048
# What a call costs beside its products, in tokens whose products take as long. On an H200 reading Llama-3-8B's weights
# takes as long as the products of 150 tokens; see benchmarks/packed_prefill.py for a CPU.
TOKENS_WORTH_A_CALL = 128
SMALLEST_STEP = 8  # of the ladder


def call_limits(
    layout: KvLayout, device_type: str, max_batch_tokens: int, max_model_len: int, max_tokens: int | None = None
) -> CallLimits:
    """A sequence's whole past, and `max_tokens` (None: a default). On CUDA padded to a ladder of sizes."""
    padded: Callable[[int], int] = exactly
    if device_type == "cuda":
        row_bytes = 2 * layout.num_kv_heads * layout.head_dim * ITEM_SIZES[layout.dtype]  # of a token in a layer
        padded = ladder(max(SMALLEST_STEP, ALIGNMENT // math.gcd(ALIGNMENT, row_bytes)))
    return CallLimits(
        max_tokens=padded(min(max_batch_tokens, max_tokens or MAX_CALL_TOKENS)),
        max_past=padded(max_model_len),
        padded=padded,
    )


def pairs_worth_a_call(config: ModelConfig) -> int:
    """Pairs of a query and a key whose attention takes as many operations as a call more is worth."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    weights = config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)  # of a layer
    return TOKENS_WORTH_A_CALL * 2 * weights // (4 * queries)
