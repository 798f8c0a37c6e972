"""Two-rank communicators of NCCL, and how one is made within a deadline.

`cupy.cuda.nccl` is loaded when a CupyNccl is made; tests put a queue in its place. Making a communicator blocks until
the peer comes and cannot be taken back: cupy has no non-blocking init, and aborting a communicator that another
thread is still making is undefined. So it is made in a daemon thread. When that is too late, the caller goes on
without it and the thread aborts what it gets as soon as it gets it; where the peer has died at the wrong moment that
may be never, so the number of threads that wait is limited.
"""

import logging
from collections.abc import Callable
from threading import Event, Lock, Thread
from time import monotonic
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.errors import TransferError
from kv_transfer.transports.nccl_wire import SOURCE_RANK

log = logging.getLogger(__name__)

TICK_S = 0.05
MAX_JOINING = 16


class Operation(Protocol):
    def wait(self) -> None:
        """Until it is done or aborted. Without a deadline: `abort` is what ends it."""
        ...


class Communicator(Protocol):
    """Any thread. Every method but `abort` raises TransferError when NCCL does, or after `abort`."""

    def send(self, buffer: Tensor) -> Operation:
        """Post it; the buffer must stay as it is until the operation is done. uint8, contiguous."""
        ...

    def receive(self, buffer: Tensor) -> Operation: ...

    def check(self) -> None:
        """Raise when something went wrong since."""
        ...

    def abort(self) -> None:
        """End what is in flight. When it returns, no operation reads or writes a buffer any more. Idempotent."""
        ...


class Nccl(Protocol):
    def unique_id(self) -> bytes: ...

    def join(self, unique_id: bytes, rank: int) -> Communicator:
        """Blocking until the other rank comes, with no way to stop it. Raise TransferError."""
        ...


class CupyNccl:
    """Raise ImportError when cupy or its NCCL is missing."""

    def __init__(self, device: torch.device) -> None:
        from cupy.cuda import nccl  # type: ignore[import-not-found, unused-ignore]

        if not nccl.available:
            raise ImportError("cupy finds no NCCL: install nvidia-nccl-cu13 (or the one of your CUDA version)")
        assert device.type == "cuda", device
        self.device = device
        self._nccl = nccl

    def unique_id(self) -> bytes:
        return bytes(self._nccl.get_unique_id())

    def join(self, unique_id: bytes, rank: int) -> "CupyCommunicator":
        with torch.cuda.device(self.device):  # of this thread: NCCL asks for it
            try:
                communicator = self._nccl.NcclCommunicator(2, unique_id, rank)
            except self._nccl.NcclError as error:
                raise TransferError(f"NCCL makes no communicator: {error}", retryable=True) from error
        return CupyCommunicator(self._nccl, communicator, 1 - rank, self.device)


class CupyCommunicator:
    """Owns an NCCL communicator and the stream on which it sends or receives."""

    def __init__(self, nccl: Any, communicator: Any, peer: int, device: torch.device) -> None:
        self._nccl = nccl
        self._communicator = communicator
        self._peer = peer
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._lock = Lock()  # NCCL wants one caller at a time, `abort` included

    def send(self, buffer: Tensor) -> "_StreamOperation":
        return self._post("send", buffer)

    def receive(self, buffer: Tensor) -> "_StreamOperation":
        return self._post("recv", buffer)

    def _post(self, name: str, buffer: Tensor) -> "_StreamOperation":
        with self._lock, torch.cuda.device(self._device):
            post = getattr(self._alive(), name)
            try:
                post(buffer.data_ptr(), buffer.nbytes, self._nccl.NCCL_INT8, self._peer, self._stream.cuda_stream)
            except self._nccl.NcclError as error:
                raise TransferError(f"NCCL: {error}", retryable=True) from error
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record(self._stream)
            return _StreamOperation(done)

    def check(self) -> None:
        with self._lock:
            try:
                self._alive().check_async_error()
            except self._nccl.NcclError as error:
                raise TransferError(f"NCCL: {error}", retryable=True) from error

    def abort(self) -> None:
        with self._lock:
            communicator, self._communicator = self._communicator, None
            if communicator is None:
                return
            try:
                with torch.cuda.device(self._device):
                    communicator.abort()
            except self._nccl.NcclError as error:
                log.warning("NCCL: aborting a communicator: %s", error)
            self._stream.synchronize()

    def _alive(self) -> Any:
        if self._communicator is None:
            raise TransferError("the communicator was aborted", retryable=True)
        return self._communicator


