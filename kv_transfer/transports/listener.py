"""Connections that belong to a link: the source accepts and has each one prove its link, the sink dials.

One thread accepts, one serves each connection and ends with it. The proof is a challenge and response over the
deployment's token and the link's key, so neither travels (see `tcp_wire` for the messages).
"""

import hmac
import logging
import os
import socket
from collections.abc import Callable
from threading import Event, Lock, Thread
from typing import Protocol

from engine.auth import challenge_response, check_bind
from engine.errors import TransferError
from kv_transfer.transports import tcp_wire as wire
from kv_transfer.transports.base import LINK_ID_BYTES, LINK_KEY_BYTES, ReadGuard

log = logging.getLogger(__name__)

CONNECT_S = 2.0
HANDSHAKE_S = 2.0
IDLE_TICK_S = 1.0  # how late a connection notices that its link is gone


class Serve(Protocol):
    def __call__(self, connection: socket.socket, link_id: bytes, over: Callable[[], bool]) -> None:
        """Until the connection or the link is over. May raise Disconnected, OSError or TransferError to end it."""
        ...


class LinkListener:
    """`host` is bound, on `port` or a free one; `advertised_host` is what sinks on other machines connect to."""

    def __init__(
        self,
        serve: Serve,
        magic: bytes,
        *,
        host: str,
        token: str,
        port: int = 0,
        advertised_host: str | None = None,
        max_connections: int = 256,
    ) -> None:
        check_bind(host, token)
        self._serve_link = serve
        self._magic = magic
        self._token = token
        self._max_connections = max_connections
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=64)
        name = advertised_host or host
        bound_port = self._listener.getsockname()[1]
        self.address = f"[{name}]:{bound_port}" if ":" in name else f"{name}:{bound_port}"
        self._lock = Lock()
        self._connections: dict[socket.socket, Thread] = {}
        self.closing = Event()
        self._acceptor: Thread | None = None
        self._guard: ReadGuard | None = None

    def start(self, guard: ReadGuard) -> None:
        self._guard = guard
        self._acceptor = Thread(target=self._accept, name="kv-accept", daemon=True)
        self._acceptor.start()

    def close(self) -> None:
        """Blocking. Nothing is served afterwards."""
        self.closing.set()
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
        while not self.closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if not self.closing.wait(wire.TICK_S):  # for instance out of file descriptors: they may come back
                    log.warning("cannot accept a connection: %s", error)
                continue
            with self._lock:
                if len(self._connections) >= self._max_connections:
                    connection.close()
                    continue
                thread = Thread(target=self._serve, args=(connection,), name="kv-send", daemon=True)
                self._connections[connection] = thread
            try:
                thread.start()
            except RuntimeError as error:  # out of threads: they may come back
                log.warning("cannot serve a connection: %s", error)
                with self._lock:
                    del self._connections[connection]
                connection.close()

    def _serve(self, connection: socket.socket) -> None:
        assert self._guard is not None
        guard = self._guard
        try:
            wire.prepare(connection, IDLE_TICK_S)
            link_id = self._authenticate(connection, guard)

            def over() -> bool:
                return self.closing.is_set() or guard.link_key(link_id) is None

            self._serve_link(connection, link_id, over)
        except (wire.Disconnected, OSError) as error:
            log.debug("connection of a link ended: %s", error)
        except TransferError as error:
            log.warning("connection of a link failed: %s", error)
        finally:
            with self._lock:
                del self._connections[connection]
            connection.close()

    def _authenticate(self, connection: socket.socket, guard: ReadGuard) -> bytes:
        challenge = os.urandom(wire.CHALLENGE_BYTES)
        stop = self.closing.is_set
        wire.send(connection, wire.GREETING.pack(self._magic, challenge), stop=stop)
        proof = wire.receive_bytes(connection, wire.PROOF.size, stop=stop, idle_s=HANDSHAKE_S)
        magic, link_id, digest = wire.PROOF.unpack(proof)
        key = guard.link_key(link_id)
        if magic != self._magic or key is None:
            raise wire.Disconnected("no such link")
        if not hmac.compare_digest(challenge_response(self._token, challenge + key), digest):
            raise wire.Disconnected("wrong proof")
        wire.send(connection, self._magic, stop=stop)
        return bytes(link_id)


def parse_address(address: str, key: bytes) -> tuple[str, int]:
    """(host, port). Raise TransferError when address or key are not what a listener gives."""
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536) or len(key) != LINK_KEY_BYTES:
        raise TransferError("the source's address or key is malformed", retryable=True)
    return host.strip("[]"), int(port)


def dial(address: tuple[str, int], key: bytes, token: str, magic: bytes, *, stop: Callable[[], bool]) -> socket.socket:
    """A connection that has proven its link. Raise Disconnected or OSError."""
    connection = socket.create_connection(address, timeout=CONNECT_S)
    try:
        wire.prepare(connection)
        greeting = wire.receive_bytes(connection, wire.GREETING.size, stop=stop)
        their_magic, challenge = wire.GREETING.unpack(greeting)
        if their_magic != magic:
            raise wire.Disconnected("the other end does not talk this protocol")
        digest = challenge_response(token, challenge + key)
        wire.send(connection, wire.PROOF.pack(magic, key[:LINK_ID_BYTES], digest), stop=stop)
        if wire.receive_bytes(connection, len(magic), stop=stop) != magic:
            raise wire.Disconnected("the other end does not talk this protocol")
    except BaseException:
        connection.close()
        raise
    return connection


def hung_up(connection: socket.socket) -> bool:
    """Whether the other end has closed the connection. Takes nothing from it."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _shut(connection: socket.socket) -> None:
    """Wake whoever waits on it."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        log.debug("socket was closed already")
