"""The source's end of NCCL: packs the pieces that a sink asks for and sends them from stages on its device.

Each connection of a sink is served by a thread with a communicator of its own, which ends with the connection. A
request's blocks are held through the ReadGuard while they are packed; what is sent lies in a stage, so a sink that
takes nothing holds up its own lane alone, until that is late.
"""

import select
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue

import torch
from torch import Tensor

from engine.errors import TransferError
from engine.kv.device_memory import DeviceMemory
from kv_transfer.copy_stream import CopyStream, packed
from kv_transfer.transports import nccl_wire as wire
from kv_transfer.transports import tcp_wire
from kv_transfer.transports.base import ReadGuard
from kv_transfer.transports.listener import LinkListener
from kv_transfer.transports.nccl import NAME, NcclConfig
from kv_transfer.transports.nccl_communicator import CupyNccl, Joiner, Nccl
from kv_transfer.transports.nccl_lane import InFlight, Lane, join_lane

WINDOW = 2  # chunks of one sink in flight: one is packed while another is sent
NEXT_REQUEST_MS = 1  # a busy sink's next request is here by then; otherwise its stages are wanted back

Ranges = Sequence[tuple[int, int]]  # (offset, size)


class NcclServer:
    """Takes the memory for its stages when it is made.

    Raise torch.OutOfMemoryError, or ImportError when cupy or its NCCL is missing.
    """

    name = NAME
    checksums = False  # no CPU touches the bytes
    worthwhile_bytes = 16 << 20

    def __init__(
        self,
        memory: DeviceMemory,
        *,
        host: str,
        token: str,
        port: int = 0,
        advertised_host: str | None = None,
        config: NcclConfig | None = None,
        nccl: Nccl | None = None,
    ) -> None:
        self._config = config or NcclConfig()
        self._memory = memory
        self._joiner = Joiner(nccl or CupyNccl(memory.device), memory.device, self._config.join_s)
        self._copies = CopyStream(memory.device)
        self._stages: SimpleQueue[Tensor] = SimpleQueue()
        for _ in range(self._config.num_stages):
            self._stages.put(torch.empty(self._config.chunk_bytes, dtype=torch.uint8, device=memory.device))
        self._guard: ReadGuard | None = None
        self._listener = LinkListener(
            self._serve,
            wire.MAGIC,
            host=host,
            token=token,
            port=port,
            advertised_host=advertised_host,
            max_connections=self._config.max_communicators,
        )
        self.address = self._listener.address

    def reaches(self, boot_id: str) -> bool:  # noqa: ARG002
        return True

    def start(self, guard: ReadGuard) -> None:
        self._guard = guard
        self._listener.start(guard)

    def key(self, link_key: bytes) -> bytes:
        return link_key

    def close(self) -> None:
        self._listener.close()

    def _serve(self, connection: socket.socket, link_id: bytes, over: Callable[[], bool]) -> None:
        window = _Window(self._join(connection, over), self._stages, self._config.transfer_s)
        try:
            while True:
                self._answer(window, connection, link_id, over)
                if not _readable(connection):
                    window.drain()
        finally:
            window.close()

    def _join(self, connection: socket.socket, over: Callable[[], bool]) -> Lane:
        unique_id = self._joiner.unique_id()
        if unique_id is None:
            tcp_wire.send(connection, wire.INVITATION.pack(wire.REFUSED, 0, b""), stop=over)
            raise tcp_wire.Disconnected("too many communicators are being made")
        tcp_wire.send(connection, wire.INVITATION.pack(wire.OK, self._config.chunk_bytes, unique_id), stop=over)
        return join_lane(
            self._joiner, connection, unique_id, wire.SOURCE_RANK, transfer_s=self._config.transfer_s, stop=over
        )

    def _answer(self, window: "_Window", connection: socket.socket, link_id: bytes, over: Callable[[], bool]) -> None:
        assert self._guard is not None
        lease_id, pieces, wanted = _read_request(connection, over)
        ranges = self._guard.begin_read(link_id, lease_id, pieces)
        if ranges is None:
            tcp_wire.send(connection, wire.REPLY.pack(wire.REFUSED, 0), stop=over)
            return
        try:
            size = sum(size for _, size in ranges)
            status = wire.OK if size == wanted else wire.WRONG_SIZE
            tcp_wire.send(connection, wire.REPLY.pack(status, size), stop=over)
            if status == wire.OK:
                for chunk in cut(ranges, self._config.chunk_bytes):
                    self._send(window, chunk)
        finally:
            self._guard.end_read(lease_id)

    def _send(self, window: "_Window", ranges: Ranges) -> None:
        stage = window.take()
        size = sum(size for _, size in ranges)
        try:
            self._copies.run(self._memory.tensor, stage, packed(ranges), self._listener.closing)
        except BaseException:
            self._stages.put(stage)
            raise
        window.send(stage, size)


