"""CPU that the HTTP front spends on a request and on each streamed token, with a generator that costs nothing.

The front runs in a process of its own behind uvicorn and uvloop; this process is the client. Two output lengths give
a slope (one token, one delta, one event) and an intercept (parsing, tokenizing, headers, metrics).
"""

import argparse
import asyncio
import json
import multiprocessing
import statistics
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import uvloop
from prometheus_client import CollectorRegistry

from baton.demo_model import demo_model
from engine.executors.base import TokenLogprobs
from engine.request import FinishReason, Request
from router.generation import Delta, ModelCard, Timeline
from router.http import Front, FrontConfig
from router.metrics import Metrics
from router.server import serve
from router.tokenizer import load_tokenizer


class FreeStream:
    """One token a turn of the loop."""

    prompt_logprobs: list[TokenLogprobs] | None = None

    def __init__(self, request: Request) -> None:
        self.timeline = Timeline(received=0.0)
        self._request = request

    async def __aiter__(self) -> AsyncIterator[Delta]:
        params = self._request.params
        for i in range(1, params.max_tokens + 1):
            await asyncio.sleep(0)
            logprobs = [] if params.logprobs is None else [TokenLogprobs(300 + i % 100, -0.5)]
            yield Delta([300 + i % 100], logprobs, FinishReason.LENGTH if i == params.max_tokens else None)

    async def aclose(self) -> None:
        pass


class FreeGenerator:
    ready = True

    def start(self, request: Request, deadline: float) -> FreeStream:  # noqa: ARG002
        return FreeStream(request)


def run_server(checkpoint: str, ports: Connection) -> None:
    tokenizer = load_tokenizer(Path(checkpoint))
    card = ModelCard("bench", tokenizer.vocab_size, 8192, (0,))
    metrics = Metrics(CollectorRegistry(), "bench")
    front = Front(FreeGenerator(), card, tokenizer, metrics, FrontConfig())
    uvloop.run(serve(front, "127.0.0.1", 0, stop=asyncio.Event(), started=ports.send))


async def client(port: int, body: bytes, num_requests: int) -> int:
    """Send requests one after another on one connection; returns the bytes received."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    )
    received = 0
    for _ in range(num_requests):
        writer.write(head % len(body) + body)
        received += len(await reader.readuntil(b"data: [DONE]\n\n\r\n0\r\n\r\n"))
    writer.close()
    return received


async def cpu_per_request(server: psutil.Process, port: int, args: argparse.Namespace, num_tokens: int) -> float:
    fields = {
        "messages": [{"role": "user", "content": "the river " * (args.input // 2)}],
        "max_tokens": num_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if args.logprobs:
        fields["logprobs"] = True
    if args.stop:
        fields["stop"] = ["\n\nUser:", "zzz"]
    body = json.dumps(fields).encode()
    each = max(1, args.requests // args.concurrency)
    before = sum(server.cpu_times()[:2])
    await asyncio.gather(*(client(port, body, each) for _ in range(args.concurrency)))
    return (sum(server.cpu_times()[:2]) - before) / (each * args.concurrency)


async def measure(port: int, server: psutil.Process, args: argparse.Namespace) -> None:
    await cpu_per_request(server, port, args, 16)
    slopes, intercepts = [], []
    for _ in range(args.rounds):
        short = await cpu_per_request(server, port, args, 1)
        long = await cpu_per_request(server, port, args, args.output + 1)
        slopes.append((long - short) / args.output * 1e6)
        intercepts.append(short * 1e6)
    for name, values in (("token", slopes), ("request with one token", intercepts)):
        print(f"{name}: {statistics.median(values):.1f} us of CPU ({min(values):.1f} to {max(values):.1f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=str(demo_model()), help="checkpoint with a tokenizer")
    parser.add_argument("--input", type=int, default=800, help="words in the prompt")
    parser.add_argument("--output", type=int, default=128, help="tokens that the slope is taken over")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--requests", type=int, default=480, help="per measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--logprobs", action="store_true")
    parser.add_argument("--stop", action="store_true", help="with two stop strings")
    args = parser.parse_args()
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(target=run_server, args=(args.model, theirs), daemon=True)
    server.start()
    try:
        asyncio.run(measure(ours.recv(), psutil.Process(server.pid), args))
    finally:
        server.terminate()
        server.join()


if __name__ == "__main__":
    main()
