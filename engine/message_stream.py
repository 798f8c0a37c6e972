"""Protobuf messages both ways over one TCP connection: what routers and workers speak with each other.

A message is its length in four bytes, big endian, and its bytes. The first three are the handshake:

    server: a random challenge
    client: challenge_response(token, challenge + service), then the service's name
    server: why it refuses, or nothing

A stream belongs to one event loop. What arrives is handed over at once, with no task in between (`deliver_to`), or
waits for `read`. Invariants: before the handshake nothing longer than MAX_GREETING_BYTES is kept; what nobody has
read, and what the peer has not, is bounded; a peer that reads nothing for STALL_S or acknowledges nothing for
UNACKNOWLEDGED_S loses the stream. docs/decisions/0005-message-streams.md says why this is not gRPC.
"""

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol, cast

from google.protobuf.message import DecodeError

from engine.auth import challenge_response

MAX_MESSAGE_BYTES = 64 << 20  # a prompt of a million tokens is about 4 MB; a snapshot of a million blocks 8 MB
MAX_GREETING_BYTES = 1024
MAX_UNSENT_BYTES = 2 * MAX_MESSAGE_BYTES
STALL_S = 10.0  # for a peer that has room for nothing to read something
UNACKNOWLEDGED_S = 15  # for a peer's machine to acknowledge what was sent
MAX_UNREAD = 64  # messages that nobody has read; then the peer has to wait

_SOCKET_OPTIONS = {  # not every system has all
    "TCP_NODELAY": 1,
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 2,
    "TCP_USER_TIMEOUT": UNACKNOWLEDGED_S * 1000,
}


class StreamLost(Exception):
    """The other end cannot be reached, is gone, does not read, or does not speak this protocol."""


class StreamRefused(StreamLost):
    """The server says why."""


class Message(Protocol):
    def SerializeToString(self) -> bytes: ...


