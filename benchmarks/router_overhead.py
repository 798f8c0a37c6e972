"""Router cost over simulated workers: CPU per request, requests/s, and the latency floor at one connection.

A whole local cluster runs (router, prefill and decode processes, real handoffs), with workers that take next to no
time, so that what is measured is the router. Peer figures for the same load on two CPU cores (865 tokens in, 16 out):
NVIDIA Dynamo 1.6.1 takes 1.75 ms of CPU a request, and 3.0 ms a request one at a time with a client that
acknowledges at once.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import psutil

from baton.demo_model import demo_model
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


class Connection:
    """A bare HTTP/1.1 client on one kept connection: the client's own cost stays out of the latency."""

    async def open(self, url: str) -> "Connection":
        host, _, port = url.removeprefix("http://").rpartition(":")
        self._reader, self._writer = await asyncio.open_connection(host, int(port))
        return self

    async def post(self, path: str, body: bytes) -> bytes:
        head = (
            f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        self._writer.write(head.encode() + body)
        answer = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        length = int(answer.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        content = await self._reader.readexactly(length)
        if not answer.startswith(b"http/1.1 200"):
            raise SystemExit(content.decode())
        return content

    def close(self) -> None:
        self._writer.close()


def bodies(args: argparse.Namespace) -> list[bytes]:
    rng = random.Random(args.seed)
    fixed = {"max_tokens": args.output, "ignore_eos": True, "temperature": 0}
    prompts = ([rng.randrange(10, 500) for _ in range(args.input)] for _ in range(args.requests))
    return [json.dumps({"prompt": prompt, **fixed}).encode() for prompt in prompts]


async def measure(url: str, args: argparse.Namespace) -> None:
    connections = [await Connection().open(url) for _ in range(args.connections)]
    requests = bodies(args)
    for body in requests[:20]:
        await connections[0].post("/v1/completions", body)
    floor = []
    for body in requests[20:120]:
        began = time.perf_counter()
        await connections[0].post("/v1/completions", body)
        floor.append(time.perf_counter() - began)
    router, rest = router_process(), iter(requests[120:])
    before, began = sum(router.cpu_times()[:2]), time.perf_counter()

    async def client(connection: Connection) -> None:
        for body in rest:
            await connection.post("/v1/completions", body)
        connection.close()

    await asyncio.gather(*map(client, connections))
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
    parser.add_argument("--model", help="checkpoint whose tokenizer the router loads; the demo's if not given")
    parser.add_argument("--input", type=int, default=865, help="prompt tokens")
    parser.add_argument("--output", type=int, default=16, help="output tokens")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1, help="workers of each role")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as run_dir:
        model = args.model or str(demo_model())
        spec = make_spec(model, args.workers, str(Path(run_dir) / "run"))
        async with LocalCluster(spec) as cluster:
            await measure(cluster.url, args)


if __name__ == "__main__":
    asyncio.run(main())
