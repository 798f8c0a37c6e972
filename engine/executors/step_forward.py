"""The part of the torch executor's step from token ids to hidden states, which is where engines differ.

Sampling, log probabilities, marks and steps in flight are the executor's own, whatever computes the layers.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.attention.base import AttentionBackend, Span
from engine.executors.cuda_graphs import DecodeGraphs
from engine.executors.prefill_graphs import PrefillGraphs
from engine.models.decoder import CausalLM
from engine.tensors import to_device


class StepForward(Protocol):
    def run(
        self,
        token_ids: Tensor,
        spans: Sequence[Span],
        rows: NDArray[np.int64] | None,
        on_layer_written: Callable[[int], None] | None,
    ) -> Tensor:
        """token_ids [num_tokens], those of `spans` one after the other -> hidden states before the final norm of
        `rows` of them, None: of all, [rows, hidden_size]. They are overwritten by the next run.

        The KV of the spans is written into their blocks, and `on_layer_written` called with each layer's index once
        its KV is there for all of them. On CUDA all of it is queued on the current stream.
        """
        ...


class TorchForward:
    """The model and an attention backend in PyTorch. Steps that decode only replay `graphs`, where there are some, and
    small others `prefill_graphs`."""

    def __init__(self, model: CausalLM, attention: AttentionBackend) -> None:
        self.attention = attention
        self.graphs: DecodeGraphs | None = None
        self.prefill_graphs: PrefillGraphs | None = None
        self._model = model

    def run(
        self,
        token_ids: Tensor,
        spans: Sequence[Span],
        rows: NDArray[np.int64] | None,
        on_layer_written: Callable[[int], None] | None,
    ) -> Tensor:
        positions = to_device(positions_of(spans), token_ids.device)
        if self.graphs is not None and self.graphs.fit(spans):
            hidden = self.graphs.run(token_ids, positions, spans)
            if on_layer_written is not None:
                for layer in range(self._model.config.num_layers):
                    on_layer_written(layer)
            return hidden
        if self.prefill_graphs is not None and self.prefill_graphs.fit(token_ids.shape[0]):
            return self.prefill_graphs.run(token_ids, positions, spans, rows, on_layer_written)
        attention = self.attention.begin_step(spans, on_layer_written)
        wanted = None if rows is None else to_device(rows, token_ids.device)
        out: Tensor = self._model(token_ids, positions, attention, wanted)
        return out


def positions_of(spans: Sequence[Span]) -> NDArray[np.float32]:
    """[num_tokens]"""
    if all(span.num_tokens == 1 for span in spans):
        return np.array([span.start for span in spans], dtype=np.float32)
    return np.concatenate([np.arange(span.start, span.start + span.num_tokens, dtype=np.float32) for span in spans])
