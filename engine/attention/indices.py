"""Index tensors of one step for kernels over the paged KV, made with numpy and brought to the device in one copy."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.attention.base import Span

ALIGNMENT = 16  # bytes, of each array in a staged buffer

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SpanIndices:
    """Where the tokens of some spans lie. The blocks of the i-th span are
    `block_ids[block_indptr[i] : block_indptr[i + 1]]`; `token_indptr` counts tokens the same way.
    """

    slots: Int64s  # [num_tokens] block_id * block_size + slot
    token_indptr: Int32s
    block_indptr: Int32s
    last_block_lengths: Int32s  # tokens in the last block, each in 1 .. block_size
    block_ids: Int32s
    lengths: Int32s  # tokens of the sequence up to the span's end

    @property
    def arrays(self) -> tuple[Int32s, Int32s, Int32s, Int32s]:
        """What attention needs on the device; only the last one's size is not that of the number of spans."""
        return self.token_indptr, self.block_indptr, self.last_block_lengths, self.block_ids


@dataclass(frozen=True, slots=True)
class DeviceIndices:
    """`SpanIndices.arrays` on the device."""

    token_indptr: Tensor
    block_indptr: Tensor
    last_block_lengths: Tensor
    block_ids: Tensor


def index_spans(spans: Sequence[Span], block_size: int, num_blocks: int) -> SpanIndices:
    starts = np.array([span.start for span in spans], dtype=np.int64)
    counts = np.array([span.num_tokens for span in spans], dtype=np.int64)
    lengths = starts + counts
    held = -(-lengths // block_size)
    ids = chain.from_iterable(islice(span.block_ids, n) for span, n in zip(spans, held.tolist(), strict=True))
    block_ids = np.fromiter(ids, dtype=np.int32, count=int(held.sum()))
    assert block_ids.min() >= 0, spans
    assert block_ids.max() < num_blocks, (spans, num_blocks)
    token_indptr = prefix_sums(counts)
    block_indptr = prefix_sums(held)
    positions = np.arange(token_indptr[-1]) + np.repeat(starts - token_indptr[:-1], counts)
    blocks = block_ids[np.repeat(block_indptr[:-1], counts) + positions // block_size].astype(np.int64)
    return SpanIndices(
        slots=blocks * block_size + positions % block_size,
        token_indptr=token_indptr,
        block_indptr=block_indptr,
        last_block_lengths=((lengths - 1) % block_size + 1).astype(np.int32),
        block_ids=block_ids,
        lengths=lengths.astype(np.int32),
    )


def prefix_sums(counts: Int64s) -> Int32s:
    """[len(counts) + 1], from 0."""
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int32)


def token_rows(spans: Sequence[Span], order: Sequence[int]) -> Int64s:
    """The step's row of each token when spans are taken in `order`."""
    first_rows = prefix_sums(np.array([span.num_tokens for span in spans], dtype=np.int64))
    return np.concatenate([np.arange(first_rows[i], first_rows[i + 1]) for i in order])


def pack(arrays: Sequence[Int64s | Int32s], *, pinned: bool) -> Tensor:
    """One uint8 tensor that holds `arrays` at their `offsets`.

    Pinned memory comes from PyTorch's allocator, which hands it out again only after the copies made of it have run.
    """
    places = offsets(arrays)
    packed = torch.empty(places[-1], dtype=torch.uint8, pin_memory=pinned)
    target = packed.numpy()
    for array, place in zip(arrays, places[:-1], strict=True):
        target[place : place + array.nbytes] = array.view(np.uint8)
    return packed


def unpack(buffer: Tensor, arrays: Sequence[Int64s | Int32s]) -> list[Tensor]:
    """Views of `buffer`, which holds what `pack` made of `arrays`."""
    views = []
    for array, place in zip(arrays, offsets(arrays)[:-1], strict=True):
        dtype = torch.int64 if array.dtype == np.int64 else torch.int32
        views.append(buffer[place : place + array.nbytes].view(dtype))
    return views


def offsets(arrays: Sequence[Int64s | Int32s]) -> list[int]:
    """In bytes, of each array and of the end."""
    ends = np.cumsum([-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays])
    return [0, *ends.tolist()]


def stage(arrays: Sequence[Int64s | Int32s], device: torch.device) -> list[Tensor]:
    """`arrays` on the device, by one copy in stream order that the host does not wait for."""
    packed = pack(arrays, pinned=device.type == "cuda")
    return unpack(packed.to(device, non_blocking=True), arrays)
