"""The decode step as CUDA graphs, for each of a ladder of batch sizes: a step replays the next larger one.

Owned by the torch executor on CUDA. A graph covers embedding and layers; choosing tokens is queued behind it. All
graphs share one memory pool and the same input and output tensors, for steps run one after another on one stream.
Every size has two, with attention that cuts long sequences into pieces and with attention that does not.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import chain, product
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from engine.attention.base import Span, StepAttention
from engine.models.decoder import CausalLM

GraphPool = Any  # what `torch.cuda.graph_pool_handle` gives, whose type is PyTorch's own


class GraphAttention(StepAttention, Protocol):
    """Attention whose inputs stay where they are from capture to replay."""

    def prepare(self, spans: Sequence[Span]) -> None:
        """Have the next run attend for `spans` of one token each, in its first rows."""
        ...


@runtime_checkable
class CapturableAttention(Protocol):
    """An attention backend whose decode steps can be captured."""

    def decode_graph(self, num_rows: int, spare_block: int, *, cuts: bool) -> GraphAttention:
        """`spare_block` is what rows without a sequence use."""
        ...

    def cuts(self, spans: Sequence[Span], num_rows: int) -> bool:
        """Which of the two is faster for these."""
        ...


def batch_sizes(largest: int) -> list[int]:
    """1, 2, 4, 8, then in steps of an eighth or less of the size: what padding costs at most."""
    ladder = chain((1, 2, 4), range(8, 128, 8), range(128, 256, 16), range(256, 1 << 16, 32))
    sizes = []
    for size in ladder:
        if size >= largest:
            break
        sizes.append(size)
    return [*sizes, largest]


class DecodeGraphs:
    def __init__(self, model: CausalLM, attention: CapturableAttention, max_rows: int, spare_block: int) -> None:
        weight = model.model.embed_tokens.weight
        self.sizes = batch_sizes(max_rows)
        self._model = model
        self._attention = attention
        self._spare_block = spare_block
        self._token_ids = torch.zeros(max_rows, dtype=torch.int64, device=weight.device)
        self._positions = torch.zeros(max_rows, dtype=torch.float32, device=weight.device)
        self._hidden = torch.empty(max_rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, GraphAttention]] = {}

    @torch.inference_mode()
    def capture(self, pool: GraphPool) -> None:
        """Record all sizes, the largest first, so that the others fit into its memory. Once, before the first `run`."""
        for size, cuts in product(reversed(self.sizes), (True, False)):
            attention = self._attention.decode_graph(size, self._spare_block, cuts=cuts)
            self._forward(size, attention)  # compiles kernels and makes plans
            torch.cuda.current_stream().synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._forward(size, attention)
            self._graphs[size, cuts] = graph, attention

    def fit(self, spans: Sequence[Span]) -> bool:
        return len(spans) <= self.sizes[-1] and all(span.num_tokens == 1 for span in spans)

    def run(self, token_ids: Tensor, positions: Tensor, spans: Sequence[Span]) -> Tensor:
        """token_ids and positions [rows] -> hidden states before the final norm [rows, hidden_size].

        The result is overwritten by the next run.
        """
        num_rows = len(spans)
        size = self.sizes[bisect_left(self.sizes, num_rows)]
        graph, attention = self._graphs[size, self._attention.cuts(spans, size)]
        self._token_ids[:num_rows].copy_(token_ids)
        self._positions[:num_rows].copy_(positions)
        attention.prepare(spans)
        graph.replay()
        return self._hidden[:num_rows]

    def _forward(self, size: int, attention: StepAttention) -> None:
        self._hidden[:size] = self._model(self._token_ids[:size], self._positions[:size], attention)
