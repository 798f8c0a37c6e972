"""A whole server under mixed load: requests arrive at random (Poisson) through HTTP, with prompts and answers of mixed
lengths, to prefill and decode on workers of their own and to one worker that does both, on the same card.

Lengths are uniform (512 to 4096 tokens in, 64 to 512 out). A request is good when its first token came within
1 s and the 99th percentile of the gaps between its tokens is below 50 ms; one that failed is not, and its first token
came never. How long a colocated worker lets others wait for a prompt is set by its chunk, so several are tried. The
server's processes are started here, or --url names a running one; this process is the client.

    python -m benchmarks.gpu.mixed_load --rates 4 8 12 16
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.client import Answer, Client, random_completion
from benchmarks.gpu.harness import CONFIGS, model_directory, parser, percentile, show
from cluster.launcher import LocalCluster
from cluster.spec import ClusterSpec
from cluster.spec_file import parse_spec

MODES = ["disaggregated", "colocated"]
CHUNKS = {"llama-3-8b": [512, 2048, 8192], "tiny": [64, 512]}
INPUTS = {"llama-3-8b": (512, 4096), "tiny": (32, 256)}
OUTPUTS = {"llama-3-8b": (64, 512), "tiny": (8, 32)}
GOOD_FIRST_TOKEN_S = 1.0
GOOD_GAP_S = 0.05
NUM_WARM = 16
COLUMNS = {
    "mode": "s",
    "chunk": "d",
    "rate/s": ".1f",
    "requests": "d",
    "failed": "d",
    "out tokens/s": ",.0f",
    "all tokens/s": ",.0f",
    "TTFT p50 ms": ".0f",
    "p99": ".0f",
    "ITL p50 ms": ".2f",
    "p99 ms": ".1f",
    "good": ".1%",
    "good/s": ".2f",
}


@dataclass(frozen=True, slots=True)
class Arrival:
    at: float  # seconds after the start
    num_input: int
    num_output: int
    body: bytes


async def main() -> None:
    options = parser(__doc__)
    options.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    options.add_argument("--rates", nargs="+", type=float, default=[4.0, 8.0, 12.0, 16.0], help="requests a second")
    options.add_argument("--duration", type=float, default=20.0, help="seconds of arrivals (default: %(default)s)")
    options.add_argument("--input", nargs=2, type=int, metavar=("LEAST", "MOST"), help="prompt tokens")
    options.add_argument("--output", nargs=2, type=int, metavar=("LEAST", "MOST"), help="tokens to generate")
    options.add_argument(
        "--colocated-chunks", nargs="+", type=int, metavar="TOKENS", help="max_batch_tokens of the colocated worker"
    )
    options.add_argument("--url", help="a running server of this shape; then no process is started")
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    args.input, args.output = args.input or INPUTS[args.config], args.output or OUTPUTS[args.config]
    servers: list[tuple[str, int | None]] = [("given", None)] if args.url else []
    for mode in [] if args.url else args.modes:
        chunks = args.colocated_chunks or CHUNKS[args.config] if mode == "colocated" else [None]
        servers += [(mode, chunk) for chunk in chunks]
    rows = []
    for mode, chunk in servers:
        async with server(args, mode, chunk) as url:
            warm = arrivals(args, NUM_WARM / args.duration)
            await asyncio.gather(*(Client(url).complete(arrival.body) for arrival in warm))
            for rate in args.rates:
                rows.append({"mode": mode, "chunk": chunk, "rate/s": rate, **await measure(url, args, rate)})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)  # a run that is cut short has shown these
    show(args, None, COLUMNS, rows)


@asynccontextmanager
async def server(args: argparse.Namespace, mode: str, chunk: int | None) -> AsyncIterator[str]:
    if args.url:
        yield args.url
        return
    with model_directory(args.config) as model, tempfile.TemporaryDirectory() as folder:
        async with LocalCluster(make_spec(args, mode, chunk, model, Path(folder) / "run")) as cluster:
            yield cluster.url


def make_spec(args: argparse.Namespace, mode: str, chunk: int | None, model: Path, run_dir: Path) -> ClusterSpec:
    return parse_spec(
        {
            "model": str(model),
            "load": "dummy",
            "device": args.device,
            "quantization": args.quantization,
            "kv_cache": {"dtype": args.kv_cache_dtype},
            "scheduler": {"max_batch_tokens": chunk},
            "prefill": {"replicas": 0 if mode == "colocated" else 1},
            "router": {"port": 0},
            "run_dir": str(run_dir),
        }
    )


def arrivals(args: argparse.Namespace, rate: float) -> list[Arrival]:
    """The times of a Poisson process, given how many there are: uniform. The same for the same seed, rate, lengths."""
    rng = random.Random(f"{args.seed} {rate}")
    vocab_size = CONFIGS[args.config]["vocab_size"]
    made = []
    for at in sorted(rng.uniform(0, args.duration) for _ in range(round(rate * args.duration))):
        sizes = rng.randint(*args.input), rng.randint(*args.output)
        made.append(Arrival(at, *sizes, random_completion(rng, vocab_size, *sizes)))
    return made


async def measure(url: str, args: argparse.Namespace, rate: float) -> dict[str, Any]:
    client, plan = Client(url), arrivals(args, rate)
    began = time.perf_counter()

    async def request(arrival: Arrival) -> Answer:
        await asyncio.sleep(began + arrival.at - time.perf_counter())
        return await client.complete(arrival.body)

    answers = await asyncio.gather(*map(request, plan))
    elapsed = time.perf_counter() - began
    done = [(arrival, answer) for arrival, answer in zip(plan, answers, strict=True) if not answer.error]
    first = [float("inf") if answer.error else answer.first_token_s for answer in answers]
    gaps = [gap for _, answer in done for gap in answer.gaps]
    num_good = sum(answer.meets(GOOD_FIRST_TOKEN_S, GOOD_GAP_S) for answer in answers)
    for error in sorted({answer.error for answer in answers if answer.error})[:3]:
        print(f"failed at {rate:g}/s: {error[:200]}")
    return {
        "requests": len(plan),
        "failed": len(plan) - len(done),
        "out tokens/s": sum(arrival.num_output for arrival, _ in done) / elapsed,
        "all tokens/s": sum(arrival.num_input + arrival.num_output for arrival, _ in done) / elapsed,
        "TTFT p50 ms": 1e3 * percentile(first, 0.5),
        "p99": 1e3 * percentile(first, 0.99),
        "ITL p50 ms": 1e3 * percentile(gaps, 0.5),
        "p99 ms": 1e3 * percentile(gaps, 0.99),
        "good": num_good / max(1, len(plan)),
        "good/s": num_good / args.duration,
    }


if __name__ == "__main__":
    asyncio.run(main())
