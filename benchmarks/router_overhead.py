"""Router cost over simulated workers: CPU per request, requests/s, and the latency floor at one connection.

A whole local cluster runs (router, prefill and decode processes, real handoffs), with workers that take next to no
time, so that what is measured is the router. Peer figures for the same load on two CPU cores (865 tokens in, 16 out):
NVIDIA Dynamo 1.6.1 takes 1.75 ms of CPU a request, and 3.0 ms a request one at a time with a client that
acknowledges at once.
"""

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path

import httpx
import psutil

from cluster.launcher import LocalCluster
from cluster.spec import ClusterSpec

DYNAMO_CPU_MS = 1.75
DYNAMO_FLOOR_MS = 3.0


def make_spec(model: str, workers: int, run_dir: str) -> ClusterSpec:
    return ClusterSpec.model_validate(
        {
            "model": model,
            "engine": "simulated",
            "run_dir": run_dir,
            "kv_cache": {"num_blocks": 20_000},
            "scheduler": {"max_batch_tokens": 8192, "max_num_seqs": 256},
            "simulated": {"prefill_tokens_per_s": 1e9, "step_base_s": 0.0, "decode_s_per_sequence": 0.0},
            "prefill": {"replicas": workers},
            "decode": {"replicas": workers},
            "router": {"port": 0},
        }
    )


def router_process() -> psutil.Process:
    for child in psutil.Process().children(recursive=True):
        if "router" in child.cmdline():
            return child
    raise SystemExit("no router process found")


async def one_request(client: httpx.AsyncClient, body: dict[str, object]) -> None:
    response = await client.post("/v1/completions", json=body)
    response.raise_for_status()


async def measure(url: str, args: argparse.Namespace) -> None:
    rng = random.Random(args.seed)

    def body() -> dict[str, object]:
        prompt = [rng.randrange(10, 500) for _ in range(args.input)]
        return {"model": "", "prompt": prompt, "max_tokens": args.output, "ignore_eos": True, "temperature": 0}

    limits = httpx.Limits(max_connections=args.connections, max_keepalive_connections=args.connections)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        bodies = [body() | {"model": model} for _ in range(args.requests)]
        for warm in bodies[:20]:
            await one_request(client, warm)
        floor = []
        for each in bodies[20:120]:
            began = time.perf_counter()
            await one_request(client, each)
            floor.append(time.perf_counter() - began)
        router = router_process()
        rest = iter(bodies[120:])
        before, began = sum(router.cpu_times()[:2]), time.perf_counter()

        async def worker() -> None:
            for each in rest:
                await one_request(client, each)

        await asyncio.gather(*(worker() for _ in range(args.connections)))
        elapsed, cpu = time.perf_counter() - began, sum(router.cpu_times()[:2]) - before
    count = args.requests - 120
    cpu_ms, floor_ms = 1e3 * cpu / count, 1e3 * statistics.median(floor)
    print(f"{args.input} tokens in, {args.output} out, {args.connections} connections, {args.workers}P{args.workers}D")
    for what, value, peer in (
        ("router CPU per request", cpu_ms, DYNAMO_CPU_MS),
        ("one connection, median", floor_ms, DYNAMO_FLOOR_MS),
    ):
        print(f"{what}   {value:7.2f} ms   ({value / peer:.2f} x Dynamo's {peer} ms)")
    print(f"throughput               {count / elapsed:7.0f} requests/s (client, router and workers share the cores)")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint directory; only its tokenizer and sizes are used")
    parser.add_argument("--input", type=int, default=865, help="prompt tokens")
    parser.add_argument("--output", type=int, default=16, help="output tokens")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1, help="workers of each role")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as run_dir:
        spec = make_spec(args.model, args.workers, str(Path(run_dir) / "run"))
        async with LocalCluster(spec) as cluster:
            await measure(cluster.url, args)


if __name__ == "__main__":
    asyncio.run(main())
