"""The seam between models and attention kernels.

A backend owns the view of the paged KV `[block, layer, k|v, kv_head, slot, head_dim]`. Once per step the
executor asks it for a `StepAttention`, where index tensors are made; every layer then rotates and stores its
keys and values and attends, in layer order. `engine.attention.paged` runs anywhere, `engine.attention.flashinfer`
on CUDA.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from engine.layers.rotary import Rotation


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

    def rotate_and_store(self, layer: AttentionLayer, heads: Tensor, rotation: Rotation) -> None:
        """Rotate queries and keys of `heads` [num_tokens, q heads then k heads then v heads, head_dim] in place, and
        store keys and values."""
        ...

    def attend(self, layer: AttentionLayer, queries: Tensor) -> Tensor:
        """queries [num_tokens, num_heads, head_dim] -> [num_tokens, num_heads * head_dim]; after `rotate_and_store`."""
        ...


class AttentionBackend(Protocol):
    def begin_step(self, spans: Sequence[Span], on_layer_written: Callable[[int], None] | None) -> StepAttention:
        """`on_layer_written` is called with each layer's index once its keys and values are in memory."""
        ...
