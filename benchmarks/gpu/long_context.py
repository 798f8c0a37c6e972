"""Decode speed at long contexts: how much of the card's copy bandwidth a step's reads of weights and KV reach.

The KV of the context is random: sequences are resumed as after a handoff, so nothing is prefilled.
Where a batch does not fit into the pool, the largest one that does is measured (--kv-cache-dtype fp8 halves the KV).

    python -m benchmarks.gpu.long_context
"""

import argparse
from itertools import pairwise
from typing import Any

import msgspec

from baton.step_timer import fill
from benchmarks.gpu.harness import (
    CONFIGS,
    Floors,
    Shape,
    drive,
    engine_for,
    measure_floors,
    median,
    parser,
    random_request,
    show,
)
from engine.engine import Engine

CONTEXTS = {"llama-3-8b": [32768, 131072], "tiny": [512, 2048]}
COLUMNS = {
    "context": ",d",
    "batch": "d",
    "asked": "d",
    "ms/step": ".3f",
    "tokens/s": ",.0f",
    "GB read": ".2f",
    "floor ms": ".3f",
    "of floor": ".1%",
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--context", type=int, nargs="+", help="tokens before the first step (default: the shape's)")
    options.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="sequences at once")
    options.add_argument("--steps", type=int, default=64, help="steps to measure (default: %(default)s)")
    args = options.parse_args()
    shape = Shape.of(CONFIGS[args.config])
    # A small step keeps the peak forward small, so that the pool gets what is left of the card.
    floors = measure_floors(args)
    with engine_for(args, max_batch_tokens=2048, max_num_seqs=max(args.batch), memory_fraction=0.95) as engine:
        fill(engine.executor.memory)
        rows = [
            measure(engine, shape, floors, args, context, batch)
            for context in args.context or CONTEXTS[args.config]
            for batch in args.batch
        ]
    show(args, floors, COLUMNS, rows)


def measure(
    engine: Engine, shape: Shape, floors: Floors, args: argparse.Namespace, context: int, asked: int
) -> dict[str, Any]:
    layout = engine.executor.layout
    per_sequence = layout.num_blocks_for(context + args.steps + 16)
    batch = min(asked, engine.kv.num_free // per_sequence)
    if batch == 0:
        return {"context": context, "batch": 0, "asked": asked}
    for i in range(batch):
        resume(engine, shape, context, args.steps + 8, f"{context}-{asked}-{i}", seed=i)
    times = [step.time for step in drive(engine) if step.num_tokens == batch]
    took = median([later - earlier for earlier, later in pairwise(times[3:])])
    kv_bytes = batch * (context + args.steps / 2) * layout.block_bytes / layout.block_size
    num_bytes = shape.weight_bytes(args.quantization) + kv_bytes
    return {
        "context": context,
        "batch": batch,
        "asked": asked,
        "ms/step": 1e3 * took,
        "tokens/s": batch / took,
        "GB read": num_bytes / 1e9,
        "floor ms": 1e3 * num_bytes / floors.copy_bytes_per_s,
        "of floor": num_bytes / floors.copy_bytes_per_s / took,
    }


def resume(engine: Engine, shape: Shape, context: int, num_output: int, name: str, *, seed: int) -> None:
    """A sequence of `context` tokens whose KV counts as computed, and one more token to go on from."""
    request = random_request(name, context + 1, num_output, shape.vocab_size, seed=seed)
    block_ids = engine.kv.allocate(engine.executor.layout.num_blocks_for(context))
    assert block_ids is not None, (context, engine.kv.num_free)
    engine.resume(msgspec.structs.replace(request, num_prompt_tokens=context), block_ids)


if __name__ == "__main__":
    main()
