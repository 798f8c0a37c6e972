"""What moving KV costs: the transfer time that prefill does not hide, and by how much a prefill and a running decode
batch slow down while it runs. One prefill and one decode worker, which share the card where there is one.

Prefills with a transfer take turns with the same prefills without (they ask for one token, so nobody decodes). First
one at a time, with nothing else: the hidden share, and the prefill's slow-down. Then three at a time, without a pause,
while --decodes sequences decode: their rate beside prefills that move KV against prefills that do not. The contexts of
the decoding sequences are spread evenly, and windows come in the order without, with, with, without, so that it makes
no difference how the contexts grow.

    python -m benchmarks.gpu.handoff
"""

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.client import Answer, Client, random_completion
from benchmarks.gpu.harness import CONFIGS, model_directory, parser, show
from benchmarks.gpu.harness import median as middle
from cluster.launcher import LocalCluster
from cluster.spec_file import parse_spec

LENGTHS = {"llama-3-8b": [2048, 8192, 32768], "tiny": [256, 1024]}
DECODE_INPUT = 32  # short enough for the decode worker to prefill it by itself
DECODE_OUTPUT = {"llama-3-8b": 2048, "tiny": 256}
WINDOWS = ("without", "with", "with", "without")  # of a round
NUM_AT_ONCE = 3  # prefills: the prefill worker always has one, also while a client waits for a second token
TOKENS = {"without": 1, "with": 2}  # that a prefill asks for, without and with a transfer
COLUMNS = {
    "prompt": ",d",
    "prefill ms": ".1f",
    "with ms": ".1f",
    "slower": ".1%",
    "MiB": ",.0f",
    "over": "s",
    "transfer ms": ".2f",
    "not hidden ms": ".2f",
    "share": ".1%",
    "decode/s": ",.0f",
    "with/s": ",.0f",
    "slowed": ".1%",
    "alone/s": ",.0f",
}


async def main() -> None:
    options = parser(__doc__)
    options.add_argument("--lengths", nargs="+", type=int, help="prompt tokens (default: those of the shape)")
    options.add_argument("--decodes", type=int, default=64, help="sequences that decode meanwhile (0: none)")
    options.add_argument("--rounds", type=int, default=5, help="of each kind, medians count (default: %(default)s)")
    options.add_argument("--window", type=float, default=1.0, help="seconds of a decode rate, at least two prefills")
    options.add_argument("--transport", default="auto", help="transfer.transport of the spec (default: %(default)s)")
    args = options.parse_args()
    rows = []
    async with server(args) as url:
        for length in args.lengths or LENGTHS[args.config]:
            load = Load(Client(url), args, length)
            row = await alone(load)
            if args.decodes:
                async with load.decoding():
                    row |= await beside_decodes(load, max(args.window, 2e-3 * row["prefill ms"]))
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)  # a run that is cut short has shown these
    show(args, None, COLUMNS, rows)


@contextlib.asynccontextmanager
async def server(args: argparse.Namespace) -> AsyncIterator[str]:
    with model_directory(args.config) as model, tempfile.TemporaryDirectory() as folder:
        fields = {
            "model": str(model),
            "load": "dummy",
            "device": args.device,
            "quantization": args.quantization,
            "kv_cache": {"dtype": args.kv_cache_dtype},
            "transfer": {"transport": args.transport},
            "router": {"port": 0, "local_prefill_max_tokens": DECODE_INPUT},
            "run_dir": str(Path(folder) / "run"),
        }
        async with LocalCluster(parse_spec(fields)) as cluster:
            yield cluster.url


