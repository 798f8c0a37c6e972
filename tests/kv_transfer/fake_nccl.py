"""Communicators without a GPU: both ends in one process, bytes move when a send meets its receive."""

from collections import deque
from dataclasses import dataclass, field
from threading import Event, RLock

from torch import Tensor

from engine.errors import TransferError


class FakeOperation:
    def __init__(self) -> None:
        self.done = Event()

    def wait(self) -> None:
        assert self.done.wait(20), "nobody aborted an operation that cannot end"


@dataclass
class FakeNetwork:
    """What joins two ranks. While `held` nothing moves, as when the peer stands still."""

    lock: RLock = field(default_factory=RLock)
    arrived: tuple[Event, Event] = field(default_factory=lambda: (Event(), Event()))
    held: bool = False
    num_moved: int = 0
    aborted: list[int] = field(default_factory=list)
    error: str = ""
    _posted: tuple[deque, deque] = field(default_factory=lambda: (deque(), deque()))  # sends, receives

    def post(self, kind: int, buffer: Tensor) -> FakeOperation:
        operation = FakeOperation()
        with self.lock:
            self._posted[kind].append((operation, buffer))
            self.move()
        return operation

    def move(self) -> None:
        with self.lock:
            sends, receives = self._posted
            while sends and receives and not self.held:
                (sent, source), (received, sink) = sends.popleft(), receives.popleft()
                sink.copy_(source)
                self.num_moved += 1
                sent.done.set()
                received.done.set()

    def drop(self, kind: int) -> None:
        with self.lock:
            while self._posted[kind]:
                self._posted[kind].popleft()[0].done.set()

    def release(self) -> None:
        with self.lock:
            self.held = False
            self.move()


class FakeCommunicator:
    def __init__(self, network: FakeNetwork, rank: int) -> None:
        self._network = network
        self._rank = rank

    def send(self, buffer: Tensor) -> FakeOperation:
        self.check()
        return self._network.post(0, buffer)

    def receive(self, buffer: Tensor) -> FakeOperation:
        self.check()
        return self._network.post(1, buffer)

    def check(self) -> None:
        with self._network.lock:
            if self._rank in self._network.aborted or self._network.error:
                raise TransferError(self._network.error or "the communicator was aborted", retryable=True)

    def abort(self) -> None:
        with self._network.lock:
            if self._rank not in self._network.aborted:
                self._network.aborted.append(self._rank)
                self._network.drop(self._rank)  # the source is rank 0 and only sends


class FakeNccl:
    """`absent`: ranks that never come to join."""

    def __init__(self) -> None:
        self.networks: list[FakeNetwork] = []
        self.absent: set[int] = set()
        self.num_joins = 0

    def unique_id(self) -> bytes:
        self.networks.append(FakeNetwork())
        return len(self.networks).to_bytes(128, "little")

    def join(self, unique_id: bytes, rank: int) -> FakeCommunicator:
        self.num_joins += 1
        network = self.networks[int.from_bytes(unique_id, "little") - 1]
        if rank not in self.absent:
            network.arrived[rank].set()
        if not network.arrived[1 - rank].wait(20):
            raise TransferError("the other rank never came", retryable=True)
        return FakeCommunicator(network, rank)
