"""Decode speed at several batch sizes: 128 tokens in, 256 out, all sequences in step, beside what the card could do.

The floor of a step is the bytes it reads (weights, and the KV of every sequence) over the card's copy bandwidth, both
of this run. Idle is the time of a step in which no kernel runs, seen by the profiler in a pass of its own: between
steps (the gap at the step's boundary) and in all.

    python -m benchmarks.gpu.decode
"""

import argparse
from itertools import pairwise
from typing import Any

import torch

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

VLLM_MS = {1: 4.98, 32: 5.56, 128: 7.60, 256: 11.72}  # vLLM 0.26.0, this shape in bfloat16 on one H200
NUM_PROFILED = 24  # steps
COLUMNS = {
    "batch": "d",
    "tokens/s": ",.0f",
    "ms/step": ".3f",
    "floor ms": ".3f",
    "of floor": ".1%",
    "vLLM ms": ".2f",
    "idle between us": ".1f",
    "idle in all us": ".1f",
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--batch",
        type=int,
        nargs="+",
        help="sequences at once (default: 1 32 128 256 512; without a GPU 1 32)",
    )
    options.add_argument("--input", type=int, default=128, help="prompt tokens (default: %(default)s)")
    options.add_argument("--output", type=int, default=256, help="tokens to generate (default: %(default)s)")
    options.add_argument("--no-idle", action="store_true", help="leave out the profiler's pass")
    args = options.parse_args()
    on_gpu = torch.cuda.is_available() and args.device != "cpu"
    args.batch = args.batch or ([1, 32, 128, 256, 512] if on_gpu else [1, 32])
    shape = Shape.of(CONFIGS[args.config])
    floors = measure_floors(args)
    with engine_for(args, max_num_seqs=max(args.batch)) as engine:
        decode_seconds(engine, shape, args, args.batch[0], "warm")
        rows = [measure(engine, shape, floors, args, batch) for batch in args.batch]
        if on_gpu and not args.no_idle:
            for row in rows:
                row["idle between us"], row["idle in all us"] = idle_microseconds(engine, shape, args, row["batch"])
    show(args, floors, COLUMNS, rows)


def measure(engine: Engine, shape: Shape, floors: Floors, args: argparse.Namespace, batch: int) -> dict[str, Any]:
    seconds = decode_seconds(engine, shape, args, batch, f"batch-{batch}")
    if not seconds:
        raise SystemExit(f"--batch {batch}: the first answers end before so many sequences run; raise --output")
    layout = engine.executor.layout
    kv_bytes = batch * (args.input + args.output / 2) * layout.block_bytes / layout.block_size
    floor = (shape.weight_bytes(args.quantization) + kv_bytes) / floors.copy_bytes_per_s
    step = median(seconds)
    return {
        "batch": batch,
        "tokens/s": batch * len(seconds) / sum(seconds),
        "ms/step": 1e3 * step,
        "floor ms": 1e3 * floor,
        "of floor": floor / step,
        "vLLM ms": VLLM_MS.get(batch) if args.config == "llama-3-8b" else None,
    }


def submit(engine: Engine, shape: Shape, args: argparse.Namespace, batch: int, num_output: int, name: str) -> None:
    for i in range(batch):
        engine.submit(random_request(f"{name}-{i}", args.input, num_output, shape.vocab_size, seed=i))


def decode_seconds(engine: Engine, shape: Shape, args: argparse.Namespace, batch: int, name: str) -> list[float]:
    """Between the tokens of one full step and those of the next."""
    submit(engine, shape, args, batch, args.output, name)
    times = [step.time for step in drive(engine) if step.num_tokens == batch]
    # The first full step may have sampled for the last prompts, too.
    return [later - earlier for earlier, later in pairwise(times[1:])]


def idle_microseconds(engine: Engine, shape: Shape, args: argparse.Namespace, batch: int) -> tuple[float, float]:
    """Of the GPU in a step: the median gap between steps, and the mean of all gaps together."""
    submit(engine, shape, args, batch, NUM_PROFILED + 8, f"idle-{batch}")
    steps = drive(engine)
    full = 0
    while full < 4:
        full += next(steps).num_tokens == batch
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(NUM_PROFILED):
            next(steps)
    for _ in steps:
        pass
    spans = sorted(
        (event.time_range.start, event.time_range.end) for event in profile.events() if event.device_type.name == "CUDA"
    )
    gaps, end = [], spans[0][1]
    for start, stop in spans:
        gaps.append(max(0.0, start - end))
        end = max(end, stop)
    between = sorted(gaps)[-(NUM_PROFILED - 1) :]  # a step has one boundary, and nothing else in it is as long
    return median(between), sum(gaps) / NUM_PROFILED


if __name__ == "__main__":
    main()
