"""The real HTTP front on a free port of this process, over one engine: what a remote LLM is tested against."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from prometheus_client import CollectorRegistry

from engine.engine import Engine
from engine.executors.base import Executor
from engine.request import Request, RequestId
from engine.scheduler import SchedulerConfig
from router.generation import ModelCard, RouteHints
from router.http import Front, FrontConfig
from router.metrics import Metrics
from router.stream import TokenStream
from router.tokenizer import Tokenizer


class EngineGenerator:
    """Implements router.generation.Generator over an engine that steps on the server's own loop."""

    ready = True

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.streams: dict[RequestId, TokenStream] = {}
        self._work = asyncio.Event()

    def start(self, request: Request, _deadline: float, _hints: RouteHints) -> TokenStream:
        stream = TokenStream(request.params.max_tokens, time.monotonic(), time.monotonic)
        self.engine.submit(request)
        self.streams[request.id] = stream
        stream.on_close(lambda: self._end(request.id))
        self._work.set()
        return stream

    def _end(self, request_id: RequestId) -> None:
        self.engine.cancel(request_id)
        self.streams.pop(request_id, None)

    async def run(self) -> None:
        while True:
            await self._work.wait()
            scheduled = self.engine.schedule()
            if scheduled is None:
                self._work.clear()
                continue
            for token in self.engine.run(scheduled):
                stream = self.streams[token.request_id]
                if token.prompt_logprobs is not None:
                    stream.prompt_logprobs = token.prompt_logprobs
                logprobs = [] if token.logprobs is None else [token.logprobs]
                stream.accept(token.index, [token.token_id], logprobs, token.finish_reason)
            await asyncio.sleep(0)


class Serving:
    """Answers at `url` from `start` to `stop`; `generator` is there to look at."""

    def __init__(self, executor: Executor, tokenizer: Tokenizer, model: str) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))  # listens from here on, so nobody needs to wait
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        engine = Engine(executor, SchedulerConfig(), secret="", model=model)
        self.generator = EngineGenerator(engine)
        card = ModelCard(model, executor.vocab_size, executor.max_model_len, executor.eos_token_ids)
        metrics = Metrics(CollectorRegistry(), model)
        self._front = Front(self.generator, card, tokenizer, metrics, FrontConfig())
        config = uvicorn.Config(self._front, lifespan="off", log_level="warning", timeout_graceful_shutdown=5)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()
        self._front.close()
        self._socket.close()

    async def _serve(self) -> None:
        stepping = asyncio.create_task(self.generator.run())
        await self._server.serve(sockets=[self._socket])
        stepping.cancel()


@contextmanager
def serving(executor: Executor, tokenizer: Tokenizer, model: str = "tiny") -> Iterator[Serving]:
    server = Serving(executor, tokenizer, model)
    server.start()
    try:
        yield server
    finally:
        server.stop()