class MessageStream(asyncio.Protocol):
    """One end. `connected` is called once there is a connection; `parse` is what the other end's messages go through.

    `connect` makes a client's, `engine.message_server` a server's.
    """

    def __init__(
        self, parse: Callable[[bytes], Any], connected: Callable[["MessageStream"], None] = lambda _stream: None
    ) -> None:
        self.parse = parse
        self.max_bytes = MAX_GREETING_BYTES
        self._connected = connected
        self._rest = bytearray()  # the beginning of a message
        self._wanted = 0  # bytes of `_rest` that are worth a look
        self._unread: deque[bytes] = deque()
        self._paused_reading = False
        self._reader: asyncio.Future[None] | None = None
        self._receive: Callable[[Any], None] | None = None
        self._stall_timer: asyncio.TimerHandle | None = None  # while the peer has no room
        self._error: Exception | None = None
        self._num_sent = 0  # bytes, those included that are not written yet
        self._over = asyncio.Event()
        self._transport: asyncio.Transport

    @property
    def over(self) -> bool:
        return self._over.is_set()

    @property
    def peer(self) -> str:
        """The other end's address, for logs."""
        return str(self._transport.get_extra_info("peername"))

    def send(self, message: Message) -> None:
        """Written at once, in order. Where the stream is ending nothing is sent, and `wait_over` tells."""
        self.send_bytes(message.SerializeToString())

    def send_bytes(self, data: bytes) -> None:
        if len(data) > MAX_MESSAGE_BYTES:
            self.abort(StreamLost(f"a message of {len(data)} bytes is longer than the {MAX_MESSAGE_BYTES} allowed"))
        elif self._stall_timer is not None and self._transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self.abort(StreamLost(f"the other end has not read {MAX_UNSENT_BYTES} bytes"))
        elif not self._transport.is_closing():
            self._num_sent += 4 + len(data)
            self._transport.write(b"".join((len(data).to_bytes(4, "big"), data)))

    async def read(self) -> Any:
        """The next message; None once the other end has closed. Raises what ended the stream."""
        while not self._unread:
            if self.over:
                if self._error is not None:
                    raise self._error
                return None
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        data = self._unread.popleft()
        self._resume_reading()
        return self._parsed(data)

    def deliver_to(self, receive: Callable[[Any], None]) -> None:
        """Call `receive` with each message from now on. What it raises ends the stream: see `wait_over`."""
        self._receive = receive
        try:
            while self._unread:
                receive(self._parsed(self._unread.popleft()))
        except Exception as error:  # the guard at this boundary, as in `data_received`
            self.abort(error)
        self._resume_reading()

    async def wait_over(self) -> None:
        """Until the connection is closed. Raises what ended it, if it was not one of the ends."""
        await self._over.wait()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the stream when what was sent is written. Idempotent."""
        self._transport.close()

    def abort(self, error: Exception | None = None) -> None:
        """End the stream now; `wait_over` and `read` raise `error`. Idempotent, the first error counts."""
        if not self.over:
            self._error = self._error or error
            self._unread.clear()
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none
        connection = transport.get_extra_info("socket")
        with suppress(OSError):  # of a peer that is gone already
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _SOCKET_OPTIONS.items():
                if hasattr(socket, name):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connected(self)

    def data_received(self, data: bytes) -> None:
        if self._rest:
            self._rest += data
            if len(self._rest) < self._wanted:
                return
            data, self._rest = bytes(self._rest), bytearray()
        try:
            used = self._take_whole(data)
        except Exception as error:  # the guard at this boundary: whatever a message provokes costs one stream
            self.abort(error)
        else:
            self._rest += data[used:]

    def _take_whole(self, data: bytes) -> int:
        """How many bytes were used: those of all messages that are whole, unless too many wait to be read."""
        start, size = 0, len(data)
        while size - start >= 4 and not self._paused_reading:
            end = start + 4 + int.from_bytes(data[start : start + 4], "big")
            if end - start - 4 > self.max_bytes:
                raise StreamLost(f"a message of {end - start - 4} bytes came, {self.max_bytes} are allowed")
            if end > size:
                self._wanted = end - start
                return start
            self._take(data[start + 4 : end])
            start = end
            if self._transport.is_closing():
                return size
        self._wanted = 4
        return start

    def _take(self, data: bytes) -> None:
        if self._receive is not None:
            self._receive(self._parsed(data))
            return
        self._unread.append(data)
        self._wake_reader()
        if len(self._unread) >= MAX_UNREAD and not self._paused_reading:
            self._paused_reading = True
            self._transport.pause_reading()

    def _parsed(self, data: bytes) -> Any:
        try:
            return self.parse(data)
        except DecodeError:
            raise StreamLost("a message is malformed") from None

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None and self._error is None:
            self._error = StreamLost(f"the connection broke: {exc}")
        self._cancel_stall_timer()
        self._over.set()
        self._wake_reader()

    def pause_writing(self) -> None:
        self._await_progress()

    def resume_writing(self) -> None:
        self._cancel_stall_timer()

    def _await_progress(self) -> None:
        written = self._num_sent - self._transport.get_write_buffer_size()
        self._stall_timer = asyncio.get_running_loop().call_later(STALL_S, self._check_progress, written)

    def _check_progress(self, written: int) -> None:
        if self._num_sent - self._transport.get_write_buffer_size() == written:
            self.abort(StreamLost(f"the other end has read nothing for {STALL_S:g} s"))
        else:
            self._await_progress()

    def _cancel_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _resume_reading(self) -> None:
        if self._paused_reading and not self._transport.is_closing():
            self._paused_reading = False
            self._transport.resume_reading()
            self.data_received(b"")

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


async def connect(address: str, service: str, token: str, parse: Callable[[bytes], Any]) -> MessageStream:
    """A stream to a service at `host:port`. The caller sets the deadline, and ends the stream. Raises StreamLost."""
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    try:
        if not host:
            raise ValueError("that is no address")
        _, stream = await loop.create_connection(lambda: MessageStream(parse), host.strip("[]"), int(port))
    except (OSError, OverflowError, ValueError) as error:  # the last two: of what is no address
        raise StreamLost(f"{address} cannot be reached: {error}") from error
    try:
        await _introduce(stream, service, token)
    except BaseException:
        stream.abort()
        raise
    return stream


async def _introduce(stream: MessageStream, service: str, token: str) -> None:
    parse, stream.parse = stream.parse, bytes
    challenge = await stream.read()
    if challenge is not None:
        name = service.encode()
        stream.send_bytes(challenge_response(token, challenge + name) + name)
        refusal = await stream.read()
    if challenge is None or refusal is None:
        raise StreamLost("the other end closed the connection")
    if refusal:
        raise StreamRefused(refusal.decode(errors="replace"))
    stream.parse, stream.max_bytes = parse, MAX_MESSAGE_BYTES
