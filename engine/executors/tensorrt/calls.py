"""How a step is cut into calls of an engine, which takes so many tokens and so many past tokens.

Tokens of several sequences go into one call packed, told apart by sequence ids, as long as that is faster than calls of
their own: attention is computed for all pairs of a call, also for those of different sequences, whose share grows with
every sequence. A prompt that is cut continues in the next call, to which its first part is past.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.attention.base import Span

NO_PAST = -1  # sequence id of a past entry that no token attends to
PADDING = -2  # sequence id of a token that is none

Int32s = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class CallLimits:
    """What one call takes: tokens, and past tokens of all its sequences together. Both are raised to what `padded`
    makes of them, so that shapes repeat and addresses are aligned; it leaves the limits themselves as they are.

    `max_wasted_pairs`: a part joins a call for at most so many pairs of tokens that do not see each other.
    """

    max_tokens: int
    max_past: int
    padded: Callable[[int], int]
    max_wasted_pairs: float = math.inf


@dataclass(frozen=True, slots=True)
class Part:
    """Positions `start .. start + num_tokens - 1` of the span with this index."""

    span: int
    start: int
    num_tokens: int
    block_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Call:
    """One call, padded: T tokens and P past tokens. Slots are block_id * block_size + slot of a block."""

    num_tokens: int  # without padding
    has_past: bool
    positions: Int32s  # [T]
    sequence_ids: Int32s  # [T]
    slots: Int32s  # [num_tokens]
    past_positions: Int32s  # [P]
    past_sequence_ids: Int32s  # [P]
    past_slots: Int32s  # [P]


def exactly(size: int) -> int:
    return size


def ladder(multiple: int) -> Callable[[int], int]:
    """Sizes in steps of an eighth or less, at most of 128, and all multiples of `multiple`, a power of two <= 128."""
    assert multiple.bit_count() == 1, multiple
    assert multiple <= 128, multiple

    def padded(size: int) -> int:
        step = max(multiple, min(128, 1 << max(0, size.bit_length() - 4)))
        return -(-size // step) * step

    return padded


def cut(spans: Sequence[Span], limits: CallLimits) -> list[list[Part]]:
    """The tokens of `spans` in order."""
    calls: list[list[Part]] = []
    num_tokens = num_past = 0
    for index, span in enumerate(spans):
        start, end = span.start, span.start + span.num_tokens
        while start < end:
            assert start <= limits.max_past, (span, limits)
            size = min(end - start, limits.max_tokens - num_tokens)
            wasted = num_tokens * (start + size) + size * (num_past + num_tokens)
            fits = size > 0 and num_past + start <= limits.max_past and wasted <= limits.max_wasted_pairs
            if not calls or not fits:
                calls.append([])
                num_tokens = num_past = 0
                size = min(end - start, limits.max_tokens)
            calls[-1].append(Part(index, start, size, span.block_ids))
            num_tokens, num_past, start = num_tokens + size, num_past + start, start + size
    return calls


def make_call(parts: Sequence[Part], block_size: int, num_blocks: int, limits: CallLimits) -> Call:
    num_tokens = sum(part.num_tokens for part in parts)
    num_past = sum(part.start for part in parts)
    ends = [part.start + part.num_tokens for part in parts]
    block_ids = [
        np.asarray(part.block_ids[: -(-end // block_size)], np.int32) for part, end in zip(parts, ends, strict=True)
    ]
    for part, end, ids in zip(parts, ends, block_ids, strict=True):
        assert ids.size * block_size >= end, part
        assert ids.min() >= 0, part
        assert ids.max() < num_blocks, part
    positions = [np.arange(part.start, end, dtype=np.int32) for part, end in zip(parts, ends, strict=True)]
    past = [np.arange(part.start, dtype=np.int32) for part in parts]
    past_slots = join(slots_of(ids, each, block_size) for ids, each in zip(block_ids, past, strict=True))
    # Padding reads a slot that is read anyway, for another may hold anything; where there is no past, none is read.
    first = int(past_slots[0]) if num_past else 0
    size, past_size = limits.padded(num_tokens), limits.padded(max(1, num_past))
    sequences = np.array([part.span for part in parts], np.int32)
    return Call(
        num_tokens=num_tokens,
        has_past=num_past > 0,
        positions=fill(join(positions), size, 0),
        sequence_ids=fill(np.repeat(sequences, [part.num_tokens for part in parts]), size, PADDING),
        slots=join(slots_of(ids, each, block_size) for ids, each in zip(block_ids, positions, strict=True)),
        past_positions=fill(join(past), past_size, 0),
        past_sequence_ids=fill(np.repeat(sequences, [part.start for part in parts]), past_size, NO_PAST),
        past_slots=fill(past_slots, past_size, first),
    )


def slots_of(block_ids: Int32s, positions: Int32s, block_size: int) -> Int32s:
    slots: Int32s = block_ids[positions // block_size] * np.int32(block_size) + positions % block_size
    return slots


def join(arrays: Iterable[Int32s]) -> Int32s:
    return np.concatenate(list(arrays), dtype=np.int32)


def fill(values: Int32s, size: int, value: int) -> Int32s:
    """`values`, followed by `value` up to `size`."""
    filled = np.full(size, value, np.int32)
    filled[: values.size] = values
    return filled