class Load:
    """Prefills of one length, and sequences that decode beside them; counts the tokens of those."""

    def __init__(self, client: Client, args: argparse.Namespace, length: int) -> None:
        self.args = args
        self.length = length
        self._client = client
        self._rng = random.Random(length)
        self._vocab_size = CONFIGS[args.config]["vocab_size"]
        self._running: set[Answer] = set()
        self._num_ended = 0  # tokens of decodes that are over

    async def prefill(self, kind: str) -> dict[str, Any]:
        """Its timeline."""
        body = random_completion(self._rng, self._vocab_size, self.length, TOKENS[kind])
        answer = await self._client.complete(body)
        if answer.error:
            raise SystemExit(f"a prefill of {self.length} tokens failed: {answer.error}")
        timeline = answer.timeline
        if not timeline["prefill_worker"] or (timeline["transfer_bytes"] > 0) != (kind == "with"):
            raise SystemExit(f"the prefill did not go the way it was meant to: {timeline}")
        return timeline

    async def prefills_until(self, kind: str, end: float) -> None:
        while time.perf_counter() < end:
            await self.prefill(kind)

    @contextlib.asynccontextmanager
    async def decoding(self) -> AsyncIterator[None]:
        """Every one of them has its first token on entering."""
        num = self.args.decodes
        output = DECODE_OUTPUT[self.args.config]
        tasks = [asyncio.create_task(self._decode(DECODE_INPUT + output * i // num)) for i in range(num)]
        try:
            while sum(bool(answer.times) for answer in self._running) < num:
                await asyncio.sleep(0.05)
                for task in tasks:
                    if task.done():
                        task.result()
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._running.clear()

    async def _decode(self, num_input: int) -> None:
        """One after the other, of one length. The first begins where another would be by now."""
        end = DECODE_INPUT + DECODE_OUTPUT[self.args.config]
        while True:
            body = random_completion(self._rng, self._vocab_size, num_input, end - num_input)
            num_input = DECODE_INPUT
            answer = Answer()
            self._running.add(answer)
            await self._client.complete(body, answer)
            if answer.error:
                raise SystemExit(f"a decoding sequence failed: {answer.error}")
            self._running.discard(answer)
            self._num_ended += len(answer.times)

    @property
    def num_decoded(self) -> int:
        return self._num_ended + sum(len(answer.times) for answer in self._running)


async def alone(load: Load) -> dict[str, Any]:
    for kind in TOKENS:  # warm
        await load.prefill(kind)
    plain, moved = [], []
    for _ in range(load.args.rounds):
        plain.append(await load.prefill("without"))
        moved.append(await load.prefill("with"))
    before, after = (middle([timeline["prefill_s"] for timeline in each]) for each in (plain, moved))
    transfer, exposed = (middle([timeline[name] for timeline in moved]) for name in ("transfer_s", "exposed_s"))
    return {
        "prompt": load.length,
        "prefill ms": 1e3 * before,
        "with ms": 1e3 * after,
        "slower": after / before - 1,
        "MiB": moved[0]["transfer_bytes"] / 2**20,
        "over": moved[0]["transport"],
        "transfer ms": 1e3 * transfer,
        "not hidden ms": 1e3 * exposed,
        "share": exposed / transfer,
    }


async def beside_decodes(load: Load, window_s: float) -> dict[str, Any]:
    alone_rates, without, moved, slowed = [], [], [], []
    for _ in range(load.args.rounds):
        alone_rates.append(await decode_rate(load, "alone", window_s))
        rates: dict[str, list[float]] = {kind: [] for kind in TOKENS}
        for kind in WINDOWS:
            rates[kind].append(await decode_rate(load, kind, window_s))
        without += rates["without"]
        moved += rates["with"]
        slowed.append(1 - sum(rates["with"]) / sum(rates["without"]))
    return {
        "alone/s": middle(alone_rates),
        "decode/s": middle(without),
        "with/s": middle(moved),
        "slowed": middle(slowed),
        "each": slowed,
    }


async def decode_rate(load: Load, kind: str, window_s: float) -> float:
    """Tokens a second of all decoding sequences while prefills of this kind run."""
    before, began = load.num_decoded, time.perf_counter()
    end = began + window_s
    num_at_once = 0 if kind == "alone" else NUM_AT_ONCE
    prefills = [asyncio.create_task(load.prefills_until(kind, end)) for _ in range(num_at_once)]
    await asyncio.sleep(end - time.perf_counter())
    rate = (load.num_decoded - before) / (time.perf_counter() - began)
    await asyncio.gather(*prefills)
    return rate


if __name__ == "__main__":
    asyncio.run(main())
