"""The OpenAI API of a running server as a backend of `LLM`; also the event reader that `baton demo` uses.

One asyncio loop on a thread of its own holds the connections; every job is one task, cancelled by closing its
connection, at which the server frees what the request held. Never more than `max_in_flight` jobs are sent at once by
`LLM.run`; a full server (429) is asked again when it says so, within the job's time.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from contextlib import aclosing, asynccontextmanager
from threading import Thread
from typing import Any, TypeVar

import httpx
import msgspec

from baton.outputs import Ended, Job, OnEnd, OnEvent
from baton.remote_messages import parse_increment, parse_output, request_body
from engine.errors import InvalidRequest
from router.generation import DeadlineExceeded, GenerationFailed, Overloaded

LOOPBACK = ("localhost", "127.0.0.1", "::1")
CONNECT_S = 10.0
MAX_WAIT_S = 30.0  # between two tries, whatever the server says
MAX_UNAVAILABLE = 5  # tries of a request that no worker could take

T = TypeVar("T")


class RemoteBackend:
    """Implements `baton.outputs.Backend`. Owns its thread, loop and connections until `close`."""

    def __init__(self, url: str, model: str | None, api_key: str | None, timeout: float, *, max_in_flight: int) -> None:
        self.max_in_flight = max_in_flight
        self._url = url.rstrip("/").removesuffix("/v1")
        self._timeout = timeout
        self._client = httpx.AsyncClient(
            base_url=self._url,
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(timeout, connect=CONNECT_S),
            trust_env=httpx.URL(self._url).host not in LOOPBACK,  # a proxy would look for it on its own machine
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=max_in_flight),
        )
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="baton-remote", daemon=True)
        self._thread.start()
        self._closed = False
        try:
            self.model = model or self._wait(self._find_model())
        except BaseException:
            self.close()
            raise

    def complete(self, job: Job, on_end: OnEnd) -> Callable[[], None]:
        async def run() -> None:
            on_end(await self._complete(job))

        return self._spawn(run())

    def stream(self, job: Job, on_event: OnEvent) -> Callable[[], None]:
        async def run() -> None:
            on_event(await self._stream(job, on_event))

        return self._spawn(run())

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._wait(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> Callable[[], None]:
        if self._closed:
            work.close()
            raise RuntimeError("the LLM was closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)

        def cancel() -> None:
            future.cancel()

        return cancel

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _shut(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.aclose()
        await asyncio.get_running_loop().shutdown_asyncgens()

    async def _find_model(self) -> str:
        try:
            response = await self._client.get("/v1/models", timeout=CONNECT_S)
            await raise_for_error(response)
            return str(response.json()["data"][0]["id"])
        except (httpx.TransportError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
            raise ConnectionError(f"no server of the OpenAI API answers at {self._url} ({error})") from None

    async def _complete(self, job: Job) -> Ended:
        try:
            path, body = request_body(job, self.model)
            async with asyncio.timeout(self._timeout), self._sent(path, body) as response:
                await response.aread()
                return parse_output(job, response.json())
        except Exception as error:  # the task's one guard: the caller waits for an end, whatever it is
            return self._explained(error)

    async def _stream(self, job: Job, on_event: OnEvent) -> Exception | None:
        try:
            path, body = request_body(job, self.model)
            async with (
                asyncio.timeout(self._timeout),
                self._sent(path, {**body, "stream": True}) as response,
                aclosing(events(response)) as chunks,
            ):
                async for chunk in chunks:
                    for choice in chunk["choices"]:
                        if (increment := parse_increment(job, choice)) is not None:
                            on_event(increment)
            return None
        except Exception as error:  # the task's one guard: the caller waits for an end, whatever it is
            return self._explained(error)

    @asynccontextmanager
    async def _sent(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[httpx.Response]:
        """A good response whose body has not been read; tries again while the server is full."""
        num_unavailable = 0
        while True:
            async with self._client.stream("POST", path, json=body) as response:
                try:
                    await raise_for_error(response)
                except Overloaded as error:
                    num_unavailable += error.unavailable
                    if num_unavailable == MAX_UNAVAILABLE:
                        raise
                    wait = min(error.retry_after, MAX_WAIT_S)
                else:
                    yield response
                    return
            await asyncio.sleep(wait)

    def _explained(self, error: Exception) -> Exception:
        match error:
            case httpx.ConnectError():
                return ConnectionError(f"no server answers at {self._url}")
            case TimeoutError() | httpx.TimeoutException():
                return DeadlineExceeded(f"the server did not finish within {self._timeout:g} s")
            case httpx.TransportError():
                return ConnectionError(f"the connection to {self._url} was lost: {error or type(error).__name__}")
            case ValueError() | LookupError() | TypeError():
                return ConnectionError(f"the server at {self._url} answered in a way this client does not understand")
            case _:
                return error


async def events(response: httpx.Response) -> AsyncGenerator[dict[str, Any], None]:
    """The server-sent events of a streamed answer. Raises what an error event says, or that the end is missing."""
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        event = msgspec.json.decode(data, type=dict[str, Any])
        if "error" in event:
            raise _as_exception(500, event["error"], 1.0)
        yield event
    raise ConnectionError("the server ended the answer in its middle")


async def raise_for_error(response: httpx.Response) -> None:
    """Raise what the server raised, as far as its error body tells. Leaves the body of a good response unread."""
    if response.is_success:
        return
    await response.aread()
    try:
        error = response.json()["error"]
        retry_after = float(response.headers.get("retry-after", 1.0))
    except (ValueError, LookupError, TypeError):
        error, retry_after = {"message": f"status {response.status_code}"}, 1.0
    raise _as_exception(response.status_code, error, retry_after)


def _as_exception(status: int, error: Mapping[str, Any], retry_after: float) -> Exception:
    message, code = str(error.get("message")), str(error.get("code"))
    match error.get("type"), status:
        case ("invalid_request_error", _) | (_, 400 | 401 | 403 | 404 | 413 | 415):
            return InvalidRequest(message, param=error.get("param"), code=code)
        case "timeout_error", _:
            return DeadlineExceeded(message)
        case _, 429:
            return Overloaded(message, retry_after=retry_after)
        case _, 503 if code != "generation_failed":
            return Overloaded(message, retry_after=retry_after, unavailable=True)
        case _:
            return GenerationFailed(message)
