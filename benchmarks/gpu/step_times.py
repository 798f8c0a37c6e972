"""How long steps take, for a model of the executor: prefill by new and earlier tokens, decode by batch and context, and
steps that do both. What a simulated worker computes with, and where a step's time goes.

The executor runs the same step again and again over random KV. "ms" is the time between two results with two steps in
flight, as a busy worker has them; "alone ms" is that of one step, from submitting it to its tokens.

    python -m benchmarks.gpu.step_times --json profile.json
"""

import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from benchmarks.gpu.harness import engine_for, measure_floors, parser, show
from benchmarks.gpu.long_context import fill
from engine.executors.base import Batch, Chunk, Executor, SampleSpec
from engine.request import RequestId, SamplingParams

MIN_STEPS, MAX_STEPS, MEASURE_S = 3, 16, 0.3
GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True, slots=True)
class Grid:
    tokens: Sequence[int]  # of one prompt with nothing before it
    tokens_after: Sequence[int]  # with each of `past` before them
    past: Sequence[int]
    prompts: Sequence[tuple[int, int, int]]  # how many, tokens and past of each
    batches: Sequence[int]
    contexts: Sequence[int]
    mixed_batches: Sequence[int]
    mixed_tokens: Sequence[int]


GRIDS = {
    "llama-3-8b": Grid(
        tokens=(16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
        tokens_after=(64, 512, 2048, 8192),
        past=(2048, 8192, 32768),
        prompts=((32, 64, 0), (16, 128, 0), (4, 512, 0), (8, 1024, 0), (2, 4096, 0), (16, 512, 2048), (8, 256, 8192)),
        batches=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
        contexts=(128, 512, 2048, 8192, 32768),
        mixed_batches=(16, 64, 128),
        mixed_tokens=(256, 1024, 2048),
    ),
    "tiny": Grid((16, 64, 256), (64,), (128,), ((4, 32, 0),), (1, 4), (128, 512), (4,), (32,)),
}
MIXED_CONTEXT = 1024
COLUMNS = {"kind": ">s", "what": ">s", "ms": ",.3f", "alone ms": ",.3f"}


@dataclass(frozen=True, slots=True)
class Rows:
    """`num` sequences of one step, alike: so many new tokens after so many earlier ones."""

    num: int
    tokens: int
    past: int


def main() -> None:
    options = parser(__doc__)
    args = options.parse_args()
    grid = GRIDS[args.config]
    floors = measure_floors(args)
    limits = {"max_batch_tokens": max(grid.tokens), "max_num_seqs": max(grid.batches)}
    with engine_for(args, **limits) as engine:
        fill(engine)
        profile = measure(engine.executor, grid)
    memory = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None
    profile = {
        "device": {"name": floors.device, "memory": memory},
        "model": f"{args.config}, random weights",
        **profile,
    }
    path, args.json = args.json, None
    show(args, floors, COLUMNS, list(table(profile)))
    if path is not None:
        path.write_text(json.dumps(profile, indent=1) + "\n")


def measure(executor: Executor, grid: Grid) -> dict[str, list[dict[str, Any]]]:
    """Steps that are larger than the KV pool are left out."""
    steps = Steps(executor)
    prompts = [
        *(Rows(1, tokens, 0) for tokens in grid.tokens),
        *(Rows(1, tokens, past) for tokens in grid.tokens_after for past in grid.past),
        *(Rows(*prompt) for prompt in grid.prompts),
    ]
    decodes = [Rows(batch, 1, context) for batch in grid.batches for context in grid.contexts]
    mixed = [
        (Rows(batch, 1, MIXED_CONTEXT), Rows(1, tokens, past))
        for batch in grid.mixed_batches
        for tokens in grid.mixed_tokens
        for past in (0, 4 * MIXED_CONTEXT)
    ]
    return {
        "prefill": [
            {"tokens": [rows.tokens] * rows.num, "past": [rows.past] * rows.num, **steps.times(rows)}
            for rows in prompts
            if steps.fit(rows)
        ],
        "decode": [
            {"batch": rows.num, "context": rows.past, **steps.times(rows)} for rows in decodes if steps.fit(rows)
        ],
        "mixed": [
            {
                "decode_batch": decode.num,
                "decode_context": decode.past,
                "prefill_tokens": prompt.tokens,
                "prefill_past": prompt.past,
                **steps.times(decode, prompt),
            }
            for decode, prompt in mixed
            if steps.fit(decode, prompt)
        ],
    }


class Steps:
    """Runs steps of an executor whose KV pool nobody else uses."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._rng = random.Random(0)
        self._block_ids = list(range(executor.memory.num_blocks))
        self._rng.shuffle(self._block_ids)

    def fit(self, *groups: Rows) -> bool:
        layout = self._executor.layout
        return sum(each.num * layout.num_blocks_for(each.past + each.tokens) for each in groups) <= len(self._block_ids)

    def times(self, *groups: Rows) -> dict[str, float]:
        """Medians, in seconds."""
        first = list(self._chunks(groups))
        # A decoding sequence goes on from the token that the step before samples.
        later = [replace(chunk, follows=row) if len(chunk.token_ids) == 1 else chunk for row, chunk in enumerate(first)]
        for chunks in (first, later):  # compiles, and finds memory
            self._executor.submit(Batch(chunks)).result()
        alone: list[float] = []
        while len(alone) < MIN_STEPS or (len(alone) < MAX_STEPS and sum(alone) < MEASURE_S):
            start = time.perf_counter()
            self._executor.submit(Batch(later)).result()
            alone.append(time.perf_counter() - start)
        together = self._in_flight(later, len(alone) + 2)
        return {"seconds": statistics.median(together), "alone_seconds": statistics.median(alone)}

    def _in_flight(self, chunks: Sequence[Chunk], num_steps: int) -> list[float]:
        """Between the results of steps, each submitted before the one before it is read where the executor allows."""
        times: list[float] = []
        steps = [self._executor.submit(Batch(chunks)) for _ in range(self._executor.max_in_flight - 1)]
        for _ in range(num_steps):
            steps.append(self._executor.submit(Batch(chunks)))
            steps.pop(0).result()
            times.append(time.perf_counter())
        for step in steps:
            step.result()
        return [later - earlier for earlier, later in pairwise(times)]

    def _chunks(self, groups: Sequence[Rows]) -> Iterator[Chunk]:
        place = 0
        for rows in groups:
            for _ in range(rows.num):
                token_ids = self._rng.choices(range(self._executor.vocab_size), k=rows.tokens)
                num_blocks = self._executor.layout.num_blocks_for(rows.past + rows.tokens)
                block_ids = self._block_ids[place : place + num_blocks]
                place += num_blocks
                spec = SampleSpec(GREEDY, 0, (), 0)
                yield Chunk(RequestId(str(place)), token_ids, rows.past, block_ids, spec)


def table(profile: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for kind in ("prefill", "decode", "mixed"):
        for row in profile[kind]:
            if kind == "prefill":
                what = f"{len(row['tokens'])} x {row['tokens'][0]} after {row['past'][0]}"
            elif kind == "decode":
                what = f"{row['batch']} after {row['context']}"
            else:
                decodes = f"{row['decode_batch']} after {row['decode_context']}"
                what = f"{decodes}, {row['prefill_tokens']} after {row['prefill_past']}"
            yield {"kind": kind, "what": what, "ms": 1e3 * row["seconds"], "alone ms": 1e3 * row["alone_seconds"]}


if __name__ == "__main__":
    main()
