"""A trace of bursts, in Mooncake's format, on stdout: several requests at once that begin with one new long text, as
those of agents that share a document do, or the parts of one question. No public trace has them.

    python -m benchmarks.burst_trace > bursts.jsonl
    python -m benchmarks.routing --trace bursts.jsonl
"""

import argparse
import json
import random

from benchmarks._arguments import positive
from cluster.simulation.trace import TRACE_BLOCK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bursts", type=positive, default=200)
    parser.add_argument("--requests", type=positive, default=12, help="of a burst")
    parser.add_argument("--shared", type=positive, default=40, help=f"blocks of {TRACE_BLOCK} tokens they begin with")
    parser.add_argument("--gap", type=float, default=10.0, help="seconds from one burst to the next, on average")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.gap > 0:
        parser.error("--gap must be more than 0")
    rng = random.Random(args.seed)
    seconds, block = 0.0, 0
    for _ in range(args.bursts):
        seconds += rng.expovariate(1.0 / args.gap)
        shared = list(range(block, block + args.shared))
        block += args.shared
        for _ in range(args.requests):
            line = {
                "timestamp": round(1000 * seconds),
                "input_length": args.shared * TRACE_BLOCK + rng.randrange(100, TRACE_BLOCK),
                "output_length": rng.randrange(50, 300),
                "hash_ids": [*shared, block],
            }
            block += 1
            print(json.dumps(line))


if __name__ == "__main__":
    main()
