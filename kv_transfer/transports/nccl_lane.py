"""One communicator, the control connection beside it, and a watch over what is in flight. Both ends have one.

An operation on a communicator can only be waited for without a deadline, and only aborting the communicator ends it.
So a thread of the lane watches the operations in flight: one that is late, a peer that has hung up, an error that
NCCL reports, or a caller that wants to stop make the lane fail. A lane that has failed never works again; its peer
finds out by the end of the control connection. Whoever holds a lane closes it.
"""

import logging
import socket
from collections.abc import Callable, Sequence
from threading import Condition, Event, Thread
from time import monotonic

from torch import Tensor

from engine.errors import TransferError
from kv_transfer.transports import tcp_wire
from kv_transfer.transports.listener import hung_up
from kv_transfer.transports.nccl_communicator import Communicator, Joiner, Operation
from kv_transfer.transports.nccl_wire import JOINED

log = logging.getLogger(__name__)

TICK_S = 0.05
STOP_S = 0.5  # what is in flight has that long to end by itself, which spares the communicator


def join_lane(
    joiner: Joiner,
    connection: socket.socket,
    unique_id: bytes,
    rank: int,
    *,
    transfer_s: float,
    stop: Callable[[], bool],
) -> "Lane":
    """Raise TransferError, Disconnected or OSError; the connection is then still the caller's to close."""
    communicator = joiner.join(unique_id, rank, lambda: stop() or hung_up(connection))
    try:
        tcp_wire.send(connection, JOINED, stop=stop)
        if tcp_wire.receive_bytes(connection, len(JOINED), stop=stop) != JOINED:
            raise tcp_wire.Disconnected("the other end does not talk this protocol")
    except BaseException:
        communicator.abort()
        raise
    return Lane(communicator, connection, transfer_s)


class InFlight:
    """An operation and when it is late."""

    def __init__(self, operation: Operation, end: float, stop: Event | None) -> None:
        self.operation = operation
        self.end = end
        self.stop = stop

    def is_late(self, now: float) -> bool:
        if self.stop is not None and self.stop.is_set():
            self.end = min(self.end, now + STOP_S)
        return now > self.end


class Lane:
    """Any thread. `transfer_s`: how long one operation may take, from posting it."""

    def __init__(
        self,
        communicator: Communicator,
        connection: socket.socket,
        transfer_s: float,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.connection = connection
        self._communicator = communicator
        self._transfer_s = transfer_s
        self._clock = clock
        self._changed = Condition()
        self._in_flight: set[InFlight] = set()
        self._failure = ""
        self._watcher = Thread(target=self._watch, name="kv-nccl-watch", daemon=True)
        self._watcher.start()

    @property
    def usable(self) -> bool:
        return not self._failure and not hung_up(self.connection)

    def send(self, buffer: Tensor) -> InFlight:
        """Post it. Raise TransferError."""
        return self._track(self._communicator.send(buffer), None)

    def receive(self, buffers: Sequence[Tensor], stop: Event) -> InFlight:
        """Post all of them, to be waited for together. Raise TransferError; the lane must then be failed."""
        for buffer in buffers:
            operation = self._communicator.receive(buffer)
        return self._track(operation, stop)

    def wait(self, flight: InFlight) -> None:
        """Raise TransferError when the lane has failed before this was done; then nothing touches buffers any more."""
        flight.operation.wait()
        with self._changed:
            self._in_flight.discard(flight)
        if not self._failure:
            try:
                self._communicator.check()
            except TransferError as error:
                self.fail(str(error))
        if self._failure:
            self._communicator.abort()  # or wait until another thread has done it
            raise TransferError(self._failure, retryable=True)

    def fail(self, reason: str) -> None:
        """End what is in flight and hang up. When it returns, nothing of this lane touches a buffer any more."""
        with self._changed:
            self._failure = self._failure or reason  # first: whoever an abort wakes must see why
            self._changed.notify_all()
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            log.debug("the peer had hung up already")
        self._communicator.abort()

    def close(self) -> None:
        self.fail("the lane was closed")
        self._watcher.join()
        self.connection.close()

    def _track(self, operation: Operation, stop: Event | None) -> InFlight:
        flight = InFlight(operation, self._clock() + self._transfer_s, stop)
        with self._changed:
            self._in_flight.add(flight)
            self._changed.notify_all()
        return flight

    def _watch(self) -> None:
        while not self._failure:
            if reason := self._trouble():
                log.warning("NCCL transfer: %s", reason)
                self.fail(reason)
            with self._changed:
                self._changed.wait_for(lambda: self._failure != "", TICK_S)
                self._changed.wait_for(lambda: self._failure != "" or bool(self._in_flight))

    def _trouble(self) -> str:
        with self._changed:
            flights = list(self._in_flight)
        if not flights:
            return ""
        now = self._clock()
        if any(flight.is_late(now) for flight in flights):
            return "the peer was silent for too long"
        if hung_up(self.connection):
            return "the peer hung up"
        try:
            self._communicator.check()
        except TransferError as error:
            return str(error)
        return ""
