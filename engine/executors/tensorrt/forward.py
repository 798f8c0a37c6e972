"""A step's hidden states by segments, ranges of decoder layers outside PyTorch, in place of its layers and attention.

Embedding, rotation angles and everything after the layers stay in PyTorch. For each range the past of all sequences is
gathered from their blocks, the segment computes into buffers, and the new keys and values are scattered into the
blocks. Ranges come one after the other, so that the KV of one is announced while the next computes; within a range
come the calls that a large step is cut into.

All of it is queued on one stream, with buffers that are made once: a step that is submitted before the one before it
has run overwrites them only behind that one. A step's calls lie in the buffers one behind the other, so equal steps
find equal addresses, and a captured CUDA graph of a segment can be replayed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.attention.base import Span
from engine.executors.tensorrt.calls import Call, CallLimits, cut, make_call
from engine.executors.tensorrt.paged_kv import PagedKv
from engine.executors.tensorrt.segment import Segment
from engine.executors.tensorrt.staging import Staging, aligned_empty
from engine.models.decoder import CausalLM
from engine.tensors import to_device

# Calls start at multiples of so many rows: their addresses are aligned whatever a row's even number of bytes.
ROW_ALIGNMENT = 128


@dataclass(frozen=True, slots=True, eq=False)
class StagedCall:
    """A call with its index arrays on the device, at rows `first_row .. first_row + T - 1` of the step's buffers."""

    first_row: int
    has_past: bool
    positions: Tensor  # int32 [T]
    sequence_ids: Tensor
    past_positions: Tensor  # int32 [P]
    past_sequence_ids: Tensor
    past_rows: Tensor
    scatter_index: Tensor

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.positions.numel())

    @property
    def num_past(self) -> int:
        return self.past_positions.numel()


