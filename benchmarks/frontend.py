"""What the HTTP front costs: CPU of the router process per request and per output token, latency floor, requests/s.

A whole local cluster runs, started as `baton up` does, with simulated workers that take next to no time. The load
generator is a process of its own: bare HTTP/1.1 connections, and the `openai` client. The router is pinned to one
core, everything else to the others. Prompts are text, all different. The latency floor is measured as Baton decides
by default, where an idle decode worker prefills such a prompt by itself, and then, like everything else, with every
request handed off, for which the router speaks with two workers. Each figure stands beside its target. Targets were
set where NVIDIA Dynamo 1.6.1 took 1.75 ms of CPU a request for the same load, and 3.0 ms a request one at a time.
With `--dynamo` its front and simulated workers run, too, and each row of the bare connections is measured on it next,
on the same core: what the core is worth now, both see. It needs a Python of its own:

    python3 -m venv DIR && DIR/bin/pip install uvloop msgspec pyzmq prometheus-client redis aiohttp certifi tqdm \\
        transformers zstandard pyyaml 'pydantic<2.13.6' && DIR/bin/pip install --no-deps ai-dynamo ai-dynamo-runtime

CPU is that of the router's processes. Latencies depend on what else the machine does; the floor is the median of
requests one after another, as the client sees it, and less what the workers say that they queued, computed and moved.
Beside each figure of the bare connections stands its floor, measured next: what a process on the router's core takes
that only hands the bytes on, at the same pace. A shared machine's cores are fast and slow by turns, so beside each
figure stands how slow the router's core was meanwhile, beside its best during the benchmark, and the figure that this
makes.

    python -m benchmarks.frontend --help
"""

import argparse
import asyncio
import multiprocessing
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from baton.demo_model import demo_model
from benchmarks._arguments import positive
from benchmarks._bare_relay import Relayed, relay_floor
from benchmarks._core_speed import CoreSpeed
from benchmarks._dynamo import dynamo
from benchmarks._load import Load, Measured, generate, openai_client, raw
from cluster.launcher import LocalCluster
from cluster.spec import ClusterSpec
from router.tokenizer import load_tokenizer

TARGET_REQUEST_MS = 1.2
TARGET_TOKEN_US = 10.0
TARGET_FLOOR_MS = 3.0
WORDS = (
    "the",
    "river",
    "wide",
    "a",
    "boat",
    "under",
    "old",
    "bridge",
    "light",
    "of",
    "rain",
    "slowly",
    "turns",
    "stones",
)
NUM_FLOOR = 200  # requests one after another, for the latency floor


