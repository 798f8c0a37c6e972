"""What sink and source say on a TCP data connection. Fixed binary headers, little endian; nothing is unpickled.

    source: GREETING (magic, challenge)
    sink:   PROOF    (magic, link id, challenge_response(token, challenge + link key))
    source: magic, or the end of the connection
    then, any number of times:
    sink:   REQUEST  (length of lease id, number of pieces), lease id, that many PIECE (layer group, block index)
    source: REPLY    (status, number of bytes), then the bytes of the pieces one after another

Sockets are blocking with the kernel's timeouts, because one recv with MSG_WAITALL for a whole piece is faster than
many on a non-blocking socket; every wait here comes back after a tick to look at deadlines and at `stop`.
"""

import socket
import struct
from collections.abc import Callable
from time import monotonic

from kv_transfer.transports.base import LINK_ID_BYTES, LINK_KEY_BYTES

NAME = "tcp"
MAGIC = b"BATONKV1"
CHALLENGE_BYTES = 32
DIGEST_BYTES = 32
GREETING = struct.Struct(f"<8s{CHALLENGE_BYTES}s")
PROOF = struct.Struct(f"<8s{LINK_ID_BYTES}s{DIGEST_BYTES}s")
REQUEST = struct.Struct("<HI")
PIECE = struct.Struct("<II")
REPLY = struct.Struct("<IQ")
OK, REFUSED = 0, 1
MAX_LEASE_ID_BYTES = 512
MAX_PIECES = 4096
TICK_S = 0.1
IO_S = 5.0  # without a single byte moving

assert LINK_KEY_BYTES > LINK_ID_BYTES


class Disconnected(Exception):
    """The other end is gone, silent for too long, or not talking this protocol."""


def prepare(connection: socket.socket, receive_tick_s: float = TICK_S) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option, seconds in ((socket.SO_RCVTIMEO, receive_tick_s), (socket.SO_SNDTIMEO, TICK_S)):
        whole, part = divmod(seconds, 1)
        connection.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", int(whole), int(part * 1e6)))


def receive(connection: socket.socket, into: memoryview, *, stop: Callable[[], bool], idle_s: float = IO_S) -> None:
    """Fill the buffer. Raise Disconnected when nothing came for `idle_s` seconds, or `stop` said so."""
    num_received = 0
    last = monotonic()
    while num_received < len(into):
        if stop():
            raise Disconnected("stopped")
        try:
            count = connection.recv_into(into[num_received:], 0, socket.MSG_WAITALL)
        except BlockingIOError:
            if monotonic() - last > idle_s:
                raise Disconnected("silent for too long") from None
            continue
        if count == 0:
            raise Disconnected("closed by the other end")
        num_received += count
        last = monotonic()


def receive_bytes(connection: socket.socket, size: int, *, stop: Callable[[], bool], idle_s: float = IO_S) -> bytearray:
    data = bytearray(size)
    receive(connection, memoryview(data), stop=stop, idle_s=idle_s)
    return data


def send(connection: socket.socket, data: bytes, *, stop: Callable[[], bool]) -> None:
    progress(lambda num_sent: connection.send(data[num_sent:]), len(data), stop=stop, end=monotonic() + IO_S)


def progress(step: Callable[[int], int], size: int, *, stop: Callable[[], bool], end: float) -> None:
    """Call `step(bytes done)`, which does some more and says how many, until all is done or the time is over."""
    num_done = 0
    while num_done < size:
        if stop() or monotonic() > end:
            raise Disconnected("stopped, or not taken in time")
        try:
            num_done += step(num_done)
        except BlockingIOError:
            continue
