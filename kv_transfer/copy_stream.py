"""Copies between places in a device's memory, by tables of rows, on a stream of their own.

One for each side of a worker that moves KV in device memory; called from copy threads, several at once. It takes all
its memory when it is made, because at that time there is some, and because an allocation in mid-service may stop the
whole device. It never waits for another stream and no other stream waits for it: a caller knows by then that what it
reads is final, and what was copied is in place when the call returns. The stream has the lowest priority.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from queue import Empty, SimpleQueue
from threading import Event

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import TransferError

log = logging.getLogger(__name__)

Rows = NDArray[np.int64]  # [rows, 3]: offset in the source, offset in the sink, size; in bytes

MAX_ROWS = 1 << 16  # in one launch
WIDEST = 16  # bytes that one thread moves at once


def packed(ranges: Sequence[tuple[int, int]]) -> Rows:
    """Rows that bring (offset, size) ranges of the source one after another to the start of the sink."""
    rows = np.empty((len(ranges), 3), np.int64)
    rows[:, ::2] = np.array(ranges, np.int64).reshape(-1, 2)
    rows[:, 1] = np.cumsum(rows[:, 2]) - rows[:, 2]
    return rows


class CopyStream:
    """`num_slots` calls of `run` at a time, and as many stages of `stage_bytes`; more callers wait.

    Raise torch.OutOfMemoryError when the device has no room for the stages.
    """

    def __init__(self, device: torch.device, *, num_slots: int = 2, stage_bytes: int = 0) -> None:
        self.device = device
        self.stage_bytes = stage_bytes
        cuda = device.type == "cuda"
        self._stages: SimpleQueue[Tensor] = SimpleQueue()
        self._pinned: SimpleQueue[Tensor] = SimpleQueue()
        self._slots: SimpleQueue[_Slot] = SimpleQueue()
        self._stream = torch.cuda.Stream(device, priority=0) if cuda else None  # type: ignore[no-untyped-call]
        self._kernel = cuda and find_spec("triton") is not None
        self._num_processors = torch.cuda.get_device_properties(device).multi_processor_count if cuda else 0
        if cuda and not self._kernel:
            log.warning("triton is not installed: KV moves with one copy command for each piece")
        with self._on_stream():
            for _ in range(num_slots):
                self._stages.put(torch.empty(stage_bytes, dtype=torch.uint8, device=device))
                self._slots.put(_Slot(device))
        if self._kernel:  # compile it now
            few = torch.zeros(2 * WIDEST, dtype=torch.uint8, device=device)
            torch.cuda.current_stream(device).synchronize()
            with self._slot() as slot:
                self._submit(slot, few, few, np.array([[0, WIDEST, WIDEST]]))
                slot.finish()

    @contextmanager
    def stage(self) -> Iterator[Tensor]:
        """A buffer of `stage_bytes` on the device to have alone: uint8."""
        stage = self._stages.get()
        try:
            yield stage
        finally:
            self._stages.put(stage)

    @contextmanager
    def pinned(self) -> Iterator[Tensor]:
        """A buffer of `stage_bytes` in host memory to have alone: uint8, made when it is first needed."""
        try:
            buffer = self._pinned.get_nowait()
        except Empty:
            buffer = torch.empty(self.stage_bytes, dtype=torch.uint8, pin_memory=self._stream is not None)
        try:
            yield buffer
        finally:
            self._pinned.put(buffer)

    def copy(self, host: Tensor, sink: Tensor) -> None:
        """From pinned host memory. Blocking, GIL-free."""
        with self._slot() as slot:
            sink.copy_(host, non_blocking=True)
            slot.finish()

    def run(self, source: Tensor, sink: Tensor, rows: Rows, stop: Event) -> None:
        """Copy the rows, whose places in the sink do not overlap; both are uint8 and contiguous. Blocking, GIL-free.

        When it returns or raises, nothing is being copied any more. Raise TransferError when `stop` was set before
        the last rows were submitted. What has been submitted is waited for without a deadline: it depends on no
        other process, and the caller could do nothing with blocks that may still be written.
        """
        _check(rows, len(source), len(sink))
        with self._slot() as slot:
            for start in range(0, len(rows), MAX_ROWS):
                if stop.is_set():
                    raise TransferError("stopped", retryable=True)
                self._submit(slot, source, sink, rows[start : start + MAX_ROWS])
                slot.finish()

    def _submit(self, slot: "_Slot", source: Tensor, sink: Tensor, rows: Rows) -> None:
        if not self._kernel:
            for source_start, sink_start, size in rows.tolist():
                target = sink[sink_start : sink_start + size]
                target.copy_(source[source_start : source_start + size], non_blocking=True)
            return
        from kv_transfer.row_copy import copy_rows

        table, host = slot.table[: len(rows)], slot.host[: len(rows)]
        host.numpy()[:] = rows
        table.copy_(host, non_blocking=True)
        copy_rows(source, sink, table, _unit(rows, source, sink), int(rows[:, 2].max()), self._num_processors)

    @contextmanager
    def _slot(self) -> Iterator["_Slot"]:
        """A slot to have alone, on the stream. Its last work has ended."""
        slot = self._slots.get()
        try:
            with self._on_stream():
                yield slot
        finally:
            self._slots.put(slot)

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            yield


class _Slot:
    """What one call has to itself."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        num_rows = MAX_ROWS if cuda else 0
        self.host = torch.empty((num_rows, 3), dtype=torch.int64, pin_memory=cuda)
        self.table = torch.empty((num_rows, 3), dtype=torch.int64, device=device)
        self._done = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        """Wait for what was submitted, without the interpreter lock.

        It spins, for about half a millisecond a GiB: to sleep until an interrupt came took a quarter longer.
        """
        if self._done is not None:
            self._done.record()
            self._done.synchronize()


def _check(rows: Rows, source_bytes: int, sink_bytes: int) -> None:
    """A kernel has no bounds of its own."""
    assert rows.shape[1:] == (3,), rows.shape
    if len(rows):
        source, sink, size = rows.T
        assert rows.min() >= 0, rows.min()
        assert (source + size).max() <= source_bytes, ((source + size).max(), source_bytes)
        assert (sink + size).max() <= sink_bytes, ((sink + size).max(), sink_bytes)


def _unit(rows: Rows, source: Tensor, sink: Tensor) -> int:
    """The largest power of two, up to WIDEST, that divides every address and size."""
    bits = int(np.bitwise_or.reduce(rows, axis=None)) | source.data_ptr() | sink.data_ptr() | WIDEST
    return bits & -bits
