"""The seam between models and attention kernels.

A backend owns the view of the paged KV `[block, layer, k|v, kv_head, slot, head_dim]`. Once per step the
executor asks it for a `StepAttention`, where index tensors are made; every layer then writes its keys
and values and attends, in layer order. The CPU backend is `engine.attention.paged`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Span:
    """Positions `start .. start + num_tokens - 1` of one sequence, which this step computes.

    The i-th of `block_ids` holds positions `i * block_size ..`; those before `start` are written already.
    """

    start: int
    num_tokens: int
    block_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """What attention needs to know of one layer. `window`: positions seen, one's own included; None: all."""

    index: int
    scale: float
    window: int | None
    softcap: float | None


class StepAttention(Protocol):
    """One step's tokens are those of its spans, one span after the other."""

    def write_kv(self, layer: AttentionLayer, key_values: Tensor) -> None:
        """Store `key_values` [num_tokens, k heads then v heads, head_dim], rotated."""
        ...

    def attend(self, layer: AttentionLayer, queries: Tensor) -> Tensor:
        """queries [num_tokens, num_heads, head_dim] -> [num_tokens, num_heads * head_dim]; after `write_kv`."""
        ...


class AttentionBackend(Protocol):
    def begin_step(self, spans: Sequence[Span], on_layer_written: Callable[[int], None] | None) -> StepAttention:
        """`on_layer_written` is called with each layer's index once its keys and values are in memory."""
        ...
