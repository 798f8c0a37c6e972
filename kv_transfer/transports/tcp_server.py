"""The source's data port: sends pieces straight from the pool's memory file, without passing through Python, or from
device memory by way of a window of pinned memory for each connection.

A connection belongs to one link (`listener`); it can read only final pieces of leases that this link has opened, and
ends with the link. Every send holds the lease's blocks through the ReadGuard, so they are not reused under it.
"""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from time import monotonic

from engine.kv.memory import HostMemory, KvMemory
from kv_transfer.transports import tcp_wire as wire
from kv_transfer.transports.base import ReadGuard
from kv_transfer.transports.listener import LinkListener

SEND_BYTES = 1 << 20  # in one sendfile call, so that deadlines are looked at in between
REQUEST_S = 60.0  # a reader slower than that loses the connection, so a lease is not quarantined for ever

Send = Callable[[Sequence[tuple[int, int]], float], None]  # (offset, size) ranges, and until when


class TcpServer:
    """`host` is bound, on `port` or a free one; `advertised_host` is what sinks on other machines connect to."""

    name = wire.NAME
    checksums = True
    worthwhile_bytes = 0

    def __init__(
        self,
        memory: KvMemory,
        *,
        host: str,
        token: str,
        port: int = 0,
        advertised_host: str | None = None,
        max_connections: int = 256,
    ) -> None:
        self._memory = memory
        self._guard: ReadGuard | None = None
        self._listener = LinkListener(
            self._serve,
            wire.MAGIC,
            host=host,
            token=token,
            port=port,
            advertised_host=advertised_host,
            max_connections=max_connections,
        )
        self.address = self._listener.address

    def start(self, guard: ReadGuard) -> None:
        self._guard = guard
        self._listener.start(guard)

    def reaches(self, boot_id: str) -> bool:  # noqa: ARG002
        return True

    def key(self, link_key: bytes) -> bytes:
        return link_key

    def close(self) -> None:
        self._listener.close()

    def _serve(self, connection: socket.socket, link_id: bytes, over: Callable[[], bool]) -> None:
        send = self._sender(connection)
        while True:
            self._answer(connection, link_id, over, send)

    def _answer(self, connection: socket.socket, link_id: bytes, over: Callable[[], bool], send: Send) -> None:
        assert self._guard is not None
        guard = self._guard
        header = wire.receive_bytes(connection, wire.REQUEST.size, stop=over, idle_s=float("inf"))
        id_length, num_pieces = wire.REQUEST.unpack(header)
        if id_length > wire.MAX_LEASE_ID_BYTES or not 0 < num_pieces <= wire.MAX_PIECES:
            raise wire.Disconnected("request out of bounds")
        body = wire.receive_bytes(connection, id_length + num_pieces * wire.PIECE.size, stop=over)
        lease_id = body[:id_length].decode(errors="replace")
        pieces = list(wire.PIECE.iter_unpack(body[id_length:]))
        ranges = guard.begin_read(link_id, lease_id, pieces)
        if ranges is None:
            wire.send(connection, wire.REPLY.pack(wire.REFUSED, 0), stop=over)
            return
        try:
            size = sum(size for _, size in ranges)
            wire.send(connection, wire.REPLY.pack(wire.OK, size), stop=over)
            send(_merge(ranges), monotonic() + REQUEST_S)
        finally:
            guard.end_read(lease_id)

    def _sender(self, connection: socket.socket) -> Send:
        memory, stop = self._memory, self._listener.closing.is_set
        if isinstance(memory, HostMemory):
            return lambda ranges, end: _send_file(connection, memory.fd, ranges, stop, end)
        from engine.kv.device_memory import DeviceMemory
        from kv_transfer.staging import HostWindow  # loads torch

        assert isinstance(memory, DeviceMemory), memory
        window = HostWindow(memory)
        return lambda ranges, end: _send_chunks(connection, window.chunks(ranges), stop, end)


def _send_file(
    connection: socket.socket, fd: int, ranges: Sequence[tuple[int, int]], stop: Callable[[], bool], end: float
) -> None:
    for start, size in ranges:

        def send_some(num_sent: int, start: int = start, size: int = size) -> int:
            return os.sendfile(connection.fileno(), fd, start + num_sent, min(SEND_BYTES, size - num_sent))

        wire.progress(send_some, size, stop=stop, end=end)


def _send_chunks(connection: socket.socket, chunks: Iterator[memoryview], stop: Callable[[], bool], end: float) -> None:
    for chunk in chunks:

        def send_some(num_sent: int, chunk: memoryview = chunk) -> int:
            return connection.send(chunk[num_sent : num_sent + SEND_BYTES])

        wire.progress(send_some, len(chunk), stop=stop, end=end)


def _merge(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbours in memory become one."""
    merged: list[tuple[int, int]] = []
    for offset, size in ranges:
        if merged and sum(merged[-1]) == offset:
            merged[-1] = (merged[-1][0], merged[-1][1] + size)
        else:
            merged.append((offset, size))
    return merged
