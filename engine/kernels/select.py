"""Choosing the next token from unnormalized probabilities without asking the CPU anything.

Does exactly what `engine.sampler` does with sorts and cumulative sums: sums are of whole numbers
(`weight * 2**44` rounded down), so they are exact in any order. Weights are float32, at least zero and at most 1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # weights that `thresholds` looks at at once
BAND = 8192  # weights that it keeps in registers
PIECES = 64  # of a row, summed side by side by `draw`
COLUMNS = 64


def thresholds(weights: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Per row of `weights` [num_rows, vocab] the smallest weight to keep: float32 [num_rows].

    min_p float32, top_k int32 or int64 (off unless 0 < top_k < vocab) and top_p float64 (off from 1.0 on), each
    [num_rows], apply in this order, each on what the one before left. Ties with the last token kept are kept.
    """
    num_rows, vocab = weights.shape
    assert weights.dtype == torch.float32, weights.dtype
    assert weights.stride(1) == 1, weights.stride()
    assert (min_p.dtype, top_p.dtype) == (torch.float32, torch.float64), (min_p.dtype, top_p.dtype)
    out = torch.empty(num_rows, dtype=torch.float32, device=weights.device)
    if num_rows:
        band = torch.empty((num_rows, BAND), dtype=torch.float32, device=weights.device)
        _thresholds[(num_rows,)](
            weights, min_p, top_k, top_p, out, band, vocab, weights.stride(0), BLOCK=BLOCK, BAND=BAND, num_warps=16
        )
    return out


def draw(weights: Tensor, thresholds: Tensor, numbers: Tensor) -> Tensor:
    """The tokens, int64 [num_rows], at which the cumulative weight exceeds its `numbers`-th part.

    Weights below their row's threshold count as zero; numbers float64 [num_rows] in [0, 1). A row of zeros
    gives token 0.
    """
    num_rows, vocab = weights.shape
    assert weights.dtype == torch.float32, weights.dtype
    assert weights.stride(1) == 1, weights.stride()
    assert numbers.dtype == torch.float64, numbers.dtype
    out = torch.empty(num_rows, dtype=torch.int64, device=weights.device)
    if num_rows:
        length = triton.cdiv(vocab, PIECES)
        _draw[(num_rows,)](
            weights,
            thresholds,
            numbers,
            out,
            vocab,
            weights.stride(0),
            length,
            PIECES=PIECES,
            COLUMNS=COLUMNS,
            LENGTH=triton.next_power_of_2(length),
            num_warps=8,
        )
    return out


