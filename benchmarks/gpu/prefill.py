"""Prefill speed: many prompts of 2048 at once, and single prompts up to 131072 tokens, as parts of the product peak.

Counted are 2 x parameters of the layers x tokens plus causal attention, over the time from submitting the prompts to
their first tokens; the peak is a matrix product of this run. Token ids are random, so nothing comes from the cache.

    python -m benchmarks.gpu.prefill
"""

import argparse
import time
from typing import Any

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

VLLM = {(64, 2048): "42,300 tokens/s", (1, 2048): "51 ms"}  # vLLM 0.26.0, this shape in bfloat16 on one H200
CASES = {
    "llama-3-8b": ["64x2048", "1x2048", "1x16384", "1x32768", "1x131072"],
    "tiny": ["8x256", "1x256", "1x1024"],
}
LONG = 65536  # tokens in all from which one round is enough
COLUMNS = {
    "prompts": ">s",
    "first token ms": ",.1f",
    "tokens/s": ",.0f",
    "TFLOP/s": ".1f",
    "of peak": ".1%",
    "vLLM": ">s",
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--cases", nargs="+", metavar="NxTOKENS", help="prompts (default: those of the shape)")
    options.add_argument("--max-batch-tokens", type=int, help="tokens of a step (default: a worker's)")
    options.add_argument("--rounds", type=int, default=3, help="of each case, the median counts; long ones: 1")
    args = options.parse_args()
    shape = Shape.of(CONFIGS[args.config])
    cases = [tuple(map(int, case.split("x"))) for case in args.cases or CASES[args.config]]
    floors = measure_floors(args)
    with engine_for(args, max_batch_tokens=args.max_batch_tokens) as engine:
        seconds(engine, shape, 1, cases[0][1], "warm")
        rows = [measure(engine, shape, floors, args, *case) for case in cases]
    show(args, floors, COLUMNS, rows)


def measure(
    engine: Engine, shape: Shape, floors: Floors, args: argparse.Namespace, num_prompts: int, num_tokens: int
) -> dict[str, Any]:
    rounds = 1 if num_prompts * num_tokens >= LONG and num_prompts == 1 else args.rounds
    took = median([seconds(engine, shape, num_prompts, num_tokens, f"{num_tokens}-{r}") for r in range(rounds)])
    rate = shape.prefill_flop(num_tokens, num_prompts) / took
    return {
        "prompts": f"{num_prompts} x {num_tokens}",
        "first token ms": 1e3 * took if num_prompts == 1 else None,
        "tokens/s": num_prompts * num_tokens / took,
        "TFLOP/s": rate / 1e12,
        "of peak": rate / floors.matmul_flop_per_s,
        "vLLM": VLLM.get((num_prompts, num_tokens)) if args.config == "llama-3-8b" else None,
    }


def seconds(engine: Engine, shape: Shape, num_prompts: int, num_tokens: int, name: str) -> float:
    """From submitting the prompts until the last of their first tokens."""
    requests = [
        random_request(f"{name}-{num_prompts}-{i}", num_tokens, 1, shape.vocab_size, seed=i) for i in range(num_prompts)
    ]
    start = time.perf_counter()
    for request in requests:
        engine.submit(request)
    return max(step.time for step in drive(engine)) - start


if __name__ == "__main__":
    main()
