"""Paged attention in plain PyTorch operators: the backend for the CPU, and a reference for others.

Keys and values are gathered slot by slot into a workspace, then attended to. Gathering slots instead of
whole blocks costs a tenth more (measured) and never reads a slot that the sequence has not written, so
stale bytes of a reused block cannot turn a masked score into NaN.

Rows of decoding sequences are batched: gathered together, the shorter padded with their own first
position and masked. A longer span of one sequence is a batch of its own, or several.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention.base import AttentionLayer, Span
from engine.layers.rotary import Rotation

MAX_PADDING = 1024  # positions gathered in vain before decode rows of other lengths get a batch of their own
# What bounds the memory of a step: longer spans and larger batches are attended to in parts.
MAX_SCORES = 1 << 26  # tokens x positions of a group of one span, for its mask and, where they are made, its scores
MAX_GATHERED = 1 << 16  # positions of a group of decode rows, unless one alone has more


@dataclass(frozen=True, slots=True)
class Group:
    """Spans attended to together: either many of one token, or one of many tokens.

    `slots` indexes rows of head_dim elements within a layer: [k|v, span, kv_head, position], flattened.
    `mask` [span, 1, 1, token, position] is added to scores; None: everything is visible, or, when
    `is_causal`, the lower triangle.
    """

    rows: slice | Tensor  # of the step's tokens
    num_spans: int
    num_tokens: int  # of each span
    num_positions: int  # padded
    slots: Tensor
    mask: Tensor | None
    is_causal: bool


class PagedAttention:
    """Owns the workspace for gathered KV; `kv` belongs to the executor. One step at a time."""

    def __init__(self, kv: Tensor) -> None:
        self.num_blocks, self.num_layers, _, self.num_kv_heads, self.block_size, self.head_dim = kv.shape
        self.rows = kv.view(-1, self.head_dim)
        self.device = kv.device
        self.workspace = kv.new_empty(0)

    def begin_step(self, spans: Sequence[Span], on_layer_written: Callable[[int], None] | None) -> "PagedStep":
        return PagedStep(self, spans, on_layer_written)

    def layer_rows(self, layer: int) -> Tensor:
        """Rows of `head_dim` elements from the first of `layer` in block 0 on; see `slot_rows`."""
        return self.rows[layer * 2 * self.num_kv_heads * self.block_size :]

    def slot_rows(self, block_ids: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Row of kv head 0's key in each slot, relative to `layer_rows`."""
        rows: np.ndarray = block_ids * (self.num_layers * 2 * self.num_kv_heads * self.block_size) + slots
        return rows

    def head_offsets(self) -> np.ndarray:
        """What to add to a row for each of [k heads, v heads]."""
        return np.arange(2 * self.num_kv_heads) * self.block_size

    def gather(self, layer: int, slots: Tensor) -> Tensor:
        """Valid until the next call: a fresh tensor would cost its page faults every time (measured 6 times)."""
        size = slots.numel() * self.head_dim
        if self.workspace.numel() < size:
            self.workspace = self.workspace.new_empty(size + size // 4)
        out = self.workspace[:size].view(-1, self.head_dim)
        return torch.index_select(self.layer_rows(layer), 0, slots, out=out)


def parts(span: Span) -> list[Span]:
    """The span in pieces whose tokens x positions are at most `MAX_SCORES`, if there are several tokens."""
    size = max(1, MAX_SCORES // (span.start + span.num_tokens))
    end = span.start + span.num_tokens
    return [Span(start, min(size, end - start), span.block_ids) for start in range(span.start, end, size)]


def ready(group: Group) -> Callable[[], Group]:
    return lambda: group


class PagedStep:
    """One step's index tensors; groups are made once for each distinct window."""

    def __init__(
        self, backend: PagedAttention, spans: Sequence[Span], on_layer_written: Callable[[int], None] | None
    ) -> None:
        self.backend = backend
        cut = [parts(span) for span in spans]
        self.spans = list(chain.from_iterable(cut))
        self.is_part = [len(parts_of_span) > 1 for parts_of_span in cut for _ in parts_of_span]
        self.first_rows = np.cumsum([0] + [span.num_tokens for span in self.spans])
        self.num_tokens = int(self.first_rows[-1])
        self.on_layer_written = on_layer_written
        self.write_rows = self._write_rows()
        self.groups: dict[int | None, list[Callable[[], Group]]] = {}

    def rotate_and_store(self, layer: AttentionLayer, heads: Tensor, rotation: Rotation) -> None:
        num_kv_heads = self.backend.num_kv_heads
        rotation.apply_(heads[:, :-num_kv_heads])
        key_values = heads[:, -2 * num_kv_heads :]
        self.backend.layer_rows(layer.index).index_put_((self.write_rows,), key_values)
        if self.on_layer_written is not None:
            self.on_layer_written(layer.index)

    def attend(self, layer: AttentionLayer, queries: Tensor) -> Tensor:
        if layer.window not in self.groups:
            self.groups[layer.window] = self._make_groups(layer.window)
        groups = self.groups[layer.window]
        if len(groups) == 1 and isinstance((group := groups[0]()).rows, slice):
            return self._attend(group, layer, queries)
        out = queries.new_empty(self.num_tokens, queries.shape[1] * queries.shape[2])
        for make_group in groups:
            group = make_group()
            out[group.rows] = self._attend(group, layer, queries[group.rows])
        return out

    def _attend(self, group: Group, layer: AttentionLayer, queries: Tensor) -> Tensor:
        num_kv_heads, head_dim = self.backend.num_kv_heads, self.backend.head_dim
        # [k|v, span, kv_head, position, head_dim]
        kv = self.backend.gather(layer.index, group.slots)
        kv = kv.view(2, group.num_spans, num_kv_heads, group.num_positions, head_dim)
        # [span, token, kv_head, query head of it, head_dim]
        q = queries.reshape(group.num_spans, group.num_tokens, num_kv_heads, -1, head_dim)
        # One query row per sequence is faster without the fused kernel, which in turn is exact in 16 bits.
        if layer.softcap is not None or (group.num_tokens == 1 and q.dtype is torch.float32):
            out = attend_eagerly(q, kv, group, layer)
        elif group.num_tokens == 1:
            mask = group.mask[:, 0].expand(-1, 1, q.shape[3], -1) if group.mask is not None else None
            out = F.scaled_dot_product_attention(q[:, 0], kv[0], kv[1], mask, scale=layer.scale)
        else:
            out = attend_fused(q, kv, group, layer)
        return out.reshape(group.num_spans * group.num_tokens, -1)

    def _write_rows(self) -> Tensor:
        """[num_tokens, k heads then v heads]"""
        block_size = self.backend.block_size
        rows = []
        for span in self.spans:
            end = span.start + span.num_tokens
            positions = np.arange(span.start, end)
            first = span.start // block_size
            block_ids = self._block_ids(span, first, end)
            rows.append(self.backend.slot_rows(block_ids[positions // block_size - first], positions % block_size))
        return self._tensor(np.concatenate(rows)[:, None] + self.backend.head_offsets())

    def _block_ids(self, span: Span, first: int, end: int) -> np.ndarray:
        """Ids of the span's blocks from the `first` to the one that holds position `end - 1`, checked."""
        block_ids = np.asarray(span.block_ids[first : -(-end // self.backend.block_size)], dtype=np.int64)
        assert block_ids.size * self.backend.block_size >= end - first * self.backend.block_size, span
        assert block_ids.min() >= 0, span
        assert block_ids.max() < self.backend.num_blocks, span
        return block_ids

    def _make_groups(self, window: int | None) -> list[Callable[[], Group]]:
        """Parts of a cut span are made anew for every layer: all their masks at once are what cutting avoids."""
        longest_first = sorted(range(len(self.spans)), key=lambda i: self._num_visible(i, window), reverse=True)
        groups: list[Callable[[], Group]] = []
        for i in longest_first:
            if self.spans[i].num_tokens > 1:
                make_group = partial(self._group, [i], window)
                groups.append(make_group if self.is_part[i] else ready(make_group()))
        batch: list[int] = []
        padding = 0
        for i in longest_first:
            if self.spans[i].num_tokens > 1:
                continue
            if batch:
                longest, own = self._num_visible(batch[0], window), self._num_visible(i, window)
                padding += longest - own
                is_full = (len(batch) + 1) * longest > MAX_GATHERED
                if is_full or (padding > MAX_PADDING and 2 * own < longest):
                    groups.append(ready(self._group(sorted(batch), window)))
                    batch, padding = [], 0
            batch.append(i)
        if batch:
            groups.append(ready(self._group(sorted(batch), window)))
        return groups

    def _num_visible(self, i: int, window: int | None) -> int:
        """Positions that span `i` attends to: its own and those before that any of its tokens sees."""
        span = self.spans[i]
        before = span.start if window is None else min(span.start, window - 1)
        return before + span.num_tokens

    def _group(self, members: list[int], window: int | None) -> Group:
        num_tokens = self.spans[members[0]].num_tokens
        lengths = np.array([self._num_visible(i, window) for i in members])
        num_positions = int(lengths.max())
        rows = np.stack([self._visible_rows(i, window, num_positions) for i in members])
        heads = self.backend.head_offsets().reshape(2, 1, self.backend.num_kv_heads, 1)
        clipped = window is not None and num_positions > window
        is_causal = num_tokens > 1 and num_tokens == num_positions and not clipped
        mask = None
        if (num_tokens > 1 and not is_causal) or num_positions > lengths.min():
            mask = self._mask(lengths, num_tokens, num_positions, window)
        return Group(
            rows=self._token_rows(members, num_tokens),
            num_spans=len(members),
            num_tokens=num_tokens,
            num_positions=num_positions,
            slots=self._tensor((rows[None, :, None, :] + heads).reshape(-1)),
            mask=mask,
            is_causal=is_causal,
        )

    def _visible_rows(self, i: int, window: int | None, num_positions: int) -> np.ndarray:
        """[num_positions], padded with the first visible position."""
        span, block_size = self.spans[i], self.backend.block_size
        length = self._num_visible(i, window)
        end = span.start + span.num_tokens
        positions = np.full(num_positions, end - length)
        positions[:length] = np.arange(end - length, end)
        first = (end - length) // block_size
        block_ids = self._block_ids(span, first, end)
        return self.backend.slot_rows(block_ids[positions // block_size - first], positions % block_size)

    def _token_rows(self, members: list[int], num_tokens: int) -> slice | Tensor:
        first = int(self.first_rows[members[0]])
        if members[-1] - members[0] + 1 == len(members):  # neighbours: a view will do
            return slice(first, first + len(members) * num_tokens)
        return self._tensor(self.first_rows[members])

    def _mask(self, lengths: np.ndarray, num_tokens: int, num_positions: int, window: int | None) -> Tensor:
        """[span, 1, 1, token, position] of 0 and -inf. A span's tokens are the last of its `lengths`."""
        own = torch.from_numpy(lengths).to(self.backend.device)[:, None, None] - num_tokens
        own = own + torch.arange(num_tokens, device=self.backend.device)[:, None]
        positions = torch.arange(num_positions, device=self.backend.device)
        hidden = positions > own
        if window is not None:
            hidden |= positions <= own - window
        mask = torch.zeros(hidden.shape, dtype=self.backend.rows.dtype, device=self.backend.device)
        return mask.masked_fill_(hidden, -torch.inf)[:, None, None]

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.backend.device)


def attend_eagerly(q: Tensor, kv: Tensor, group: Group, layer: AttentionLayer) -> Tensor:
    """Scores in full. Returns [span, token, kv_head, query head of it, head_dim]; scores in float32."""
    num_spans, num_tokens, num_kv_heads, num_groups, head_dim = q.shape
    keys, values = kv.flatten(1, 2)  # [span * kv_head, position, head_dim] each
    q = (q * layer.scale).permute(0, 2, 3, 1, 4).reshape(num_spans * num_kv_heads, num_groups * num_tokens, head_dim)
    scores = torch.bmm(q, keys.transpose(1, 2)).float()
    if layer.softcap is not None:
        scores = scores.div_(layer.softcap).tanh_().mul_(layer.softcap)
    # [span, kv_head, query head of it, token, position]
    scores = scores.view(num_spans, num_kv_heads, num_groups, num_tokens, -1)
    if group.is_causal:
        hidden = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=q.device).triu_(1)
        scores.masked_fill_(hidden, -torch.inf)
    elif group.mask is not None:
        scores += group.mask
    weights = scores.softmax(-1).to(q.dtype).view(num_spans * num_kv_heads, num_groups * num_tokens, -1)
    out = torch.bmm(weights, values)
    return out.view(num_spans, num_kv_heads, num_groups, num_tokens, head_dim).permute(0, 3, 1, 2, 4)


def attend_fused(q: Tensor, kv: Tensor, group: Group, layer: AttentionLayer) -> Tensor:
    """One span in the fused kernel. Shapes as `attend_eagerly`.

    The query heads of one kv head become the kernel's batch, over which keys and values are the same memory.
    """
    q = q[0].permute(2, 1, 0, 3)  # [query head of it, kv_head, token, head_dim]
    keys, values = (part.expand(q.shape[0], -1, -1, -1) for part in kv)
    mask = group.mask[0].expand(q.shape[0], q.shape[1], -1, -1) if group.mask is not None else None
    out = F.scaled_dot_product_attention(q, keys, values, mask, is_causal=group.is_causal, scale=layer.scale)
    return out.permute(2, 1, 0, 3)
