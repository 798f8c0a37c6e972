"""One HTTP request and its response over raw ASGI: headers, the body with its limits, whole answers and event streams.

Made by `router.http` for every request and handed to the handlers. Every response carries the request id. Waiting for
the client is bounded: a body has a size limit and a deadline; stalled readers are the server's (`router.server`).
Events need no task: `router.server` lets them be written directly, those of all streams one after another, once in a
turn of the loop; the beginning of a stream is kept until the next `flush`.
"""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

from router.bodies import Share
from router.errors import ApiError, ClientGone

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

JSON = b"application/json"
REQUEST_ID = re.compile(rb"[!-~]{1,128}")
CONNECTION = "baton.connection"  # ASGI extension, which the server must have: a Connection
MAX_UNSENT_BYTES = 64 * 1024  # of events in one turn of the loop, before their producer has to wait
LINGER_S = 2.0  # how long what is left of a refused body is read, so that the client gets to see the answer


log = logging.getLogger(__name__)


class Connection(Protocol):
    """What ASGI does not have: by it, each of the two would want a task."""

    lost: bool  # the client has left
    on_lost: Callable[[], None] | None  # called when it leaves
    whole: bool  # the bodies of all requests whose heads have come have come, too

    def write(self, part: bytes) -> bool:
        """Writes a part of the body at once. False: the client does not keep up."""
        ...

    def write_rest(self, chunk: bytes) -> bool:
        """The same of what is left of a chunk that was written to `descriptor`."""
        ...

    def descriptor(self) -> int:
        """Takes chunks of the body while nothing else is written, until `on_lost`; negative: not now."""
        ...


class Writer(Protocol):
    """Who may write events past the exchange."""

    def written(self, descriptor: int) -> None:
        """All events have been. From now on `descriptor` takes them, as chunks, until others come or `stop`."""
        ...

    def stop(self) -> None: ...


class WriteBatch:
    """The exchanges with events to write at the end of this turn of the loop.

    A frame from a worker has a token for each of many streams. Writing when all of them have been decoded keeps two
    large pieces of code, the kernel's and ours, from driving each other out of the processor's caches at every token.
    """

    def __init__(self) -> None:
        self._exchanges: list[Exchange] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def add(self, exchange: "Exchange") -> None:
        if not self._exchanges:
            self._loop = self._loop or asyncio.get_running_loop()
            self._loop.call_soon(self._write)
        self._exchanges.append(exchange)

    def _write(self) -> None:
        exchanges, self._exchanges = self._exchanges, []
        for exchange in exchanges:
            try:
                exchange.write_kept()
            except Exception:  # the guard between connections: this one's next flush meets the error again
                log.exception("a part of the answer to request %s could not be written", exchange.request_id)


