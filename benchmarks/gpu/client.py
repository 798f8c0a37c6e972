"""A streaming client that costs little: bare HTTP/1.1 over asyncio, one connection a request, events only counted.

Used by the benchmarks that run a whole cluster. A token's time is when its event arrived; text is not decoded.
"""

import asyncio
import json
import random
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu.harness import percentile

TIMEOUT_S = 120.0
PREFIX = b"data: "


@dataclass(slots=True, eq=False)
class Answer:
    """Times are perf_counter's. An answer without an error is complete."""

    began: float = 0.0
    times: list[float] = field(default_factory=list)  # of the events that brought tokens
    timeline: dict[str, Any] = field(default_factory=dict)  # what the server says of it, durations in seconds
    error: str = "unfinished"

    @property
    def first_token_s(self) -> float:
        return self.times[0] - self.began if self.times else float("inf")

    @property
    def gaps(self) -> list[float]:
        """Between one event and the next."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]

    def meets(self, first_token_s: float, gap_s: float) -> bool:
        """Complete, and within both limits; of the gaps the 99th percentile counts."""
        if self.error or self.first_token_s >= first_token_s:
            return False
        return not self.gaps or percentile(self.gaps, 0.99) < gap_s


class Client:
    """For one server, named by its URL."""

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").rstrip("/").rpartition(":")
        self._host, self._port = host.strip("[]"), int(port)

    async def complete(self, body: bytes, answer: Answer | None = None) -> Answer:
        """Stream the completion that `body` asks for into `answer`; never raises for what the server does."""
        answer = answer or Answer()
        answer.began = time.perf_counter()
        done = asyncio.get_running_loop().create_future()
        transport = None
        try:
            async with asyncio.timeout(TIMEOUT_S):
                loop = asyncio.get_running_loop()
                transport, _ = await loop.create_connection(lambda: _Reply(answer, done), self._host, self._port)
                transport.write(_HEAD % len(body) + body)
                await done
        except TimeoutError:
            answer.error = f"not finished after {TIMEOUT_S:.0f} s"
        except OSError as error:
            answer.error = str(error)
        finally:
            if transport is not None:
                transport.close()
        return answer


_HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    b"x-baton-timeline: 1\r\ncontent-length: %d\r\n\r\n"
)


class _Reply(asyncio.Protocol):
    def __init__(self, answer: Answer, done: "asyncio.Future[None]") -> None:
        self._answer = answer
        self._done = done
        self._rest = b""
        self._status = b""

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if not self._status:
                self._status = line.strip()
                if b" 200 " not in self._status + b" ":
                    self._end(self._status.decode())
            elif line.startswith(PREFIX):
                self._event(line[len(PREFIX) :], now)

    def connection_lost(self, _error: Exception | None) -> None:
        self._end("the connection ended")

    def _event(self, event: bytes, now: float) -> None:
        if event.startswith(b"[DONE]"):
            self._end("")
        elif event.startswith(b'{"error"'):
            self._end(event.decode())
        else:
            if b'"choices":[]' not in event:
                self._answer.times.append(now)
            if b'"timeline":' in event:
                self._answer.timeline = json.loads(event)["timeline"]

    def _end(self, error: str) -> None:
        if not self._done.done():
            self._answer.error = error
            self._done.set_result(None)


def completion(prompt: Sequence[int], num_output: int) -> bytes:
    """The body of a greedy streamed completion of exactly `num_output` tokens, none of whose KV is cached."""
    fields = {"prompt": list(prompt), "max_tokens": num_output, "temperature": 0, "ignore_eos": True, "stream": True}
    fields["cache_salt"] = secrets.token_hex(8)
    return json.dumps(fields, separators=(",", ":")).encode()


def random_completion(rng: random.Random, vocab_size: int, num_input: int, num_output: int) -> bytes:
    return completion(rng.choices(range(vocab_size), k=num_input), num_output)
