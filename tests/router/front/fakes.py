"""A scripted generator behind a real front on a real port."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from engine.executors.base import TokenLogprobs
from engine.request import FinishReason, Request
from router.generation import NO_HINTS, Delta, GenerationStream, LoneTokens, ModelCard, RouteHints, Timeline
from router.http import Front, FrontConfig
from router.metrics import Metrics
from router.server import ServerConfig, serve
from router.tokenizer import Tokenizer

MODEL = "org/tiny"
Step = Delta | Exception | asyncio.Event
Script = Callable[[Request], Sequence[Step]]


class FakeStream:
    """Plays a script: deltas are yielded, exceptions raised, events waited for."""

    def __init__(self, request: Request, steps: Sequence[Step]) -> None:
        self.request = request
        self.timeline = Timeline(received=1.0)
        self.prompt_logprobs: list[TokenLogprobs] | None = None
        self.closed = asyncio.Event()
        self.num_yielded = 0
        self._steps = steps
        self._deltas = self._play()

    async def forward(
        self,
        take: Callable[[Delta], bool],
        lone: LoneTokens | None = None,
        *,
        interval: int = 1,
    ) -> bool:
        held = None
        async for delta in self._deltas:
            if held is not None:
                delta = Delta(held.token_ids + delta.token_ids, held.logprobs + delta.logprobs, delta.finish_reason)
            held = delta
            if self.num_yielded > 1 and len(delta.token_ids) < interval and delta.finish_reason is None:
                continue
            held = None
            alone = self.num_yielded > 1 and len(delta.token_ids) == 1 and not delta.logprobs
            if lone is not None and alone and delta.finish_reason is None:  # as the dispatcher's streams do
                more = lone.take(delta.token_ids[0])
            else:
                more = take(delta)
            if not more:
                await asyncio.sleep(0)  # as there, the consumer goes on in another turn of the loop
                return True
        return False

    async def _play(self) -> AsyncIterator[Delta]:
        top = self.request.params.prompt_logprobs
        if top is not None:
            self.prompt_logprobs = [scored(token, top) for token in self.request.token_ids[1:]]
        self.timeline.dispatched, self.timeline.cached_tokens = 1.5, 3
        for step in self._steps:
            if isinstance(step, Exception):
                raise step
            if isinstance(step, asyncio.Event):
                await step.wait()
                continue
            self.num_yielded += 1
            yield step
            if self.closed.is_set():
                return

    def open_lane(self, events: object, descriptor: int) -> None:
        pass

    def close_lane(self) -> None:
        pass

    async def aclose(self) -> None:
        self.closed.set()


@dataclass
class FakeGenerator:
    """`script` says what each request yields."""

    script: Script
    ready: bool = True
    streams: list[FakeStream] = field(default_factory=list)
    refuse: Exception | None = None
    hints: list[RouteHints] = field(default_factory=list)

    def start(
        self,
        request: Request,
        deadline: float,  # noqa: ARG002
        hints: RouteHints = NO_HINTS,
    ) -> GenerationStream:
        if self.refuse is not None:
            raise self.refuse
        self.hints.append(hints)
        stream = FakeStream(request, self.script(request))
        self.streams.append(stream)
        return stream


def scored(token: int, top: int, logprob: float = -0.5) -> TokenLogprobs:
    return TokenLogprobs(token, logprob, tuple((token + i, logprob - i) for i in range(top)))


def saying(tokenizer: Tokenizer, text: str, reason: FinishReason = FinishReason.LENGTH) -> Script:
    """Each request yields the text token by token, with logprobs when asked for."""

    def script(request: Request) -> list[Step]:
        ids = tokenizer.encode(text)
        top = request.params.logprobs
        return [
            Delta([token], [] if top is None else [scored(token, top)], reason if i == len(ids) else None)
            for i, token in enumerate(ids, start=1)
        ]

    return script


@dataclass
class Running:
    port: int
    generator: FakeGenerator
    tokenizer: Tokenizer
    front: Front
    metrics: Metrics

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def raw(self, data: bytes) -> tuple[int, dict[str, str], bytes]:
        """Send bytes as they are; the answer's status, headers and body up to the connection's end."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(data)
            return await read_answer(reader)
        finally:
            writer.close()

    async def post(self, path: str, body: Any, *headers: str) -> tuple[int, dict[str, str], Any]:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", *headers]
        head = "\r\n".join([*lines, f"content-length: {len(content)}", "connection: close"]) + "\r\n\r\n"
        status, answer_headers, answer = await self.raw(head.encode() + content)
        return status, answer_headers, json.loads(answer) if "json" in answer_headers["content-type"] else answer

    async def get(self, path: str, *headers: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
        return await self.raw("\r\n".join([f"{method} {path} HTTP/1.1", "host: x", *headers, "", ""]).encode())

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)


async def until(condition: Callable[[], Any]) -> None:
    """Let the loop turn until the condition holds."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - conditions here are of objects that have no event to wait for
            await asyncio.sleep(0)


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    async with asyncio.timeout(20):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        status, *lines = head.rstrip().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        if "content-length" in headers:
            return int(status.split()[1]), headers, await reader.readexactly(int(headers["content-length"]))
        return int(status.split()[1]), headers, unchunked(await reader.read())


def unchunked(data: bytes) -> bytes:
    """The body of a chunked answer; without its terminator when the connection was cut."""
    parts = []
    while data:
        size, _, rest = data.partition(b"\r\n")
        parts.append(rest[: int(size, 16)])
        data = rest[int(size, 16) + 2 :]
        if int(size, 16) == 0:
            return b"".join(parts)
    return b"".join([*parts, b"<cut>"])


@asynccontextmanager
async def running(
    tokenizer: Tokenizer,
    script: Script,
    *,
    config: FrontConfig | None = None,
    limits: ServerConfig | None = None,
    max_model_len: int = 256,
    draw_bits: Callable[[int], int] = lambda bits: 7 if bits == 64 else 11,
    give_up: Callable[[], Awaitable[None]] | None = None,
) -> AsyncIterator[Running]:
    generator = FakeGenerator(script)
    card = ModelCard(MODEL, 512, max_model_len, (0, 1), aliases=("tiny",))
    metrics = Metrics(MODEL)
    front = Front(generator, card, tokenizer, metrics, config or FrontConfig(), draw_bits=draw_bits)
    stop, port = asyncio.Event(), asyncio.get_running_loop().create_future()
    limits = limits or ServerConfig(drain_s=1)
    task = asyncio.create_task(
        serve(front, "127.0.0.1", 0, stop=stop, started=port.set_result, give_up=give_up, config=limits)
    )
    try:
        yield Running(await port, generator, tokenizer, front, metrics)
    finally:
        stop.set()
        await task
        front.close()
