"""Measured times of a worker's steps, and from them the time of any step: what simulations compute with.

A profile is a JSON file that `baton profile` writes. Prefill steps and decode steps are each a `Curve`: a step of some
size (tokens of prompts, sequences that decode) takes a time of its own, and more for the keys that each of those reads
on average. Both are straight lines between the sizes measured. In a step that does both, what decodes adds its rows to
those of the prompts, and the reading of its KV by a weight that is fitted to the mixed steps measured.

Pure: no clock. A step that waited for its host may have been slower than a larger one: neighbours are averaged until
that is over (isotonic regression by pooling adjacent violators), so more tokens or sequences, of the same mean context
or a longer one, never take less time.
"""

import statistics
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Self

import msgspec

from engine.step_model import StepWork, num_pairs

Count = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(gt=0)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]


class PrefillStep(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`prompts` chunks of `tokens`, each after `past` others of its prompt."""

    tokens: Positive
    past: Count
    prompts: Positive = 1
    seconds: Seconds

    @property
    def work(self) -> StepWork:
        return StepWork(self.prompts * self.tokens, self.prompts * num_pairs(self.tokens, self.past))


class DecodeStep(msgspec.Struct, frozen=True, kw_only=True):
    """`batch` sequences with `context` tokens before the one computed."""

    batch: Positive
    context: Count
    seconds: Seconds

    @property
    def work(self) -> StepWork:
        return StepWork(decodes=self.batch, kv_tokens=self.batch * self.context)


class MixedStep(msgspec.Struct, frozen=True, kw_only=True):
    """Decoding sequences and one chunk of a prompt."""

    decode_batch: Positive
    decode_context: Count
    prefill_tokens: Positive
    prefill_past: Count
    seconds: Seconds

    @property
    def work(self) -> StepWork:
        pairs = num_pairs(self.prefill_tokens, self.prefill_past)
        return StepWork(self.prefill_tokens, pairs, self.decode_batch, self.decode_batch * self.decode_context)


class Transfer(msgspec.Struct, frozen=True, kw_only=True):
    """KV from one worker to another."""

    bytes_per_s: Annotated[float, msgspec.Meta(gt=0)]
    latency_s: Annotated[float, msgspec.Meta(ge=0)]

    def seconds(self, num_bytes: int) -> float:
        return self.latency_s + num_bytes / self.bytes_per_s


Step = PrefillStep | DecodeStep | MixedStep


class Measurements(msgspec.Struct, frozen=True, kw_only=True):
    """What the file holds, and nothing derived."""

    device: str
    model: str
    tensor_parallel: Positive = 1
    kv_bytes_per_token: Positive
    kv_tokens: Positive | None = None  # that the worker measured had room for
    commands: list[str]  # how it was measured
    transfer: Transfer | None = None
    prefill: Annotated[list[PrefillStep], msgspec.Meta(min_length=1)]
    decode: Annotated[list[DecodeStep], msgspec.Meta(min_length=1)]
    mixed: list[MixedStep] = []

    def to_json(self) -> str:
        """A line for each field and each step."""
        fields = []
        for name, value in msgspec.to_builtins(self).items():
            rows = [f"    {msgspec.json.encode(row).decode()}" for row in value] if isinstance(value, list) else []
            text = "[\n" + ",\n".join(rows) + "\n  ]" if rows else msgspec.json.encode(value).decode()
            fields.append(f'  "{name}": {text}')
        return "{\n" + ",\n".join(fields) + "\n}\n"


class StepProfile:
    """Seconds of any step, from `measured` ones."""

    def __init__(self, measured: Measurements) -> None:
        self.measured = measured
        self._prefill = Curve(
            (step.work.prefill_tokens, step.work.pairs / step.work.prefill_tokens, step.seconds)
            for step in measured.prefill
        )
        self._decode = Curve((step.batch, step.context, step.seconds) for step in measured.decode)
        self._mixed_sizes, self._kv_weights = self._fit_kv_weights(measured.mixed)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Raises ValueError that names the field."""
        return cls(msgspec.json.decode(text, type=Measurements))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises OSError, and ValueError for a file that holds no profile."""
        try:
            return cls.from_json(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is no step profile: {error}") from error

    def kv_tokens(self, memory: int | None) -> int | None:
        """That a worker has room for in so many bytes on each of its GPUs. Without a number: what the one measured had,
        None where the file does not say."""
        measured = self.measured
        if memory is None:
            return measured.kv_tokens
        return memory // measured.kv_bytes_per_token * measured.tensor_parallel

    def step_seconds(self, work: StepWork) -> float:
        """About a microsecond's work. Nothing to compute takes no time."""
        decodes, tokens = work.decodes, work.prefill_tokens
        if not tokens:
            return self._decode.seconds(decodes, work.kv_tokens) if decodes else 0.0
        if not decodes:
            return self._prefill.seconds(tokens, work.pairs)
        own, reading = self._prefill.own(tokens + decodes), self._decode.reading(decodes, work.kv_tokens)
        weight = _between(self._mixed_sizes, self._kv_weights, min(tokens, self._mixed_sizes[-1]))
        together = own + self._prefill.reading(tokens, work.pairs) + weight * reading
        return max(together, self._decode.own(decodes) + reading)

    def _fit_kv_weights(self, steps: Sequence[MixedStep]) -> tuple[Sequence[int], Sequence[float]]:
        """Of least relative errors for each size of prompt, rising with it, between 0 and 2; 1 where nothing tells.

        Small prompts leave the device time to read, as such a step waits for its host anyway.
        """
        sums: dict[int, tuple[float, float]] = {}
        for step in steps:
            work = step.work
            reading = self._decode.reading(work.decodes, work.kv_tokens) / step.seconds
            own = self._prefill.own(work.prefill_tokens + work.decodes)
            rest = (own + self._prefill.reading(work.prefill_tokens, work.pairs)) / step.seconds
            both, squares = sums.get(work.prefill_tokens, (0.0, 0.0))
            sums[work.prefill_tokens] = both + reading * (1.0 - rest), squares + reading * reading
        knots = [(size, both / squares, squares) for size, (both, squares) in sorted(sums.items()) if squares]
        if not knots:
            return (1,), (1.0,)
        return [size for size, _, _ in knots], [min(2.0, max(0.0, weight)) for weight in _rising(knots)]


class Curve:
    """Seconds of steps by size and keys read: `own(size) + read(size) * keys / size`, both in lines between knots.

    `points`: (size, keys read by each on average, seconds). The size that has only one number of keys gets the
    reading of its neighbours.
    """

    def __init__(self, points: Iterable[tuple[int, float, float]]) -> None:
        rows = {size: [(keys, s) for _, keys, s in row] for size, row in groupby(sorted(points), key=itemgetter(0))}
        slopes = [(size, *_slope(row)) for size, row in rows.items() if len({keys for keys, _ in row}) > 1]
        read = _rising(slopes)
        self._read_sizes = (0.0, *(size for size, _, _ in slopes))
        self._read = (0.0, *read)
        own: list[tuple[int, float, float]] = []
        for size, row in rows.items():
            weights = [1.0 / seconds**2 for _, seconds in row]
            rest = [max(0.0, seconds - self._reading(size) * keys) for keys, seconds in row]
            own.append((size, statistics.fmean(rest, weights), sum(weights)))
        self._sizes = tuple(float(size) for size, _, _ in own)
        self._own = tuple(_rising(own))

    def seconds(self, size: int, keys: int) -> float:
        """`keys`: read in all."""
        return self.own(size) + self._reading(size) * keys / size

    def own(self, size: int) -> float:
        return _between(self._sizes, self._own, size)

    def reading(self, size: int, keys: int) -> float:
        return self._reading(size) * keys / size

    def _reading(self, size: int) -> float:
        return _between(self._read_sizes, self._read, size)


def _between(sizes: Sequence[float], values: Sequence[float], size: int) -> float:
    """On the line between two knots; the first value before them; beyond them the mean slope of all."""
    place = bisect_right(sizes, size)
    if place == len(sizes):
        if place == 1:
            return values[0]
        return values[-1] + (values[-1] - values[0]) * (size - sizes[-1]) / (sizes[-1] - sizes[0])
    if place == 0:
        return values[0]
    start, low = sizes[place - 1], values[place - 1]
    return low + (values[place] - low) * (size - start) / (sizes[place] - start)


def _slope(row: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Of the line through (keys, seconds) with the least relative errors, never negative, and its weight."""
    weights = [1.0 / seconds**2 for _, seconds in row]
    mean_keys = statistics.fmean((keys for keys, _ in row), weights)
    mean_seconds = statistics.fmean((seconds for _, seconds in row), weights)
    spread = sum(w * (keys - mean_keys) ** 2 for w, (keys, _) in zip(weights, row, strict=True))
    both = sum(w * (keys - mean_keys) * (s - mean_seconds) for w, (keys, s) in zip(weights, row, strict=True))
    return max(0.0, both / spread), spread


def _rising(knots: Iterable[tuple[int, float, float]]) -> list[float]:
    """The values of (size, value, weight) that never fall with size, nearest to these by weighted squares."""
    pools: list[tuple[float, float, int]] = []  # value, weight, how many
    for _, value, weight in knots:
        count = 1
        while pools and pools[-1][0] >= value:
            other, other_weight, others = pools.pop()
            value = (value * weight + other * other_weight) / (weight + other_weight)
            weight += other_weight
            count += others
        pools.append((value, weight, count))
    return [value for value, _, count in pools for _ in range(count)]
