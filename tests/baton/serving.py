"""The real HTTP front on a free port of this process, over one engine: what a remote LLM is tested against."""

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from engine.engine import Engine
from engine.executors.base import Executor
from engine.request import Request, RequestId
from engine.scheduler import SchedulerConfig
from router.generation import ModelCard, RouteHints
from router.http import Front, FrontConfig
from router.metrics import Metrics
from router.server import ServerConfig, serve
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
        self.url = ""
        engine = Engine(executor, SchedulerConfig(), secret="", model=model)
        self.generator = EngineGenerator(engine)
        card = ModelCard(model, executor.vocab_size, executor.max_model_len, executor.eos_token_ids)
        metrics = Metrics(model)
        self._front = Front(self.generator, card, tokenizer, metrics, FrontConfig())
        self._stop = asyncio.Event()
        self._loop: Future[asyncio.AbstractEventLoop] = Future()  # once it listens
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def start(self) -> None:
        self._thread.start()
        self._loop.result(30)

    def stop(self) -> None:
        self._loop.result().call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        assert not self._thread.is_alive()
        self._front.close()

    async def _serve(self) -> None:
        stepping = asyncio.create_task(self.generator.run())
        config = ServerConfig(drain_s=5)
        await serve(self._front, "127.0.0.1", 0, stop=self._stop, started=self._listens, config=config)
        stepping.cancel()

    def _listens(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._loop.set_result(asyncio.get_running_loop())


@contextmanager
def serving(executor: Executor, tokenizer: Tokenizer, model: str = "tiny") -> Iterator[Serving]:
    server = Serving(executor, tokenizer, model)
    server.start()
    try:
        yield server
    finally:
        server.stop()
