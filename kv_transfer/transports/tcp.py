"""The sink's end of a TCP data connection: bytes are received straight into the destination blocks.

One reader for each link, with as many connections as copy threads read at once. A connection on which anything went
wrong is closed, never reused: what it would still deliver belongs to nobody.
"""

import socket
from collections.abc import Callable, Sequence
from threading import Event, Lock

from engine.errors import TransferError
from kv_transfer.transports import tcp_wire as wire
from kv_transfer.transports.base import PART_BYTES, Arrived, Fetch
from kv_transfer.transports.listener import dial, parse_address

NAME = wire.NAME


class TcpSink:
    name = NAME

    def __init__(self, token: str) -> None:
        self._token = token

    def connect(self, address: str, key: bytes, size: int) -> "TcpReader":  # noqa: ARG002
        reader = TcpReader(parse_address(address, key), key, self._token)
        reader.warm_up()
        return reader


class TcpReader:
    name = NAME
    batch_bytes = 8 << 20  # enough to hide the round trip of a request

    def __init__(self, address: tuple[str, int], key: bytes, token: str) -> None:
        self._address = address
        self._key = key
        self._token = token
        self._lock = Lock()
        self._idle: list[socket.socket] = []

    def warm_up(self) -> None:
        """Fail now rather than at the first piece."""
        try:
            self._idle.append(self._dial(lambda: False))
        except (wire.Disconnected, OSError) as error:
            raise TransferError(f"the source's data port cannot be used: {error}", retryable=True) from error

    def read(self, lease_id: str, fetches: Sequence[Fetch], arrived: Arrived, stop: Event) -> None:
        connection: socket.socket | None = None
        try:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            connection = connection or self._dial(stop.is_set)
            refused = False
            for start in range(0, len(fetches), wire.MAX_PIECES):
                refused = refused or not self._exchange(
                    connection, lease_id, fetches[start : start + wire.MAX_PIECES], arrived, stop
                )
        except (wire.Disconnected, OSError) as error:
            if connection is not None:
                connection.close()
            raise TransferError(f"the source's data connection failed: {error}", retryable=True) from error
        with self._lock:
            self._idle.append(connection)
        if refused:
            raise TransferError("the source refused to send: the lease has ended", retryable=True)

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    def _exchange(
        self, connection: socket.socket, lease_id: str, fetches: Sequence[Fetch], arrived: Arrived, stop: Event
    ) -> bool:
        """False when the source refused."""
        name = lease_id.encode()
        pieces = b"".join(wire.PIECE.pack(fetch.layer_group, fetch.block_index) for fetch in fetches)
        wire.send(connection, wire.REQUEST.pack(len(name), len(fetches)) + name + pieces, stop=stop.is_set)
        status, size = wire.REPLY.unpack(wire.receive_bytes(connection, wire.REPLY.size, stop=stop.is_set))
        if status != wire.OK:
            return False
        if size != sum(len(fetch.into) for fetch in fetches):
            raise wire.Disconnected("another number of bytes than asked for")
        for fetch in fetches:
            for start in range(0, len(fetch.into), PART_BYTES):
                part = fetch.into[start : start + PART_BYTES]
                wire.receive(connection, part, stop=stop.is_set)
                arrived(part)
        return True

    def _dial(self, stop: Callable[[], bool]) -> socket.socket:
        return dial(self._address, self._key, self._token, wire.MAGIC, stop=stop)
