"""Measures the steps of an executor, for a step profile.

Each step runs again and again over the same blocks of KV that nobody else uses. Its time is that between two results,
with as many steps in flight as the executor allows: what a busy worker has. Nothing here depends on the kind of
executor; the clock is a parameter.
"""

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from engine.executors.base import Batch, Chunk, Executor, SampleSpec
from engine.kv.memory import KvMemory
from engine.request import RequestId, SamplingParams
from engine.step_profile import DecodeStep, MixedStep, PrefillStep

MIN_STEPS, MAX_STEPS = 5, 32
GREEDY = SamplingParams(temperature=0.0)
FILLED_AT_ONCE = 512  # blocks

Tell = Callable[[str], None]  # of each step before it is measured


@dataclass(frozen=True, slots=True)
class Rows:
    """`num` sequences of one step, alike: so many new tokens after so many earlier ones."""

    num: int
    tokens: int
    past: int

    def __str__(self) -> str:
        return f"{self.num} x {self.tokens} after {self.past}"


@dataclass(frozen=True, slots=True)
class Sizes:
    """The steps to measure."""

    prefill: Sequence[Rows]
    decode: Sequence[Rows]
    mixed: Sequence[tuple[Rows, Rows]]  # what decodes, and one prompt's chunk

    @property
    def num(self) -> int:
        return len(self.prefill) + len(self.decode) + len(self.mixed)


def choose_sizes(executor: Executor, max_batch_tokens: int, max_num_seqs: int, *, quick: bool) -> Sizes:
    """Sizes in powers of two (`quick`: of four or more) that the executor's limits, its KV pool and a step allow."""
    longest, num_blocks = executor.max_model_len, executor.memory.num_blocks
    ratio = 4 if quick else 2

    def fit(*groups: Rows) -> bool:
        blocks = sum(rows.num * executor.layout.num_blocks_for(rows.past + rows.tokens) for rows in groups)
        rows_fit = sum(rows.num for rows in groups) <= max_num_seqs
        tokens_fit = sum(rows.num * rows.tokens for rows in groups) <= max_batch_tokens
        return rows_fit and tokens_fit and blocks <= num_blocks and all(r.past + r.tokens <= longest for r in groups)

    most = min(max_batch_tokens, longest)
    tokens = powers(min(16, most), most, ratio)
    pasts = powers(128, longest // 2, 4 * ratio)
    batches = powers(1, max_num_seqs, ratio)
    contexts = [length - 1 for length in powers(128, longest, 4)] or [longest // 2]
    prompts = [Rows(1, each, 0) for each in tokens]
    prompts += [Rows(1, each, past) for each in tokens[::2] for past in pasts]
    prompts += [Rows(max_batch_tokens // each, each, 0) for each in tokens[1 : -1 : ratio - 1]]
    decode = [Rows(batch, 1, context) for batch in batches for context in contexts]
    mixed = [
        (Rows(batch, 1, contexts[len(contexts) // 3]), Rows(1, each, past))
        for batch in batches[::-2][:3]
        for each in tokens[-2::-2][:3]
        for past in (0, *pasts[len(pasts) // 2 :][:1])
    ]
    return Sizes(
        [rows for rows in dict.fromkeys(prompts) if fit(rows)],
        [rows for rows in decode if fit(rows)],
        [groups for groups in mixed if fit(*groups)],
    )


def powers(first: int, last: int, ratio: int) -> list[int]:
    """`last`, what is smaller by `ratio`, and so on down to `first`; ascending."""
    sizes = []
    while last >= first:
        sizes.append(last)
        last //= ratio
    return sizes[::-1]


@dataclass(frozen=True, slots=True)
class Measured:
    prefill: list[PrefillStep]
    decode: list[DecodeStep]
    mixed: list[MixedStep]


def measure(executor: Executor, sizes: Sizes, clock: Callable[[], float], tell: Tell, *, step_s: float) -> Measured:
    """Spends about `step_s` seconds on each step, and no fewer than MIN_STEPS runs."""
    timer = StepTimer(executor, clock, step_s)

    def seconds(*groups: Rows) -> float:
        tell(", ".join(map(str, groups)))
        return float(f"{timer.seconds(*groups):.4g}")

    return Measured(
        [
            PrefillStep(tokens=rows.tokens, past=rows.past, prompts=rows.num, seconds=seconds(rows))
            for rows in sizes.prefill
        ],
        [DecodeStep(batch=rows.num, context=rows.past, seconds=seconds(rows)) for rows in sizes.decode],
        [
            MixedStep(
                decode_batch=decode.num,
                decode_context=decode.past,
                prefill_tokens=prompt.tokens,
                prefill_past=prompt.past,
                seconds=seconds(decode, prompt),
            )
            for decode, prompt in sizes.mixed
        ],
    )


class StepTimer:
    """Runs steps of an executor whose KV pool nobody else uses."""

    def __init__(self, executor: Executor, clock: Callable[[], float], step_s: float) -> None:
        self._executor = executor
        self._clock = clock
        self._step_s = step_s
        self._rng = random.Random(0)
        self._block_ids = list(range(executor.memory.num_blocks))
        self._rng.shuffle(self._block_ids)

    def seconds(self, *groups: Rows) -> float:
        """The median."""
        first = list(self._chunks(groups))
        # A decoding sequence goes on from the token that the step before samples.
        later = [replace(chunk, follows=row) if len(chunk.token_ids) == 1 else chunk for row, chunk in enumerate(first)]
        self._executor.submit(Batch(first)).result()  # compiles, and finds memory
        start = self._clock()
        self._executor.submit(Batch(later)).result()
        once = max(self._clock() - start, 1e-9)
        num_steps = min(MAX_STEPS, max(MIN_STEPS, round(self._step_s / once)))
        return statistics.median(self._between_results(later, num_steps))

    def _between_results(self, chunks: Sequence[Chunk], num_steps: int) -> list[float]:
        """Each step is submitted before the one before it is read, where the executor allows."""
        executor = self._executor
        steps = [executor.submit(Batch(chunks)) for _ in range(executor.max_in_flight - 1)]
        times = [self._clock()]
        for _ in range(num_steps):
            steps.append(executor.submit(Batch(chunks)))
            steps.pop(0).result()
            times.append(self._clock())
        for step in steps:
            step.result()
        gaps = [later - earlier for earlier, later in pairwise(times)]
        return gaps[executor.max_in_flight - 1 :]  # what was in flight at first had begun before

    def _chunks(self, groups: Sequence[Rows]) -> Iterator[Chunk]:
        place = 0
        for rows in groups:
            for _ in range(rows.num):
                token_ids = self._rng.choices(range(self._executor.vocab_size), k=rows.tokens)
                num_blocks = self._executor.layout.num_blocks_for(rows.past + rows.tokens)
                block_ids = self._block_ids[place : place + num_blocks]
                place += num_blocks
                yield Chunk(RequestId(str(place)), token_ids, rows.past, block_ids, SampleSpec(GREEDY, 0, (), 0))


def fill(memory: KvMemory) -> None:
    """Random numbers into the pool of a GPU: zeros take less power to read."""
    import torch

    from engine.kv.device_memory import DeviceMemory

    if isinstance(memory, DeviceMemory):
        kv = memory.kv(getattr(torch, memory.layout.dtype))
        for start in range(0, memory.num_blocks, FILLED_AT_ONCE):
            blocks = kv[start : min(start + FILLED_AT_ONCE, memory.num_blocks)]
            blocks.copy_(torch.randn(blocks.shape, dtype=torch.bfloat16, device=memory.device))
