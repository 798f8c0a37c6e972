"""The sink's end of NCCL: packed pieces are received into stages in the memory of the sink's device.

For sinks and sources on different hosts. One reader for each link, with one communicator of two ranks, which is made
with the link. When it fails it is aborted alone, and the next read makes a new one. NCCL's own connections neither
prove who is there nor hide the bytes: they belong on a network that only the deployment reaches.
"""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Lock
from time import monotonic

import torch
from torch import Tensor

from engine.errors import TransferError
from kv_transfer.transports import nccl_wire as wire
from kv_transfer.transports import tcp_wire
from kv_transfer.transports.base import Run
from kv_transfer.transports.listener import dial, parse_address
from kv_transfer.transports.nccl_communicator import CupyNccl, Joiner, Nccl
from kv_transfer.transports.nccl_lane import STOP_S, InFlight, Lane, join_lane

NAME = "nccl"
TICK_S = 0.05


@dataclass(frozen=True, slots=True)
class NcclConfig:
    """Seconds. `batch_bytes`: what a sink asks for at once; `chunk_bytes`: what a source sends at once.

    A source keeps `num_stages` buffers of `chunk_bytes` on its device for all its sinks together.
    """

    join_s: float = 4.0  # to make a communicator, without a sign of the peer
    transfer_s: float = 5.0  # for what one read asks
    batch_bytes: int = 32 << 20
    chunk_bytes: int = 16 << 20
    num_stages: int = 8
    max_communicators: int = 32


class NcclSink:
    """`device` is where the stages lie. Raise ImportError when cupy or its NCCL is missing."""

    name = NAME

    def __init__(
        self, token: str, device: torch.device, *, config: NcclConfig | None = None, nccl: Nccl | None = None
    ) -> None:
        self._config = config or NcclConfig()
        self._joiner = Joiner(nccl or CupyNccl(device), device, self._config.join_s)
        self._token = token

    def connect(self, address: str, key: bytes, size: int) -> "NcclReader":  # noqa: ARG002
        reader = NcclReader(parse_address(address, key), key, self._token, self._joiner, self._config)
        reader.warm_up()
        return reader


class NcclReader:
    name = NAME

    def __init__(self, address: tuple[str, int], key: bytes, token: str, joiner: Joiner, config: NcclConfig) -> None:
        self.batch_bytes = config.batch_bytes
        self._address = address
        self._key = key
        self._token = token
        self._joiner = joiner
        self._config = config
        self._turn = Lock()  # requests, replies and receives come in one order on both ends
        self._lane: Lane | None = None
        self._chunk_bytes = 0

    def warm_up(self) -> None:
        """Fail now rather than at the first piece."""
        self._usable_lane(lambda: False)

    def read_into(self, lease_id: str, runs: Sequence[Run], sizes: Sequence[int], stage: Tensor, stop: Event) -> None:
        expected = sum(run.num_blocks * size for run, size in zip(runs, sizes, strict=True))
        assert len(stage) == expected, (len(stage), expected)
        with self._my_turn(stop):
            lane = self._usable_lane(stop.is_set)
            flight = self._ask(lane, lease_id, runs, stage, stop)
        lane.wait(flight)

    def close(self) -> None:
        if self._lane is not None:
            self._lane.close()
            self._lane = None

    @contextmanager
    def _my_turn(self, stop: Event) -> Iterator[None]:
        end = monotonic() + self._config.transfer_s
        while not self._turn.acquire(timeout=TICK_S):
            if stop.is_set() or monotonic() > end:
                raise TransferError("no turn on the communicator in time", retryable=True)
        try:
            yield
        finally:
            self._turn.release()

    def _usable_lane(self, stop: Callable[[], bool]) -> Lane:
        """The lane, or a new one when it has failed."""
        if self._lane is not None:
            if self._lane.usable:
                return self._lane
            self.close()
        try:
            connection = dial(self._address, self._key, self._token, wire.MAGIC, stop=stop)
            try:
                self._lane = self._join(connection, stop)
            except BaseException:
                connection.close()
                raise
        except (tcp_wire.Disconnected, OSError) as error:
            raise TransferError(f"the source's NCCL port cannot be used: {error}", retryable=True) from error
        return self._lane

    def _join(self, connection: socket.socket, stop: Callable[[], bool]) -> Lane:
        invitation = tcp_wire.receive_bytes(connection, wire.INVITATION.size, stop=stop)
        status, chunk_bytes, unique_id = wire.INVITATION.unpack(invitation)
        if status != wire.OK:
            raise TransferError("the source has no room for another communicator", retryable=True)
        if not 0 < chunk_bytes <= wire.MAX_CHUNK_BYTES:
            raise tcp_wire.Disconnected("chunks of an impossible size")
        self._chunk_bytes = chunk_bytes
        return join_lane(
            self._joiner, connection, unique_id, wire.SINK_RANK, transfer_s=self._config.transfer_s, stop=stop
        )

    def _ask(self, lane: Lane, lease_id: str, runs: Sequence[Run], stage: Tensor, stop: Event) -> InFlight:
        """Post what receives the pieces. A lane that is out of step fails."""
        try:
            return self._exchange(lane, lease_id, runs, stage, stop)
        except (tcp_wire.Disconnected, OSError) as error:
            lane.fail(f"the control connection failed: {error}")
            raise TransferError(f"the source's control connection failed: {error}", retryable=True) from error

    def _exchange(self, lane: Lane, lease_id: str, runs: Sequence[Run], stage: Tensor, stop: Event) -> InFlight:
        name = lease_id.encode()
        over = _Patience(stop)
        request = wire.REQUEST.pack(len(name), len(runs), len(stage)) + name
        request += b"".join(wire.RUN.pack(run.layer_group, run.first_block, run.num_blocks) for run in runs)
        tcp_wire.send(lane.connection, request, stop=over)
        reply = tcp_wire.receive_bytes(lane.connection, wire.REPLY.size, stop=over)
        status, size = wire.REPLY.unpack(reply)
        if status == wire.REFUSED:
            raise TransferError("the source refused to send: the lease has ended", retryable=True)
        if status != wire.OK or size != len(stage):
            raise tcp_wire.Disconnected("another number of bytes than asked for")
        try:
            return lane.receive(torch.split(stage, self._chunk_bytes), stop)
        except BaseException as error:  # whatever it is, some may be on their way into the stage
            lane.fail(str(error))
            raise


class _Patience:
    """Says stop a while after `stop`: a request under way gets its reply very soon, and both ends stay in step."""

    def __init__(self, stop: Event) -> None:
        self._stop = stop
        self._end = 0.0

    def __call__(self) -> bool:
        if not self._stop.is_set():
            return False
        self._end = self._end or monotonic() + STOP_S
        return monotonic() > self._end
