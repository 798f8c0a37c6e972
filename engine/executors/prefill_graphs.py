"""Small steps that prefill as CUDA graphs, one for each layer, with attention queued in between.

Owned by the torch executor on CUDA. Queued operation by operation, a step of a few hundred tokens waits for the host.
So what lies between two attentions is captured, for each of a ladder of numbers of tokens: a step replays the next
larger one's. Attention is queued for the spans as they are: any prompts and decoding sequences can share a step, and a
layer is announced once it is written. What follows the last attention is queued too, for only some rows are needed.

All graphs share their input and output tensors, and a memory pool with those of decode steps.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.attention.base import AttentionLayer, Span
from engine.executors.cuda_graphs import GraphPool
from engine.layers.rotary import Rotation
from engine.models.decoder import CausalLM
from engine.tensors import to_device

SIZES: tuple[int, ...] = (16, 32, *range(64, 769, 64))  # above, the device takes longer than the host


class SplitStep(Protocol):
    """Attention of one step whose keys and values others store, at `slots` [num_tokens] of the pool."""

    slots: Tensor

    def attend_into(self, layer: AttentionLayer, heads: Tensor, out: Tensor) -> None:
        """heads [num_tokens, q heads then k heads then v heads, head_dim], rotated -> out, as the queries."""
        ...


@runtime_checkable
class SplitAttention(Protocol):
    """An attention backend whose storing of keys and values can be captured apart from the rest."""

    def begin_step(self, spans: Sequence[Span], on_layer_written: Callable[[int], None] | None) -> SplitStep: ...

    def rotate_and_store(
        self, layer: AttentionLayer, heads: Tensor, rotation: Rotation, slots: Tensor, out: Tensor
    ) -> None:
        """`heads`, rotated, -> `out`. Stores nothing where a slot is negative."""
        ...


class CapturedAttention:
    """The StepAttention of what is captured: it leaves `heads` for the attention queued between two graphs, whose
    output the next one finds in `attended` [num_tokens, num_heads, head_dim]."""

    def __init__(self, attention: SplitAttention, slots: Tensor, heads: Tensor, attended: Tensor) -> None:
        self._attention, self._slots, self._heads, self._attended = attention, slots, heads, attended

    def rotate_and_store(self, layer: AttentionLayer, heads: Tensor, rotation: Rotation) -> None:
        self._attention.rotate_and_store(layer, heads, rotation, self._slots, self._heads)

    def attend(self, layer: AttentionLayer, queries: Tensor) -> Tensor:  # noqa: ARG002
        return self._attended.flatten(1)


class PrefillGraphs:
    """For steps of up to `max_tokens` tokens, but no more than the largest of SIZES."""

    def __init__(self, model: CausalLM, attention: SplitAttention, max_tokens: int) -> None:
        config, weight = model.config, model.model.embed_tokens.weight
        largest, num_heads, num_kv_heads = min(max_tokens, SIZES[-1]), config.num_heads, config.num_kv_heads
        self.sizes = [*(size for size in SIZES if size < largest), largest]
        self._model, self._attention, self._layers = model, attention, model.attention_layers()
        self._token_ids = torch.zeros(largest, dtype=torch.int64, device=weight.device)
        self._positions = torch.zeros(largest, dtype=torch.float32, device=weight.device)
        self._slots = torch.full((largest,), -1, dtype=torch.int64, device=weight.device)
        self._heads = weight.new_zeros(largest, num_heads + 2 * num_kv_heads, config.head_dim)
        self._attended = weight.new_zeros(largest, num_heads, config.head_dim)
        self._hidden = weight.new_zeros(largest, config.hidden_size)
        self._graphs: dict[int, list[torch.cuda.CUDAGraph]] = {}  # for each size, one of every layer

    @torch.inference_mode()
    def capture(self, pool: GraphPool) -> None:
        """Record all sizes, the largest first, so that the others fit into its memory. Once, before the first `run`."""
        for size in reversed(self.sizes):
            self._forward(size, nullcontext)  # compiles kernels
            torch.cuda.current_stream().synchronize()
            self._graphs[size] = []
            self._forward(size, partial(recording, self._graphs[size], pool))

    def fit(self, num_tokens: int) -> bool:
        return num_tokens <= self.sizes[-1]

    def run(
        self,
        token_ids: Tensor,
        positions: Tensor,
        spans: Sequence[Span],
        rows: NDArray[np.int64] | None,
        on_layer_written: Callable[[int], None] | None,
    ) -> Tensor:
        """As `StepForward.run`; positions [num_tokens] float32."""
        num_tokens = token_ids.shape[0]
        size = self.sizes[bisect_left(self.sizes, num_tokens)]
        step = self._attention.begin_step(spans, None)
        self._token_ids[:num_tokens].copy_(token_ids)
        self._positions[:num_tokens].copy_(positions)
        self._slots[:num_tokens].copy_(step.slots)
        self._slots[num_tokens:size].fill_(-1)
        wanted = None if rows is None else to_device(rows, token_ids.device)
        heads, attended = self._heads[:num_tokens], self._attended[:num_tokens]
        for graph, layer in zip(self._graphs[size], self._layers, strict=True):
            graph.replay()
            if on_layer_written is not None:
                on_layer_written(layer.index)
            step.attend_into(layer, heads, attended)
        return self._model.finish(self._hidden[:num_tokens], attended.flatten(1), wanted)

    def _forward(self, size: int, piece: Callable[[], AbstractContextManager[None]]) -> None:
        """All layers up to the last one's attention, each in a `piece`."""
        model, hidden = self._model, self._hidden[:size]
        attention = CapturedAttention(self._attention, self._slots[:size], self._heads[:size], self._attended[:size])
        with piece():
            rotation = model.rotary.rotation(self._positions[:size])
            hidden.copy_(model.embed(self._token_ids[:size]))
            attended = model.attend(0, hidden, None, rotation, attention)
        for index in range(1, len(self._layers)):
            with piece():
                attended = model.attend(index, hidden, attended, rotation, attention)


def recording(graphs: list[torch.cuda.CUDAGraph], pool: GraphPool) -> AbstractContextManager[None]:
    """Capture what is queued inside as one more of `graphs`."""
    graphs.append(torch.cuda.CUDAGraph())
    return torch.cuda.graph(graphs[-1], pool=pool, capture_error_mode="thread_local")