class Exchange:
    """`status` is None until a response has started; 499 when the client left before."""

    __slots__ = (
        "_batch",
        "_body_read",
        "_connection",
        "_flushing",
        "_receive",
        "_send",
        "_unsent",
        "_writing",
        "headers",
        "method",
        "path",
        "request_id",
        "status",
        "writer",
    )

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, new_id: Callable[[], str], batch: WriteBatch
    ) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.status: int | None = None
        self.writer: Writer | None = None
        self._connection: Connection = scope["extensions"][CONNECTION]
        self._batch = batch
        self._unsent = b""  # events
        self._writing = False  # events go out with the batch: the head has been sent, and the client keeps up
        self._flushing = asyncio.Lock()
        self._receive = receive
        self._send = send
        self._body_read = False
        sent = self.headers.get(b"x-request-id", b"")
        self.request_id = sent.decode() if REQUEST_ID.fullmatch(sent) else new_id()

    async def read_json(self, max_bytes: int, timeout: float, share: Share) -> bytes:
        """The whole body, which takes its `share` as it grows. Raises ApiError 408, 413, 415 or 503, or ClientGone."""
        media_type = self.headers.get(b"content-type", JSON).partition(b";")[0].strip().lower()
        if media_type != JSON:
            raise ApiError(415, "the body must be sent with content-type: application/json")
        encoding = self.headers.get(b"content-encoding", b"identity").strip().lower()
        if encoding != b"identity":
            raise ApiError(415, "the body must be sent without a content-encoding")
        length = self.headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > max_bytes:
            raise _too_large(max_bytes)
        parts: list[bytes] = []
        size = 0
        try:
            async with nullcontext() if self._connection.whole else asyncio.timeout(timeout):
                while not self._body_read:
                    part = await self._next_part()
                    size += len(part)
                    if size > max_bytes:
                        raise _too_large(max_bytes)
                    share.grow(size)
                    parts.append(part)
            return parts[0] if len(parts) == 1 else b"".join(parts)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {timeout:g} seconds", code="body_timeout") from None
        finally:
            parts.clear()  # an error keeps this frame for as long as it is being answered

    async def respond(
        self, status: int, body: bytes, *, content_type: bytes = JSON, headers: tuple[tuple[bytes, bytes], ...] = ()
    ) -> None:
        closing = () if self._body_read or not self._expects_body() else ((b"connection", b"close"),)
        length = (b"content-length", b"%d" % len(body))
        await self._start(status, content_type, (length, *headers, *closing))
        await self._send({"type": "http.response.body", "body": body, "more_body": bool(closing)})
        if closing:
            await self._linger()
            await self.end_events(b"")

    def write_events(self, events: bytes, *, last: bool = False) -> bool:
        """Send server-sent events, beginning a stream of them. False: wait for `flush` before the next ones.

        `last`: they go out with those that end the stream, which follow at once.
        """
        if last:
            self._writing = False
        if self._writing and events and not self._unsent:
            self._batch.add(self)
        self._unsent += events
        return self._writing and len(self._unsent) < MAX_UNSENT_BYTES

    def write_kept(self) -> None:
        """Called by the batch."""
        if self._writing and self._unsent:
            self._writing = False  # also if this raises: then what is kept goes with the next flush
            self._writing = self._connection.write(self._unsent)
            self._unsent = b""
            if self._writing and self.writer is not None and (descriptor := self._connection.descriptor()) >= 0:
                self.writer.written(descriptor)

    def write_rest(self, chunk: bytes) -> None:
        """Of a chunk that was written to the connection's descriptor."""
        self._writing = False
        self._writing = self._connection.write_rest(chunk)

    async def flush(self) -> None:
        """Sends what is kept, and waits until the client has made room."""
        self._writing = False  # what comes from now on is kept until the client has made room
        async with self._flushing:
            await self._start_events()
            events, self._unsent = self._unsent, b""
            await self._send({"type": "http.response.body", "body": events, "more_body": True})
            self._writing = not self._unsent

    async def end_events(self, events: bytes) -> None:
        """Send the last events and end the stream."""
        self._writing = False
        await self._start_events()
        await self._send({"type": "http.response.body", "body": self._unsent + events, "more_body": False})

    async def _start_events(self) -> None:
        if self.status is None:
            unbuffered = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))
            await self._start(200, b"text/event-stream; charset=utf-8", unbuffered)

    @contextmanager
    def bounded(self, seconds: float) -> Iterator[None]:
        """Cancels what runs inside when the client closes the connection, and raises ClientGone instead; or when so
        many seconds have passed, and raises TimeoutError."""
        inside, connection = asyncio.current_task(), self._connection
        assert inside is not None
        why: type[Exception] | None = None

        def end(reason: type[Exception]) -> None:
            nonlocal why
            if self.writer is not None:
                self.writer.stop()
            if why is None:
                why = reason
                inside.cancel()

        if connection.lost:
            raise ClientGone
        timer = asyncio.get_running_loop().call_later(seconds, end, TimeoutError)
        connection.on_lost = partial(end, ClientGone)
        try:
            yield
        except BaseException as error:
            if why is not None and not inside.uncancel() and isinstance(error, asyncio.CancelledError):
                raise why from None
            raise
        finally:
            connection.on_lost = self.writer = None
            timer.cancel()

    async def _next_part(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        self._body_read = not message.get("more_body", False)
        part: bytes = message.get("body", b"")
        return part

    def _expects_body(self) -> bool:
        return b"transfer-encoding" in self.headers or self.headers.get(b"content-length", b"0") != b"0"

    async def _start(self, status: int, content_type: bytes, headers: tuple[tuple[bytes, bytes], ...]) -> None:
        self.status = status
        await self._send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(b"content-type", content_type), (b"x-request-id", self.request_id.encode()), *headers],
            }
        )

    async def _linger(self) -> None:
        # Closing with unread bytes would reset the connection, and the client might never see why.
        try:
            async with asyncio.timeout(LINGER_S):
                while not self._body_read:
                    await self._next_part()
        except (TimeoutError, ClientGone):
            pass


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"the body is larger than {max_bytes} bytes", code="body_too_large")
