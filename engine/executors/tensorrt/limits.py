"""The sizes that the calls of a worker's segments take."""

import math
from collections.abc import Callable

from engine.executors.tensorrt.calls import CallLimits, exactly, ladder
from engine.executors.tensorrt.staging import ALIGNMENT
from engine.kv.layout import ITEM_SIZES, KvLayout

MAX_CALL_TOKENS = 2048  # bounds the attention mask, tokens x (past and tokens); products are at their best long before
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
