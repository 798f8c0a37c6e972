"""The source's data port: sends pieces straight from the pool's memory file, without passing through Python, or from
device memory by way of a window of pinned memory for each connection.

One thread accepts, one serves each connection. A connection belongs to one link, which its first message proves; it
can read only final pieces of leases that this link has opened, and ends with the link. Every send holds the lease's
blocks through the ReadGuard, so they are not reused under it.
"""

import hmac
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from threading import Event, Lock, Thread
from time import monotonic

from engine.auth import challenge_response, check_bind
from engine.kv.memory import HostMemory, KvMemory
from kv_transfer.transports import tcp_wire as wire
from kv_transfer.transports.base import ReadGuard

log = logging.getLogger(__name__)

SEND_BYTES = 1 << 20  # in one sendfile call, so that deadlines are looked at in between
REQUEST_S = 60.0  # a reader slower than that loses the connection, so a lease is not quarantined for ever
HANDSHAKE_S = 2.0
IDLE_TICK_S = 1.0  # how late a connection notices that its link is gone

Send = Callable[[Sequence[tuple[int, int]], float], None]  # (offset, size) ranges, and until when


class TcpServer:
    """`host` is bound, on `port` or a free one; `advertised_host` is what sinks on other machines connect to."""

    name = wire.NAME
    checksums = True

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
        check_bind(host, token)
        self._memory = memory
        self._token = token
        self._max_connections = max_connections
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=64)
        name = advertised_host or host
        bound_port = self._listener.getsockname()[1]
        self.address = f"[{name}]:{bound_port}" if ":" in name else f"{name}:{bound_port}"
        self._lock = Lock()
        self._connections: dict[socket.socket, Thread] = {}
        self._closing = Event()
        self._acceptor: Thread | None = None
        self._guard: ReadGuard | None = None

    def start(self, guard: ReadGuard) -> None:
        self._guard = guard
        self._acceptor = Thread(target=self._accept, name="kv-accept", daemon=True)
        self._acceptor.start()

    def reaches(self, boot_id: str) -> bool:  # noqa: ARG002
        return True

    def key(self, link_key: bytes) -> bytes:
        return link_key

    def close(self) -> None:
        self._closing.set()
        _shut(self._listener)
        if self._acceptor is not None:
            self._acceptor.join()
        self._listener.close()
        with self._lock:
            connections = dict(self._connections)
        for connection in connections:
            _shut(connection)
        for thread in connections.values():
            thread.join()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if not self._closing.wait(wire.TICK_S):  # for instance out of file descriptors: they may come back
                    log.warning("cannot accept a data connection: %s", error)
                continue
            with self._lock:
                if len(self._connections) >= self._max_connections:
                    connection.close()
                    continue
                thread = Thread(target=self._serve, args=(connection,), name="kv-send", daemon=True)
                self._connections[connection] = thread
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            wire.prepare(connection, IDLE_TICK_S)
            link_id = self._authenticate(connection)
            send = self._sender(connection)
            while True:
                self._answer(connection, link_id, send)
        except (wire.Disconnected, OSError) as error:
            log.debug("data connection ended: %s", error)
        finally:
            with self._lock:
                del self._connections[connection]
            connection.close()

    def _authenticate(self, connection: socket.socket) -> bytes:
        assert self._guard is not None
        challenge = os.urandom(wire.CHALLENGE_BYTES)
        stop = self._closing.is_set
        wire.send(connection, wire.GREETING.pack(wire.MAGIC, challenge), stop=stop)
        proof = wire.receive_bytes(connection, wire.PROOF.size, stop=stop, idle_s=HANDSHAKE_S)
        magic, link_id, digest = wire.PROOF.unpack(proof)
        key = self._guard.link_key(link_id)
        if magic != wire.MAGIC or key is None:
            raise wire.Disconnected("no such link")
        if not hmac.compare_digest(challenge_response(self._token, challenge + key), digest):
            raise wire.Disconnected("wrong proof")
        wire.send(connection, wire.MAGIC, stop=stop)
        return bytes(link_id)

    def _answer(self, connection: socket.socket, link_id: bytes, send: Send) -> None:
        assert self._guard is not None
        guard = self._guard

        def over() -> bool:
            return self._closing.is_set() or guard.link_key(link_id) is None

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
        memory, stop = self._memory, self._closing.is_set
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


def _shut(connection: socket.socket) -> None:
    """Wake whoever waits on it."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        log.debug("socket was closed already")