class _Window:
    """What is in flight on one lane, and the stages it lies in. Of one thread."""

    def __init__(self, lane: Lane, stages: "SimpleQueue[Tensor]", wait_s: float) -> None:
        self._lane = lane
        self._stages = stages
        self._wait_s = wait_s
        self._sending: deque[tuple[InFlight, Tensor]] = deque()

    def take(self) -> Tensor:
        """A stage that nothing is sent from, for `send`. Raise TransferError."""
        if len(self._sending) >= WINDOW:
            self._finish_first()
        try:
            return self._stages.get(timeout=self._wait_s)
        except Empty:
            raise TransferError("other sinks hold every stage", retryable=True) from None

    def send(self, stage: Tensor, size: int) -> None:
        try:
            flight = self._lane.send(stage[:size])
        except BaseException as error:
            self._lane.fail(str(error))
            self._stages.put(stage)
            raise
        self._sending.append((flight, stage))

    def drain(self) -> None:
        while self._sending:
            self._finish_first()

    def close(self) -> None:
        """Afterwards nothing is sent from a stage any more."""
        self._lane.close()
        while self._sending:
            self._stages.put(self._sending.popleft()[1])

    def _finish_first(self) -> None:
        flight, stage = self._sending[0]
        self._lane.wait(flight)
        self._sending.popleft()
        self._stages.put(stage)


def cut(ranges: Ranges, chunk_bytes: int) -> Iterator[list[tuple[int, int]]]:
    """The bytes of the ranges in order, in chunks of exactly `chunk_bytes`; the last may be smaller."""
    chunk: list[tuple[int, int]] = []
    room = chunk_bytes
    for offset, size in ranges:
        done = 0
        while done < size:
            part = min(size - done, room)
            chunk.append((offset + done, part))
            done += part
            room -= part
            if room == 0:
                yield chunk
                chunk, room = [], chunk_bytes
    if chunk:
        yield chunk


def _read_request(connection: socket.socket, over: Callable[[], bool]) -> tuple[str, list[tuple[int, int]], int]:
    """(lease id, pieces, bytes that the sink expects). Raise Disconnected."""
    header = tcp_wire.receive_bytes(connection, wire.REQUEST.size, stop=over, idle_s=float("inf"))
    id_length, num_runs, num_bytes = wire.REQUEST.unpack(header)
    if id_length > wire.MAX_LEASE_ID_BYTES or not 0 < num_runs <= wire.MAX_RUNS:
        raise tcp_wire.Disconnected("request out of bounds")
    body = tcp_wire.receive_bytes(connection, id_length + num_runs * wire.RUN.size, stop=over)
    runs = list(wire.RUN.iter_unpack(body[id_length:]))
    if not 0 < sum(count for _, _, count in runs) <= wire.MAX_PIECES:
        raise tcp_wire.Disconnected("request out of bounds")
    pieces = [(group, block) for group, first, count in runs for block in range(first, first + count)]
    return body[:id_length].decode(errors="replace"), pieces, num_bytes


def _readable(connection: socket.socket) -> bool:
    poller = select.poll()
    poller.register(connection, select.POLLIN)
    return bool(poller.poll(NEXT_REQUEST_MS))