class _StreamOperation:
    def __init__(self, done: torch.cuda.Event) -> None:
        self._done = done

    def wait(self) -> None:
        self._done.synchronize()  # without the interpreter lock


class Joiner:
    """Makes communicators within a deadline. Any thread."""

    def __init__(self, nccl: Nccl, device: torch.device, join_s: float) -> None:
        self._nccl = nccl
        self._join_s = join_s
        self._lock = Lock()
        self._num_joining = 0
        self._token = torch.zeros(1, dtype=torch.uint8, device=device)

    def unique_id(self) -> bytes | None:
        """None when too many are being made: asking NCCL for one starts a thread that waits for both ranks."""
        with self._lock:
            return self._nccl.unique_id() if self._num_joining < MAX_JOINING else None

    def join(self, unique_id: bytes, rank: int, stop: Callable[[], bool]) -> Communicator:
        """A communicator that has carried a byte. Blocking; raise TransferError when it is too late or `stop` says so.

        NCCL connects to the peer at the first byte, which may block as well: so that belongs to making it.
        """
        with self._lock:
            if self._num_joining >= MAX_JOINING:
                raise TransferError("too many communicators are being made", retryable=True)
            self._num_joining += 1
        attempt = _Attempt()
        Thread(target=self._run, args=(attempt, unique_id, rank), name="kv-nccl-join", daemon=True).start()
        end = monotonic() + self._join_s
        while not attempt.done.wait(TICK_S):
            if (stop() or monotonic() > end) and attempt.give_up():
                raise TransferError("the peer did not join the communicator in time", retryable=True)
        return attempt.result()

    def _run(self, attempt: "_Attempt", unique_id: bytes, rank: int) -> None:
        try:
            communicator = self._nccl.join(unique_id, rank)
            try:
                post = communicator.send if rank == SOURCE_RANK else communicator.receive
                operation = post(self._token)
                attempt.posted(communicator)
                operation.wait()
                communicator.check()
            except TransferError:
                communicator.abort()
                raise
        except TransferError as error:
            attempt.settle(error)
        else:
            attempt.settle(communicator)
        finally:
            with self._lock:
                self._num_joining -= 1


class _Attempt:
    """To make one communicator. Either its caller gets it, or it is aborted."""

    def __init__(self) -> None:
        self.done = Event()
        self._lock = Lock()
        self._given_up = False
        self._posted: Communicator | None = None
        self._outcome: Communicator | TransferError | None = None

    def posted(self, communicator: Communicator) -> None:
        """All that is left is to wait for the peer, which aborting it ends."""
        with self._lock:
            self._posted = communicator
            given_up = self._given_up
        if given_up:
            communicator.abort()

    def settle(self, outcome: Communicator | TransferError) -> None:
        with self._lock:
            self._outcome = outcome
            given_up = self._given_up
            self.done.set()
        if given_up and not isinstance(outcome, TransferError):
            outcome.abort()

    def give_up(self) -> bool:
        """False when it has just been settled."""
        with self._lock:
            self._given_up = not self.done.is_set()
            posted = self._posted if self._given_up else None
        if posted is not None:
            posted.abort()
        return self._given_up

    def result(self) -> Communicator:
        assert self._outcome is not None
        if isinstance(self._outcome, TransferError):
            raise self._outcome
        return self._outcome