@triton.jit
def _thresholds(weights, min_p, top_k, top_p, out, band, vocab, stride, BLOCK: tl.constexpr, BAND: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    values = weights + row * stride
    band += row * BAND
    least = tl.maximum(tl.load(min_p + row), 0.0)
    k = tl.load(top_k + row).to(tl.int64)
    if (k > 0) & (k < vocab):
        # The k-th of all weights: where min_p leaves fewer than k, its threshold is the larger one.
        least = tl.maximum(least, _search(values, vocab, k, band, 0, False, BLOCK, BAND))
    p = tl.load(top_p + row)
    if p < 1.0:
        total = _total(values, least, vocab, BLOCK)
        wanted = tl.maximum(tl.ceil(total.to(tl.float64) * p).to(tl.int64), 1)
        # What is below 2**-44 adds nothing.
        least = tl.maximum(least, _search(values, vocab, wanted, band, 0x297FFFFF, True, BLOCK, BAND))
    tl.store(out + row, least)


@triton.jit
def _search(
    values, vocab, wanted, band, LOWEST: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, BAND: tl.constexpr
):
    """The largest weight t for which the weights >= t count (or, if WHOLE, sum up to) at least `wanted`; else 0.

    lo and hi are the bits of floats: as those are not negative, they compare as the floats do. Passes over the
    row look at three places between them, until so few weights lie there that they fit into registers.
    """
    lo = tl.zeros((), tl.int32) + LOWEST
    hi = tl.zeros((), tl.int32) + 0x3F800000
    above = tl.zeros((), tl.int64)  # what the weights beyond hi measure
    num_above = tl.zeros((), tl.int32)
    num_from = num_above + vocab  # weights at lo and beyond, or more
    while (lo < hi) & (num_from - num_above > BAND):
        span = hi - lo
        first, second, third = lo + span // 4 + 1, lo + span // 2 + 1, lo + span // 2 + span // 4 + 1
        first_sum, num_first, second_sum, num_second, third_sum, num_third = _measure(
            values, vocab, first, second, third, WHOLE, BLOCK
        )
        if third_sum >= wanted:
            lo, num_from = third, num_third
        elif second_sum >= wanted:
            lo, num_from, hi, above, num_above = second, num_second, third - 1, third_sum, num_third
        elif first_sum >= wanted:
            lo, num_from, hi, above, num_above = first, num_first, second - 1, second_sum, num_second
        else:
            hi, above, num_above = first - 1, first_sum, num_first
    if lo < hi:
        num_found = _gather(values, vocab, lo, hi, band, BLOCK)
        place = tl.arange(0, BAND)
        value = tl.load(band + place, mask=place < num_found, other=-1.0)
        bits = value.to(tl.int32, bitcast=True)
        amount = _whole(value) if WHOLE else tl.full((BAND,), 1, tl.int64)
        while lo < hi:
            middle = lo + (hi - lo) // 2 + 1
            if above + tl.sum(tl.where(bits >= middle, amount, 0), axis=0) >= wanted:
                lo = middle
            else:
                hi = middle - 1
        tl.debug_barrier()  # the next search writes to the band
    return tl.where(lo > LOWEST, lo, 0).to(tl.float32, bitcast=True)


@triton.jit
def _measure(values, vocab, first, second, third, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum (if not WHOLE: number) and number of the weights from each of three places on."""
    measure: tl.constexpr = tl.int64 if WHOLE else tl.int32
    first_sum = tl.zeros((BLOCK,), measure)
    second_sum = tl.zeros((BLOCK,), measure)
    third_sum = tl.zeros((BLOCK,), measure)
    num_first = tl.zeros((BLOCK,), tl.int32)
    num_second = tl.zeros((BLOCK,), tl.int32)
    num_third = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(values + column, mask=column < vocab, other=-1.0)
        bits = value.to(tl.int32, bitcast=True)
        num_first += (bits >= first).to(tl.int32)
        num_second += (bits >= second).to(tl.int32)
        num_third += (bits >= third).to(tl.int32)
        if WHOLE:
            amount = _whole(value)
            first_sum += tl.where(bits >= first, amount, 0)
            second_sum += tl.where(bits >= second, amount, 0)
            third_sum += tl.where(bits >= third, amount, 0)
    counts = tl.sum(num_first, axis=0), tl.sum(num_second, axis=0), tl.sum(num_third, axis=0)
    if WHOLE:
        sums = tl.sum(first_sum, axis=0), tl.sum(second_sum, axis=0), tl.sum(third_sum, axis=0)
    else:
        sums = counts[0].to(tl.int64), counts[1].to(tl.int64), counts[2].to(tl.int64)
    return sums[0], counts[0], sums[1], counts[1], sums[2], counts[2]


@triton.jit
def _gather(values, vocab, lo, hi, band, BLOCK: tl.constexpr):
    """Write the weights from lo to hi to `band`, one after the other; returns their number."""
    num_found = tl.zeros((), tl.int32)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(values + column, mask=column < vocab, other=-1.0)
        bits = value.to(tl.int32, bitcast=True)
        found = (bits >= lo) & (bits <= hi)
        place = num_found + tl.cumsum(found.to(tl.int32), axis=0) - 1
        tl.store(band + place, value, mask=found)
        num_found += tl.sum(found.to(tl.int32), axis=0)
    tl.debug_barrier()  # all threads of the program read it next
    return num_found


@triton.jit
def _total(values, least, vocab, BLOCK: tl.constexpr):
    """The whole sum of the weights >= least."""
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(values + column, mask=column < vocab, other=-1.0)
        total += tl.where(value >= least, _whole(value), 0)
    return tl.sum(total, axis=0)


@triton.jit
def _draw(
    weights,
    thresholds,
    numbers,
    out,
    vocab,
    stride,
    length,
    PIECES: tl.constexpr,
    COLUMNS: tl.constexpr,
    LENGTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    values = weights + row * stride
    least = tl.load(thresholds + row)
    piece = tl.arange(0, PIECES)
    by_column = tl.zeros((PIECES, COLUMNS), tl.int64)
    for start in range(0, length, COLUMNS):
        inside = start + tl.arange(0, COLUMNS)
        column = piece[:, None] * length + inside[None, :]
        mask = (inside < length)[None, :] & (column < vocab)
        by_column += _kept(values + column, mask, least)
    sums = tl.sum(by_column, axis=1)
    total = tl.sum(sums, axis=0)
    target = (tl.load(numbers + row) * total.to(tl.float64)).to(tl.int64)
    target = tl.minimum(target, total - 1)

    # The first piece at whose end the cumulative weight exceeds the target, then the first token in it.
    ends = tl.cumsum(sums, axis=0)
    chosen = tl.min(tl.where(ends > target, piece, PIECES - 1), axis=0)
    before = tl.sum(tl.where(piece < chosen, sums, 0), axis=0)
    inside = tl.arange(0, LENGTH)
    column = chosen * length + inside
    mask = (inside < length) & (column < vocab)
    cumulative = before + tl.cumsum(_kept(values + column, mask, least), axis=0)
    found = tl.min(tl.where(mask & (cumulative > target), column, vocab - 1), axis=0)
    tl.store(out + row, found.to(tl.int64))


@triton.jit
def _kept(places, mask, least):
    value = tl.load(places, mask=mask, other=0.0)
    return tl.where(value >= least, _whole(value), 0)


@triton.jit
def _whole(weights):
    return (weights.to(tl.float64) * 17592186044416.0).to(tl.int64)  # 2**44
