"""Short prompts that come while long ones are computed: how long their first tokens take when they are as urgent as
those, when they are more urgent (`priority`), and on idle workers; and how long the long ones take.

Prefill and decode on workers of their own, and one worker that does both, on the same card. The server's processes are
started here; this process is the client.

    python -m benchmarks.gpu.urgent
"""

import asyncio
import json
import random
import sys
from collections.abc import Coroutine
from typing import Any

from benchmarks._arguments import positive
from benchmarks.gpu.client import Answer, Client, random_completion
from benchmarks.gpu.harness import CONFIGS, median, parser, show
from benchmarks.gpu.mixed_load import MODES, server

LONG = {"llama-3-8b": 60_000, "tiny": 2_000}
SHORT = {"llama-3-8b": 500, "tiny": 50}
NUM_OUTPUT = 16
COLUMNS = {
    "mode": "s",
    "priority": "s",
    "short ones": "d",
    "TTFT p50 ms": ".0f",
    "most ms": ".0f",
    "long ones": "d",
    "last TTFT s": ".2f",
}


async def main() -> None:
    options = parser(__doc__)
    options.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    options.add_argument("--long", type=positive, help="tokens of a long prompt")
    options.add_argument("--num-long", type=positive, default=3)
    options.add_argument("--num-short", type=positive, default=20)
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    args.url, args.long = None, args.long or LONG[args.config]
    rng = random.Random(args.seed)
    rows: list[dict[str, Any]] = []
    for mode in args.modes:
        async with server(args, mode, None) as url:
            took_s = (await load(args, url, rng, 0, args.num_long))["last TTFT s"]  # warm
            for priority, num_long in ((0, 0), (0, args.num_long), (-1, args.num_long)):
                row = await load(args, url, rng, priority, num_long, took_s)
                name = "idle workers" if not num_long else "the same" if not priority else "more urgent"
                rows.append({"mode": mode, "priority": name, "long ones": num_long, **row})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    show(args, None, COLUMNS, rows)


async def load(
    args: Any, url: str, rng: random.Random, priority: int, num_long: int, seconds: float = 0.0
) -> dict[str, float]:
    """Long prompts at once, and short ones of a priority at random within so many seconds."""
    client, vocab_size = Client(url), CONFIGS[args.config]["vocab_size"]

    def request(num_tokens: int, priority: int, after_s: float) -> Coroutine[None, None, Answer]:
        fields = json.loads(random_completion(rng, vocab_size, num_tokens, NUM_OUTPUT))
        return send(json.dumps({**fields, "priority": priority}).encode(), after_s)

    async def send(body: bytes, after_s: float) -> Answer:
        await asyncio.sleep(after_s)
        return await client.complete(body)

    num_short, size = args.num_short if seconds else 1, SHORT[args.config]
    long = [request(args.long, 0, 0.0) for _ in range(num_long)]
    short = [request(size, priority, rng.uniform(0.1, 0.9) * seconds) for _ in range(num_short)]
    answers = await asyncio.gather(*long, *short)
    failed = {answer.error for answer in answers if answer.error}
    if failed:
        raise SystemExit(f"requests failed: {failed}")
    first = [answer.first_token_s for answer in answers]
    return {
        "short ones": num_short,
        "TTFT p50 ms": 1e3 * median(first[num_long:]),
        "most ms": 1e3 * max(first[num_long:]),
        "last TTFT s": max(first[:num_long], default=0.0),
    }


if __name__ == "__main__":
    asyncio.run(main())