class Router:
    """The processes that `baton router` runs as."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._process = psutil.Process(pid)

    def cpu(self) -> float:
        every = [self._process, *self._process.children(recursive=True)]
        return sum(sum(process.cpu_times()[:2]) for process in every)

    def pids(self) -> set[int]:
        return {self._process.pid, *(child.pid for child in self._process.children(recursive=True))}


def pin(pids: set[int], cores: set[int]) -> None:
    for pid in pids:
        for thread in psutil.Process(pid).threads():
            os.sched_setaffinity(thread.id, cores)


@dataclass(frozen=True, slots=True)
class Cores:
    """The router gets the first ones, the workers and this process (and so the load generator) the rest."""

    router: set[int]
    rest: set[int]  # all, where there are no more than the router is to have

    @staticmethod
    def split(num_router: int) -> "Cores":
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) <= num_router:
            return Cores(set(cores), set(cores))
        return Cores(set(cores[:num_router]), set(cores[num_router:]))

    def unpin(self) -> None:
        """What this process starts next sees all cores, as on a machine of its own."""
        pin({os.getpid()}, self.router | self.rest)

    def pin(self, router: Router, cluster: LocalCluster) -> None:
        pin(router.pids(), self.router)
        pin({pid for name, pid in cluster.pids.items() if name != "router"} | {os.getpid()}, self.rest)


def make_spec(args: argparse.Namespace, model: str, run_dir: str, *, hand_off: bool) -> ClusterSpec:
    """`hand_off`: every request, though idle decode workers would do without: two legs in the router."""
    return ClusterSpec.model_validate(
        {
            "model": model,
            "engine": "simulated",
            "run_dir": run_dir,
            "kv_cache": {"num_blocks": 100_000},
            "scheduler": {"max_batch_tokens": 8192, "max_num_seqs": 512},
            "simulated": {
                "prefill_tokens_per_s": 1e9,
                "step_base_s": args.step_ms / 1e3,
                "decode_s_per_sequence": 0.0,
                "vocab_size": load_tokenizer(Path(model)).vocab_size,  # every token has text
            },
            "prefill": {"replicas": args.workers},
            "decode": {"replicas": args.workers},
            "router": {
                "port": 0,
                "workers": args.processes,
                "local_prefill_max_tokens": 0 if hand_off else None,
                "stream_interval": args.stream_interval,
            },
        }
    )


class Prompts:
    """Texts, or lists, of exactly `length` tokens that have nothing in common."""

    def __init__(self, model: str, length: int, *, ids: bool, seed: int) -> None:
        self._tokenizer = load_tokenizer(Path(model))
        self._rng = random.Random(seed)
        self._length = length
        self._ids = ids

    def make(self, count: int) -> list[Any]:
        return [self._one() for _ in range(count)]

    def _one(self) -> Any:
        text = " ".join(self._rng.choices(WORDS, k=self._length))
        ids = self._tokenizer.encode(text)[: self._length]
        return ids if self._ids else self._tokenizer.decode(ids)


class Bench:
    def __init__(
        self,
        url: str,
        router: Router,
        speed: CoreSpeed,
        pool: ProcessPoolExecutor,
        prompts: Prompts,
        *,
        stream: bool,
        poll: bool,
        model: str | None = None,
        peer: "Bench | None" = None,
    ) -> None:
        self._peer = peer
        self._model = model  # of the peer, which must be told
        self._url = url
        self._router = router
        self._speed = speed
        self._pool = pool
        self._prompts = prompts
        self._stream = stream
        self._poll = poll

    async def run(
        self, client: Any, num_connections: int, num_requests: int, num_output: int, *, timeline: bool = False
    ) -> Measured:
        prompts = self._prompts.make(num_requests)
        load = Load(
            self._url,
            prompts,
            num_connections,
            num_output,
            self._stream,
            timeline,
            self._poll,
            self._model,
            quick_acks=self._model is not None,
        )
        before, began = self._router.cpu(), time.monotonic()
        measured = await asyncio.get_running_loop().run_in_executor(self._pool, partial(generate, client, load))
        cpu = self._router.cpu() - before
        return replace(measured, cpu=cpu, slowdown=self._speed.slowdown(began, time.monotonic()))

    async def relay(self, num_connections: int, num_output: int, answer_s: float) -> Relayed:
        """What bare relaying costs where an answer takes `answer_s`."""
        cores = os.sched_getaffinity(self._router.pid)
        return await relay_floor(num_connections, num_output, answer_s / num_output, cores, self._pool)

    async def at(self, name: str, client: Any, num_connections: int, num_requests: int, num_output: int) -> None:
        got = await self.run(client, num_connections, num_requests, num_output)
        each_ms = 1e3 * got.cpu / num_requests
        ranked = sorted(got.latencies)
        print(
            f"{name:>7} {num_connections:4d} connections: {each_ms:5.2f} ms CPU a request "
            f"({each_ms / TARGET_REQUEST_MS:4.2f} of the target {TARGET_REQUEST_MS}), "
            f"{_at_best(each_ms, got.slowdown)}, {num_requests / got.elapsed:5.0f} requests/s, "
            f"p50 {1e3 * statistics.median(ranked):6.2f} ms, p99 {1e3 * ranked[int(0.99 * len(ranked))]:6.2f} ms",
            end="\n" if client is not raw else "",
            flush=True,
        )
        if client is raw:
            relay = await self.relay(num_connections, num_output, statistics.median(ranked))
            print(f"; bare relay {1e3 * relay.cpu:.2f} ms CPU a request", flush=True)
            if self._peer is not None:
                theirs = await self._peer.run(raw, num_connections, num_requests, num_output)
                their_ms, their_p50 = 1e3 * theirs.cpu / num_requests, 1e3 * statistics.median(theirs.latencies)
                print(
                    f" Dynamo {num_connections:4d} connections: {their_ms:5.2f} ms CPU a request, of which Baton takes "
                    f"{each_ms / their_ms:.2f}; {_at_best(their_ms, theirs.slowdown)}, "
                    f"{num_requests / theirs.elapsed:.0f} requests/s, p50 {their_p50:.2f} ms",
                    flush=True,
                )

    async def floor(self, num_output: int) -> None:
        got = await self.run(raw, 1, NUM_FLOOR, num_output, timeline=True)
        num_handed = sum(times["transfer_blocks"] > 0 for times in got.workers)
        print(f"{NUM_FLOOR} requests one after another, {num_handed} handed off", flush=True)
        prefill = [times["queued_s"] + times["prefill_s"] for times in got.workers]
        computed = [
            waited + times["exposed_s"] + times["decode_s"] for waited, times in zip(prefill, got.workers, strict=True)
        ]
        for name, latencies, theirs in (
            ("first byte", got.firsts, prefill if self._stream else computed),
            ("whole answer", got.latencies, computed),
        ):
            front = [latency - worker for latency, worker in zip(latencies, theirs, strict=True)]
            seen_ms, front_ms = (1e3 * statistics.median(values) for values in (latencies, front))
            print(
                f"latency floor, {name}: {seen_ms:.2f} ms, less the workers' time {front_ms:.2f} ms "
                f"({front_ms / TARGET_FLOOR_MS:.2f} of the target {TARGET_FLOOR_MS}), "
                f"{_at_best(front_ms, got.slowdown)}",
                flush=True,
            )
        relay = await self.relay(1, num_output, statistics.median(computed))
        print(f"bare relay, whole answer: {1e3 * relay.latency:.2f} ms", flush=True)
        if self._peer is not None:
            peers = await self._peer.run(raw, 1, NUM_FLOOR, num_output)
            first_ms, whole_ms = (1e3 * statistics.median(values) for values in (peers.firsts, peers.latencies))
            print(
                f"Dynamo with its workers' time, all tokens in one step: first byte {first_ms:.2f} ms, whole answer "
                f"{whole_ms:.2f} ms; {_at_best(whole_ms, peers.slowdown)}",
                flush=True,
            )

    async def token(self, num_connections: int, short: int, long: int) -> None:
        """The slope between answers of two lengths."""
        token_us, many = await self._token_us(num_connections, short, long)
        per_second = 2 * num_connections * long / many.elapsed
        relay = await self.relay(num_connections, long, long * num_connections / per_second)
        floor_us = 1e6 * relay.cpu / long
        print(
            f"long streams, {num_connections} connections, {long} tokens: {token_us:.1f} us CPU an output token "
            f"({token_us / TARGET_TOKEN_US:.2f} of the target {TARGET_TOKEN_US:.0f}), "
            f"{_at_best(token_us, many.slowdown)}, {per_second:.0f} tokens/s; "
            f"bare relay {floor_us:.1f} us ({token_us / floor_us:.1f} times that)",
            flush=True,
        )
        if self._peer is not None:
            their_us, theirs = await self._peer._token_us(num_connections, short, long)
            print(
                f"     Dynamo, {num_connections} connections: {their_us:.1f} us, of which Baton takes "
                f"{token_us / their_us:.2f}; {_at_best(their_us, theirs.slowdown)}, "
                f"{2 * num_connections * long / theirs.elapsed:.0f} tokens/s",
                flush=True,
            )

    async def _token_us(self, num_connections: int, short: int, long: int) -> tuple[float, Measured]:
        """CPU, and the run with the long answers."""
        few = await self.run(raw, num_connections, 2 * num_connections, short)
        many = await self.run(raw, num_connections, 2 * num_connections, long)
        return 1e6 * (many.cpu - few.cpu) / (2 * num_connections * (long - short)), many


def _at_best(figure: float, slowdown: float) -> str:
    return f"{figure / slowdown:.2f} at the core's best (now {slowdown:.2f} times as slow)"


async def measure_floor(bench: Bench, num_output: int) -> None:
    await bench.run(raw, 8, 200, num_output)  # warm
    await bench.floor(num_output)


async def measure(bench: Bench, args: argparse.Namespace) -> None:
    await measure_floor(bench, args.output)
    for num_connections in args.connections:
        await bench.at("raw", raw, num_connections, min(args.requests, 400 * num_connections), args.output)
    for num_connections in () if args.raw_only else args.connections:
        await bench.at("openai", openai_client, num_connections, min(args.requests // 3, 1024), args.output)
    # In real answers a few thousand tokens are most of them; here each is as likely as any other to be new.
    await bench.run(raw, 64, 128, args.long)
    for num_connections in (several for several in args.connections if several > 1):
        await bench.token(num_connections, args.output, args.long)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint whose tokenizer the router loads; the demo's if not given")
    parser.add_argument("--input", type=positive, default=865, help="prompt tokens")
    parser.add_argument("--output", type=positive, default=16, help="output tokens")
    parser.add_argument("--long", type=positive, default=512, help="output tokens of the long streams")
    parser.add_argument("--requests", type=positive, default=3000, help="in each row, fewer where they take longer")
    parser.add_argument("--connections", type=positive, nargs="+", default=[1, 64, 512])
    parser.add_argument("--workers", type=positive, default=1, help="workers of each role")
    parser.add_argument("--processes", type=positive, default=1, help="router.workers; the router gets as many cores")
    parser.add_argument("--stream-interval", type=positive, default=1, help="router.stream_interval")
    parser.add_argument("--step-ms", type=float, default=0.0, help="time of a worker's step")
    parser.add_argument("--ids", action="store_true", help="send token ids in place of text")
    parser.add_argument("--whole", action="store_true", help="answers in one body, not streams")
    parser.add_argument("--raw-only", action="store_true", help="without the openai client")
    parser.add_argument(
        "--poll",
        action="store_true",
        help="the raw client polls its connections: waking its core, which a client elsewhere has not, costs nothing",
    )
    parser.add_argument("--dynamo", metavar="PYTHON", help="a Python that has ai-dynamo: measure it beside each row")
    parser.add_argument("--dynamo-tokenizer", choices=("default", "fastokens"), default="default")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.long <= args.output:
        parser.error(f"--long must be more than --output ({args.output}): a token's cost is the difference")
    model = args.model or str(demo_model())
    cores = Cores.split(args.processes)
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
        CoreSpeed(cores.router) as speed,
    ):
        prompts = Prompts(model, args.input, ids=args.ids, seed=args.seed)
        make_bench = partial(Bench, speed=speed, pool=pool, prompts=prompts, stream=not args.whole, poll=args.poll)
        form = f"{'ids' if args.ids else 'text'}, {'whole' if args.whole else 'streamed'}"
        pools = f"{args.workers}P{args.workers}D, Python {platform.python_version()}"
        print(f"{args.input} tokens in ({form}), {args.output} out, {pools}")

        @asynccontextmanager
        async def cluster_bench(name: str, *, hand_off: bool, peer: Bench | None) -> AsyncIterator[Bench]:
            cores.unpin()
            async with LocalCluster(make_spec(args, model, str(Path(scratch) / name), hand_off=hand_off)) as cluster:
                router = Router(cluster.pids["router"])
                cores.pin(router, cluster)
                yield make_bench(cluster.url, router, peer=peer)

        print("by default, where an idle decode worker prefills by itself:")
        async with cluster_bench("default", hand_off=False, peer=None) as bench:
            await measure_floor(bench, args.output)
        print("with every request handed off:")
        async with AsyncExitStack() as peers:
            peer = None
            if args.dynamo:
                url, pid = await peers.enter_async_context(
                    dynamo(
                        args.dynamo,
                        model,
                        Path(scratch),
                        front=cores.router,
                        rest=cores.rest,
                        tokenizer=args.dynamo_tokenizer,
                    )
                )
                peer = make_bench(url, Router(pid), model=model)
                await peer.run(raw, 8, 200, args.output)  # warm
            await measure(await peers.enter_async_context(cluster_bench("handed-off", hand_off=True, peer=peer)), args)


if __name__ == "__main__":
    asyncio.run(main())