class PrefillForward:
    """Implements `engine.executors.step_forward.StepForward` for steps of up to `max_batch_tokens` tokens.

    `kv` [block, layer, k|v, kv_head, slot, head_dim] belongs to the executor, in the model's own type. Of `model` only
    embedding and rotation are used. `segments` cover its layers in order; they take calls within `limits`.
    """

    def __init__(
        self, model: CausalLM, kv: Tensor, segments: Sequence[Segment], limits: CallLimits, max_batch_tokens: int
    ) -> None:
        firsts, ends = [segment.first for segment in segments], [segment.end for segment in segments]
        assert [*firsts, model.config.num_layers] == [0, *ends], (firsts, ends)
        self._model, self._segments, self._limits = model, segments, limits
        self._dtype, self._device = kv.dtype, kv.device
        self._kv = PagedKv(kv, max(segment.end - segment.first for segment in segments))
        self._head_shape = (2, kv.shape[3], -1, kv.shape[5])  # of a layer's keys and values: [k|v, kv_head, token, dim]
        self._staging = Staging(kv.device)
        rows = max(segment.end - segment.first for segment in segments) * self._kv.rows_per_layer
        self._past = self._kv_rows(rows * limits.padded(limits.max_past))
        self._past_index = torch.empty(len(self._past), dtype=torch.int32, device=kv.device)
        self._index_of: StagedCall | None = None  # what `_past_index` is for
        self._no_past = self._kv_rows(rows * limits.padded(1)).zero_()
        self._new = self._kv_rows(rows * limits.padded(limits.max_tokens))
        self._make_rows(max_batch_tokens + ROW_ALIGNMENT)

    def run(
        self,
        token_ids: Tensor,
        spans: Sequence[Span],
        rows: NDArray[np.int64] | None,
        on_layer_written: Callable[[int], None] | None,
    ) -> Tensor:
        calls, token_rows = self._stage(token_ids, spans)
        hidden, out = self._hidden, self._out
        for segment in self._segments:
            for call in calls:
                self._run_call(segment, call, hidden, out)
            hidden, out = out, hidden
            if on_layer_written is not None:
                for layer in range(segment.first, segment.end):
                    on_layer_written(layer)
        self._index_of = None
        return hidden[to_device(token_rows if rows is None else token_rows[rows], hidden.device)]

    def _stage(self, token_ids: Tensor, spans: Sequence[Span]) -> tuple[list[StagedCall], NDArray[np.int64]]:
        """The step's calls, their rows of the buffers filled; and the row of each of its tokens."""
        limits = self._limits
        calls = [make_call(parts, self._kv.block_size, self._kv.num_blocks, limits) for parts in cut(spans, limits)]
        sizes = np.array([call.positions.size for call in calls])
        first_rows = np.concatenate(([0], np.cumsum(-(-sizes // ROW_ALIGNMENT) * ROW_ALIGNMENT)[:-1]))
        token_rows = np.concatenate(
            [first + np.arange(call.num_tokens) for first, call in zip(first_rows, calls, strict=True)]
        )
        num_rows = int(first_rows[-1] + sizes[-1])
        if num_rows > len(self._hidden):  # many calls of few tokens each, whose past is long
            self._make_rows(num_rows)
        arrays = [array for call in calls for array in self._arrays(call)]
        staged = iter(self._staging.put(arrays))
        if num_rows > token_rows.size:
            padded = token_ids.new_zeros(num_rows)
            padded[to_device(token_rows, padded.device)] = token_ids
            token_ids = padded
        self._hidden[:num_rows].copy_(self._model.embed(token_ids))
        made = []
        for call, first_row in zip(calls, first_rows.tolist(), strict=True):
            made.append(
                StagedCall(
                    first_row=first_row,
                    has_past=call.has_past,
                    positions=next(staged),
                    sequence_ids=next(staged),
                    past_positions=next(staged),
                    past_sequence_ids=next(staged),
                    past_rows=next(staged),
                    scatter_index=self._kv.scatter_index(next(staged)),
                )
            )
            self._rotate(made[-1])
        return made, token_rows

    def _arrays(self, call: Call) -> tuple[NDArray[np.int32], ...]:
        past_rows, rows = self._kv.first_rows(call.past_slots), self._kv.first_rows(call.slots)
        return call.positions, call.sequence_ids, call.past_positions, call.past_sequence_ids, past_rows, rows

    def _rotate(self, call: StagedCall) -> None:
        rotation = self._model.rotary.rotation(call.positions.float())
        self._cos[call.rows].copy_(rotation.cos[:, 0, 0])
        self._sin[call.rows].copy_(rotation.sin[:, 0, 1])  # the other one is its negative

    def _run_call(self, segment: Segment, call: StagedCall, hidden: Tensor, out: Tensor) -> None:
        layers = range(segment.first, segment.end)
        past = self._gathered(segment, call)
        new = self._new[: len(layers) * self._kv.rows_per_layer * call.positions.numel()]
        inputs = {
            "hidden": hidden[call.rows],
            "cos": self._cos[call.rows],
            "sin": self._sin[call.rows],
            "positions": call.positions,
            "sequence_ids": call.sequence_ids,
            "past_positions": call.past_positions,
            "past_sequence_ids": call.past_sequence_ids,
        }
        outputs = {"out": out[call.rows]}
        for layer, layer_past, layer_new in zip(layers, past.chunk(len(layers)), new.chunk(len(layers)), strict=True):
            inputs[f"past_{layer}"] = layer_past.view(self._head_shape)
            outputs[f"new_{layer}"] = layer_new.view(self._head_shape)
        segment.run(inputs, outputs)
        per_token = new.view(len(layers) * self._kv.rows_per_layer, -1, new.shape[1])
        self._kv.scatter(segment.first, call.scatter_index, per_token)

    def _gathered(self, segment: Segment, call: StagedCall) -> Tensor:
        """[layers * k|v * kv_head * P, head_dim]"""
        size = (segment.end - segment.first) * self._kv.rows_per_layer * call.num_past
        if not call.has_past:
            return self._no_past[:size]
        if self._index_of is not call:
            self._kv.gather_index(call.past_rows, self._past_index[: self._index_size(call)])
            self._index_of = call
        self._kv.gather(segment.first, self._past_index, self._past[:size])
        return self._past[:size]

    def _index_size(self, call: StagedCall) -> int:
        """Of the range with the most layers; a smaller one takes the first part of it."""
        return self._kv.layers_at_once * self._kv.rows_per_layer * call.num_past

    def _make_rows(self, num_rows: int) -> None:
        sizes = [self._model.config.hidden_size] * 2 + [self._model.rotary.frequencies.numel()] * 2
        buffers = [aligned_empty((num_rows, size), self._dtype, self._device) for size in sizes]
        self._hidden, self._out, self._cos, self._sin = buffers

    def _kv_rows(self, num_rows: int) -> Tensor:
        return aligned_empty((num_rows, self._kv.head_dim), self._dtype, self._device)
