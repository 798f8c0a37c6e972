"""Requests that come at once and begin with one long text that nobody has sent before, as those of agents that share a
document do: how long their first tokens take beside one such request alone, and how many tokens are computed for them
beside the fewest that can be.

Prefill and decode on workers of their own, and one worker that does both, on the same card. Each burst has a new text;
the best of `--rounds`. The server's processes are started here; this process is the client.

    python -m benchmarks.gpu.bursts --sizes 1 4 16
"""

import asyncio
import json
import random
import secrets
import sys
from typing import Any

from benchmarks.gpu.client import Client
from benchmarks.gpu.harness import CONFIGS, median, parser, show
from benchmarks.gpu.mixed_load import MODES, server

SHARED = {"llama-3-8b": 16_000, "tiny": 640}
OWN_TOKENS = 200
NUM_OUTPUT = 16
COLUMNS = {
    "mode": "s",
    "requests": "d",
    "TTFT p50 ms": ".0f",
    "last ms": ".0f",
    "times alone": ".2f",
    "computed tokens": ",.0f",
    "times the fewest": ".2f",
}


async def main() -> None:
    options = parser(__doc__)
    options.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    options.add_argument("--sizes", nargs="+", type=int, default=[1, 4, 16], help="requests of a burst")
    options.add_argument("--shared", type=int, help="tokens they begin with")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    args.url, args.shared = None, args.shared or SHARED[args.config]
    rng = random.Random(args.seed)
    rows: list[dict[str, Any]] = []
    for mode in args.modes:
        async with server(args, mode, None) as url:
            await burst(args, url, rng, 2)  # warm
            alone_ms = min([(await burst(args, url, rng, 1))["last ms"] for _ in range(args.rounds)])
            for size in args.sizes:
                rounds = [await burst(args, url, rng, size) for _ in range(args.rounds)]
                best = min(rounds, key=lambda each: float(each["last ms"]))
                rows.append({"mode": mode, "requests": size, "times alone": best["last ms"] / alone_ms, **best})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    show(args, None, COLUMNS, rows)


async def burst(args: Any, url: str, rng: random.Random, size: int) -> dict[str, float]:
    vocab_size = CONFIGS[args.config]["vocab_size"]
    shared = rng.choices(range(vocab_size), k=args.shared)
    salt = secrets.token_hex(8)
    bodies = [
        json.dumps(
            {
                "prompt": shared + rng.choices(range(vocab_size), k=OWN_TOKENS),
                "max_tokens": NUM_OUTPUT,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "cache_salt": salt,
            }
        ).encode()
        for _ in range(size)
    ]
    answers = await asyncio.gather(*map(Client(url).complete, bodies))
    failed = {answer.error for answer in answers if answer.error}
    if failed:
        raise SystemExit(f"requests failed: {failed}")
    first = [1e3 * answer.first_token_s for answer in answers]
    computed = sum(args.shared + OWN_TOKENS - answer.timeline["cached_tokens"] for answer in answers)
    fewest = args.shared + size * OWN_TOKENS
    return {
        "TTFT p50 ms": median(first),
        "last ms": max(first),
        "computed tokens": computed,
        "times the fewest": computed / fewest,
    }


if __name__ == "__main__":
    asyncio.run(main())
