"""Index tensors of a step against a walk over every token."""

import random

import numpy as np
import pytest
import torch

from engine.attention.base import Span
from engine.attention.indices import index_spans, offsets, pack, stage, token_rows, unpack

NUM_BLOCKS, BLOCK_SIZE = 64, 4


def random_span(source: random.Random) -> Span:
    start, num_tokens = source.randrange(12), source.choice([1, 1, 2, 3, 4, 5, 9])
    num_blocks = -(-(start + num_tokens) // BLOCK_SIZE) + source.randrange(2)
    return Span(start, num_tokens, [source.randrange(NUM_BLOCKS) for _ in range(num_blocks)])


@pytest.mark.parametrize("seed", range(50))
def test_indices_equal_a_walk_over_every_token(seed: int) -> None:
    source = random.Random(seed)
    spans = [random_span(source) for _ in range(source.randrange(1, 8))]
    indices = index_spans(spans, BLOCK_SIZE, NUM_BLOCKS)
    slots, block_ids, tokens, blocks = [], [], [0], [0]
    for span in spans:
        end = span.start + span.num_tokens
        slots += [span.block_ids[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(span.start, end)]
        block_ids += span.block_ids[: (end - 1) // BLOCK_SIZE + 1]
        tokens.append(len(slots))
        blocks.append(len(block_ids))
    assert indices.slots.tolist() == slots
    assert indices.block_ids.tolist() == block_ids
    assert indices.token_indptr.tolist() == tokens
    assert indices.block_indptr.tolist() == blocks
    assert indices.lengths.tolist() == [span.start + span.num_tokens for span in spans]
    held = np.diff(indices.block_indptr)
    assert ((held - 1) * BLOCK_SIZE + indices.last_block_lengths).tolist() == indices.lengths.tolist()
    assert all(1 <= length <= BLOCK_SIZE for length in indices.last_block_lengths)


def test_a_span_that_reaches_beyond_its_blocks_or_names_a_block_outside_the_pool_is_a_bug() -> None:
    with pytest.raises(ValueError, match="too short"):
        index_spans([Span(0, 5, [1])], BLOCK_SIZE, NUM_BLOCKS)
    with pytest.raises(AssertionError):
        index_spans([Span(0, 4, [NUM_BLOCKS])], BLOCK_SIZE, NUM_BLOCKS)


def test_token_rows_bring_spans_into_an_order() -> None:
    spans = [Span(0, 3, [0]), Span(5, 1, [1, 2]), Span(0, 2, [3])]
    assert token_rows(spans, [1, 0, 2]).tolist() == [3, 0, 1, 2, 4, 5]


def test_staged_arrays_arrive_aligned_and_unchanged() -> None:
    arrays = [np.arange(5), np.arange(3, dtype=np.int32), np.arange(7, dtype=np.int32)]
    assert offsets(arrays) == [0, 48, 64, 96]
    for tensors in (stage(arrays, torch.device("cpu")), unpack(pack(arrays, pinned=False), arrays)):
        assert [tensor.tolist() for tensor in tensors] == [array.tolist() for array in arrays]
        assert [tensor.dtype for tensor in tensors] == [torch.int64, torch.int32, torch.int32]
