"""The load generator of `benchmarks.frontend`: clients that each have one request at a time, and what they saw.

`raw` is bare HTTP/1.1, so that the client's own cost stays out of the figures; `openai_client` is what users have.
"""

import asyncio
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import uvloop

WORKER_TIMES = re.compile(rb'"(queued_s|prefill_s|transfer_blocks|exposed_s|decode_s)":([-+.0-9eE]+)')


@dataclass(frozen=True, slots=True)
class Load:
    """`prompts` are dealt out to `num_connections`, each with one request at a time."""

    url: str
    prompts: list[Any]  # texts, or lists of token ids
    num_connections: int
    num_output: int
    stream: bool
    timeline: bool = False  # ask for what the workers' parts took
    poll: bool = False  # never sleep
    model: str | None = None
    quick_acks: bool = False  # for a server that waits for acknowledgements (no TCP_NODELAY)

    def fields(self, prompt: Any) -> dict[str, Any]:
        fields = {"prompt": prompt, "max_tokens": self.num_output, "temperature": 0, "stream": self.stream}
        return fields if self.model is None else {**fields, "model": self.model}


@dataclass(frozen=True, slots=True)
class Measured:
    latencies: list[float]  # seconds, of each request
    elapsed: float
    cpu: float = 0.0  # seconds of the router
    slowdown: float = 1.0  # of its core meanwhile
    firsts: list[float] = field(default_factory=list)  # seconds to the first byte of each answer
    workers: list[dict[str, float]] = field(default_factory=list)  # what theirs took, of each request


class RawConnection(asyncio.Protocol):
    """A bare HTTP/1.1 client on one kept connection: the client's own cost stays out of the latency."""

    def __init__(self, *, quick_acks: bool = False) -> None:
        self.first_at = 0.0
        self._quick_acks = quick_acks
        self._received = bytearray()
        self._answer: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none
        self._acknowledge()

    async def post(self, body: bytes, *, timeline: bool) -> dict[str, float]:
        """Returns what the workers' parts took, when asked for."""
        self._answer = asyncio.get_running_loop().create_future()
        head = (
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"x-baton-timeline: %d\r\ncontent-length: %d\r\n\r\n"
        )
        self.transport.write(head % (timeline, len(body)) + body)
        await self._answer
        if not self._received.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(self._received.decode())
        times = {name.decode(): float(value) for name, value in WORKER_TIMES.findall(self._received) if timeline}
        self._received.clear()
        return times

    def data_received(self, data: bytes) -> None:
        if not self._received:
            self.first_at = time.perf_counter()
        self._received += data
        self._acknowledge()
        if self._answer is not None and not self._answer.done() and self._whole():
            self._answer.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError(f"the router closed the connection: {self._received[-500:]!r}"))

    def _acknowledge(self) -> None:
        if self._quick_acks:  # the kernel forgets it again and again
            connection = self.transport.get_extra_info("socket")
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def _whole(self) -> bool:
        if self._received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            return True
        if len(self._received) > 1 << 16:  # of a long stream the head has been seen
            return False
        head, _, rest = bytes(self._received).partition(b"\r\n\r\n")
        _, found, length = head.lower().partition(b"content-length: ")
        return bool(found) and len(rest) == int(length.partition(b"\r\n")[0])


async def raw(load: Load) -> Measured:
    loop, host = asyncio.get_running_loop(), load.url.removeprefix("http://").rpartition(":")
    connections = [
        (await loop.create_connection(partial(RawConnection, quick_acks=load.quick_acks), host[0], int(host[2])))[1]
        for _ in range(load.num_connections)
    ]
    bodies = iter([json.dumps({**load.fields(prompt), "ignore_eos": True}).encode() for prompt in load.prompts])
    got = Measured([], 0.0)

    async def client(connection: RawConnection) -> None:
        for body in bodies:
            began = time.perf_counter()
            got.workers.append(await connection.post(body, timeline=load.timeline))
            got.latencies.append(time.perf_counter() - began)
            got.firsts.append(connection.first_at - began)
        connection.transport.close()

    async def poll() -> None:
        while True:
            os.sched_yield()  # the workers are on this core, too
            await asyncio.sleep(0)

    began = time.perf_counter()
    polling = asyncio.ensure_future(poll()) if load.poll else None
    await asyncio.gather(*map(client, connections))
    if polling is not None:
        polling.cancel()
    return replace(got, elapsed=time.perf_counter() - began)


async def openai_client(load: Load) -> Measured:
    from openai import AsyncOpenAI

    prompts: Iterator[Any] = iter(load.prompts)
    latencies: list[float] = []
    async with AsyncOpenAI(base_url=f"{load.url}/v1", api_key="none", timeout=300, max_retries=0) as openai:
        name = (await openai.models.list()).data[0].id

        async def client() -> None:
            for prompt in prompts:
                began = time.perf_counter()
                answer: Any = await openai.completions.create(
                    model=name, **load.fields(prompt), extra_body={"ignore_eos": True}
                )
                if load.stream:
                    async for _ in answer:
                        pass
                latencies.append(time.perf_counter() - began)

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(load.num_connections)))
        return Measured(latencies, time.perf_counter() - began)


def generate(client: Any, load: Load) -> Measured:
    """In the load generator's process."""
    return uvloop.run(client(load))
