"""A Mooncake trace whose requests have tenants, or of which some are urgent, on stdout.

Who sends a request, and whether it is urgent, is drawn at random; `baton simulate` reports what becomes of each.

    python -m benchmarks.tenant_trace conversation_trace.jsonl --tenants large=8 b=1 c=1 > tenants.jsonl
    python -m benchmarks.tenant_trace conversation_trace.jsonl --urgent 0.1 --urgent-ttft-ms 2000 > urgent.jsonl
    baton simulate spec.yaml --trace tenants.jsonl --rate-scale 10
"""

import argparse
import json
import math
import random
from pathlib import Path

from benchmarks._arguments import positive


def share(text: str) -> tuple[str, float]:
    name, _, weight = text.rpartition("=")
    try:
        if 0 < float(weight) < math.inf:
            return name, float(weight)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text} is not allowed; allowed: a name, =, and a number above 0")


def part(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed; allowed: from 0 to 1")
    return float(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--tenants", type=share, nargs="+", default=[], metavar="NAME=WEIGHT")
    parser.add_argument("--urgent", type=part, default=0.0, help="part of the requests that has priority -1")
    parser.add_argument("--urgent-ttft-ms", type=positive, help="their limit, by which routers refuse them")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    names, weights = zip(*args.tenants, strict=True) if args.tenants else ((), ())
    try:
        lines = args.trace.read_text(encoding="utf-8").splitlines()
        requests = [dict(json.loads(line)) for line in lines if line.strip()]
    except (OSError, ValueError, TypeError) as error:
        parser.error(f"{args.trace} is no Mooncake trace: {error}")
    for fields in requests:
        if names:
            (fields["tenant"],) = rng.choices(names, weights)
        if rng.random() < args.urgent:
            fields["priority"] = -1
            if args.urgent_ttft_ms:
                fields["slo_ttft_ms"] = args.urgent_ttft_ms
        print(json.dumps(fields))


if __name__ == "__main__":
    main()
