"""Runs an ASGI application on uvicorn, with the limits on connections that uvicorn and httptools do not have.

httptools bounds neither the size of a request's head nor the time it may take, and uvicorn waits for a client that
stops reading as long as the client likes; `BoundedProtocol` cuts all three. It also reads on while requests that were
sent ahead wait for their turn: only so is a client's leaving seen; and an answer's head goes out with the first part of
its body. Called by `baton/` inside its event loop (uvloop), which also owns signals.
"""

import asyncio
import fcntl
import logging
import math
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from router.exchange import CONNECTION

log = logging.getLogger(__name__)

_CHUNK_HEADS = tuple(b"%x\r\n" % size for size in range(1024))  # by size; an event of one token has some 200 bytes
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"  # no answer's head
FRAMING_FACTOR = 8  # bytes on the wire that one byte of a chunked body may cost
MAX_AHEAD_BYTES = 64 * 1024  # of requests that a client sends before it has the answer to the last one


@dataclass(frozen=True, slots=True)
class ServerConfig:
    max_head_bytes: int = 64 * 1024  # of a head that is not whole; the application refuses large whole ones politely
    idle_s: float = 75.0  # for a whole head to come: after connecting, and after each answer (to be read by then)
    stall_s: float = 30.0  # for a client to make room when it does not read its answer
    drain_s: float = 30.0  # for running requests to finish after the server was told to stop
    farewell_s: float = 1.0  # the last part of it, for those that have not finished to be told so
    backlog: int = 2048
    max_descriptors: float = math.inf  # that this process may have; it says so when they become few
    share_port: bool = False  # with other processes that say so too; the kernel spreads connections over them


class BoundedProtocol(HttpToolsProtocol):
    """One connection. At most one of the two timers runs for each of the two things waited for.

    `_running` is the request that is being answered. `cycle` is the last one whose head has come: later than that where
    one packet brought several. What comes while a whole request is running is not parsed before its answer is complete.
    """

    def __init__(self, limits: ServerConfig, descriptors: "DescriptorWatch", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.app = partial(self._answer, self.app)
        self._limits = limits
        self._descriptors = descriptors
        self._running: RequestResponseCycle | None = None  # the latest that was
        self._ahead = bytearray()  # received, to be parsed when that has its answer
        self._without_offer = b""  # the head of a request that offers another protocol, without the offer
        self._head_bytes = 0  # received since the last whole head
        self._body_overhead = 0  # received since then that is no body: chunk framing and trailers
        self._in_head = True
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        descriptor = transport.get_extra_info("socket").fileno()
        self._descriptors.opened(descriptor)
        self._client = ClientConnection(transport, descriptor)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        self._client.leave()
        running = self._running
        if running is not None and not running.response_complete:  # uvicorn sees to the last one only
            running.disconnected = True
            running.message_event.set()
        super().connection_lost(exc)
        self.app = None  # it refers to this connection

    def data_received(self, data: bytes) -> None:
        if self._is_answering():
            self._keep_ahead(data)
            return
        if self._in_head:
            self._head_bytes += len(data)
        else:
            self._body_overhead += len(data)
        self._parse(data)
        if self._is_answering():
            self.flow.resume_reading()  # which waiting requests and the end of a large body have paused
        if self._body_overhead > self._limits.max_head_bytes and not self.transport.is_closing():
            self.transport.abort()
        if self._in_head and self._head_bytes > self._limits.max_head_bytes and not self.transport.is_closing():
            self.send_400_response("The request's head is too large.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._body_overhead = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # trailers are no headers: a proxy in front has not looked at them
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        # Framing may cost as much as the body itself several times over, where chunks are tiny.
        self._body_overhead = max(0, self._body_overhead - FRAMING_FACTOR * len(body))
        super().on_body(body)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade() and (method := self.parser.get_method()) != b"CONNECT":
            # Goes on in `_parse`: after an offer the parser stops, and takes the body for the other protocol.
            version = self.parser.get_http_version().encode()
            lines = [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
            self._without_offer = b"\r\n".join((b"%b %b HTTP/%b" % (method, self.url, version), *lines, b"", b""))
            return
        self._in_head, self._head_bytes = False, 0
        if self._head_timer is not None:
            self._head_timer.cancel()
        self.scope["extensions"] = {CONNECTION: self._client}  # type: ignore[dict-item]
        self._client.whole = False
        is_next = self._running is None or self._running.response_complete
        super().on_headers_complete()
        if self.scope["method"] != "HEAD":  # whose body is never written
            self.cycle.transport = _HeldHead(self.transport)  # type: ignore[assignment]
        if is_next:
            self._running = self.cycle

    def on_message_complete(self) -> None:
        if not self._without_offer:
            self._client.whole = True
            super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.pipeline:
            self._running = self.pipeline[-1][0]
        super().on_response_complete()
        ahead, self._ahead = bytes(self._ahead), bytearray()
        if ahead and not self.transport.is_closing():
            self.data_received(ahead)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._client.paused = True
        self._stall_timer = self.loop.call_later(self._limits.stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        self._client.paused = False
        super().resume_writing()

    async def _answer(self, app: Any, *request: Any) -> None:
        try:
            await app(*request)
        finally:
            self.loop.call_soon(self._await_head)  # once uvicorn knows whether this was the last answer

    def _is_answering(self) -> bool:
        """Whether a request has come whole and its answer is not complete."""
        running = self._running
        return running is not None and not running.more_body and not running.response_complete

    def _keep_ahead(self, data: bytes) -> None:
        """For when the running request has its answer. Where it is too much, the connection ends with that answer:
        not reading on is no choice, for then the client's leaving would not be seen."""
        assert self._running is not None
        if self._running.keep_alive and len(self._ahead) + len(data) <= MAX_AHEAD_BYTES:
            self._ahead += data
        else:
            self._running.keep_alive = False
            self._ahead.clear()

    def _parse(self, data: bytes | memoryview) -> None:
        self._unset_keepalive_if_required()
        try:
            while True:
                try:
                    self.parser.feed_data(data)
                    return
                except httptools.HttpParserUpgrade as stopped:
                    data = memoryview(data)[stopped.args[0] :]
                    self._parse_without_offer()
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("Invalid HTTP request received.")

    def _parse_without_offer(self) -> None:
        """A server may ignore an offer of another protocol (h2c, by some clients' default)."""
        head, self._without_offer = self._without_offer, b""
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self.parser.feed_data(head)

    def _await_head(self) -> None:
        if self._client.lost:
            return
        if self._head_timer is not None:
            self._head_timer.cancel()
        # After the last answer there is only what is left of it to wait for.
        late_s = self._limits.stall_s if self.transport.is_closing() else self._limits.idle_s
        self._head_timer = self.loop.call_later(late_s, self._head_is_late)

    def _head_is_late(self) -> None:
        # A pipelined request may have taken over meanwhile; its own answer starts the timer anew.
        if self.transport.is_closing() or self.cycle is None or self.cycle.response_complete:
            self.transport.abort()  # closing would wait until the client has read the last answer


class _HeldHead:
    """The transport as uvicorn's cycle uses it: an answer's head waits for the first part of its body, as a write of
    each wakes the client, and costs more than all else that a token of the answer takes."""

    __slots__ = ("_head", "_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head: bytes | None = None  # empty: it is out

    def write(self, data: bytes) -> None:
        if self._head is None and data != _CONTINUE:
            self._head = data
        else:
            self._transport.write(self._head + data if self._head else data)
            self._head = self._head and b""

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        if self._head:
            self.write(b"")
        self._transport.close()


class DescriptorWatch:
    """Says once that few file descriptors are left. Without one for it the loop closes a new connection at once, and
    neither its client nor the log is told."""

    def __init__(self, max_descriptors: float) -> None:
        self._many = 0.9 * max_descriptors

    def opened(self, descriptor: int) -> None:
        if descriptor >= self._many:  # the lowest free number is taken
            self._many = math.inf
            log.warning(
                "%d file descriptors are open, nearly as many as allowed (ulimit -n); new connections will be closed",
                descriptor,
            )


class ClientConnection:
    """Implements router.exchange.Connection: the answer under way is chunked."""

    __slots__ = ("_descriptor", "_own", "_transport", "lost", "on_lost", "paused", "whole")

    def __init__(self, transport: asyncio.Transport, descriptor: int) -> None:
        self._transport = transport
        self._descriptor = descriptor
        self._own = -1  # another one of the same connection: the loop may close its own, and another get its number
        self.paused = False  # by the transport: the client does not keep up
        self.lost = False
        self.whole = False
        self.on_lost: Callable[[], None] | None = None

    def leave(self) -> None:
        self.lost = True
        try:
            if self.on_lost is not None:
                self.on_lost()
        finally:
            if self._own >= 0:
                os.close(self._own)
                self._own = -1

    def write(self, part: bytes) -> bool:
        transport, size = self._transport, len(part)
        if not transport.is_closing():
            head = _CHUNK_HEADS[size] if size < len(_CHUNK_HEADS) else b"%x\r\n" % size
            data = b"".join((head, part, b"\r\n"))
            if not transport.get_write_buffer_size():  # straight to the kernel, past the loop's queue of writes
                try:
                    num_sent = os.write(self._descriptor, data)
                except OSError:  # the client has no room, or is gone, which the transport will find, too
                    num_sent = 0
                if num_sent == len(data):
                    return True
                data = data[num_sent:]
            transport.write(data)
        return not self.paused

    def write_rest(self, chunk: bytes) -> bool:
        if not self._transport.is_closing():
            self._transport.write(chunk)
        return not self.paused

    def descriptor(self) -> int:
        transport = self._transport
        if self.lost or transport.is_closing() or transport.get_write_buffer_size():
            return -1
        if self._own < 0:
            with suppress(OSError):  # there are no more: then the long way
                self._own = fcntl.fcntl(self._descriptor, fcntl.F_DUPFD_CLOEXEC, 0)
        return self._own


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: the process has its own."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(
    app: Any,
    host: str,
    port: int,
    *,
    stop: asyncio.Event,
    started: Callable[[int], None] = lambda _port: None,
    give_up: Callable[[], Awaitable[None]] | None = None,
    config: ServerConfig | None = None,
) -> None:
    """Serve until `stop` is set, then finish what runs. `started` gets the port, which matters for port 0.

    `give_up` is called when the time for that is nearly over: it ends the requests that still run with an answer that
    says so. Raises OSError when the address cannot be bound.
    """
    limits = config or ServerConfig()
    listener = _bind(host, port, limits.backlog, share=limits.share_port)
    server = _Server(
        uvicorn.Config(
            app,
            http=partial(BoundedProtocol, limits, DescriptorWatch(limits.max_descriptors)),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=int(limits.idle_s),
            timeout_graceful_shutdown=math.ceil(limits.drain_s) + 1,  # by then `_drain` has cut every connection
        )
    )
    running = asyncio.create_task(server.serve(sockets=[listener]))
    stopping = asyncio.create_task(stop.wait())
    try:
        started(listener.getsockname()[1])
        await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        await _drain(server, running, give_up, limits)
        await running
    finally:
        stopping.cancel()
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        listener.close()


async def _drain(
    server: _Server, running: asyncio.Task[None], give_up: Callable[[], Awaitable[None]] | None, limits: ServerConfig
) -> None:
    """Returns when the server has finished, or has no connection any more. uvicorn would cancel what still runs, and
    answer 500; to the application a connection that is cut is a client that has left."""
    await asyncio.wait({running}, timeout=limits.drain_s - limits.farewell_s)
    if not running.done() and give_up is not None:
        await give_up()
    await asyncio.wait({running}, timeout=limits.farewell_s)
    for connection in list(server.server_state.connections):
        connection.transport.abort()


def check_free(host: str, port: int) -> None:
    """Raises OSError when somebody listens on the address, or nobody can."""
    _bind(host, port, 1, share=False).close()


def _bind(host: str, port: int, backlog: int, *, share: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, connections inherit it, and event loops then set TCP_NODELAY on them.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
        listener.listen(backlog)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise OSError(
            f"{host}:{port} cannot be listened on: {error.strerror}; choose another port or stop its owner"
        ) from error
    return listener
