"""Copies between places in a device's memory, by tables of rows, on a stream of their own.

One for each side of a worker that moves KV in device memory; called from copy threads, several at once. It takes all
its memory when it is made, because at that time there is some, and because an allocation in mid-service may stop the
whole device. It never waits for another stream and no other stream waits for it: a caller knows by then that what it
reads is final, and what was copied is in place when the call returns. The stream has the lowest priority.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from queue import Empty, SimpleQueue
from threading import Event
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import TransferError
from kv_transfer.transports import cuda_driver as driver

if TYPE_CHECKING:
    from kv_transfer.row_copy import RowCopy

log = logging.getLogger(__name__)

Rows = NDArray[np.int64]  # [rows, 3]: offset in the source, offset in the sink, size; in bytes

ROW_BYTES = 24
MAX_ROWS = 1 << 16  # in one launch
WIDEST = 16  # bytes that one thread moves at once


class RowTable:
    """Rows, and what can be worked out before anybody waits for their copies. Raise AssertionError for what is none."""

    def __init__(self, rows: Rows) -> None:
        assert rows.dtype == np.int64, rows.dtype
        assert rows.shape[1:] == (3,), rows.shape
        self.rows = rows
        self.source_end = self.sink_end = self.max_bytes = self.bits = 0
        if len(rows):
            assert rows.min() >= 0, rows.min()
            source, sink, size = rows.T
            self.source_end, self.sink_end = int((source + size).max()), int((sink + size).max())
            self.max_bytes = int(size.max())
            self.bits = int(np.bitwise_or.reduce(rows, axis=None))


@dataclass(frozen=True, slots=True)
class Part:
    """`count` rows of a table from `first` on, with `shift` added to each."""

    table: RowTable
    first: int
    count: int
    shift: tuple[int, int, int] = (0, 0, 0)

    def check(self, source_bytes: int, sink_bytes: int) -> None:
        """A kernel has no bounds of its own."""
        source, sink, size = self.shift
        assert min(self.first, self.count, source, sink, size) >= 0, self
        assert self.first + self.count <= len(self.table.rows), self
        assert self.table.source_end + source + size <= source_bytes, (self, source_bytes)
        assert self.table.sink_end + sink + size <= sink_bytes, (self, sink_bytes)

    @property
    def rows(self) -> Rows:
        return self.table.rows[self.first : self.first + self.count]

    def unit(self, *addresses: int) -> int:
        """The largest power of two, up to WIDEST, that divides the addresses and everything in the rows."""
        bits = self.table.bits | WIDEST
        for number in (*self.shift, *addresses):
            bits |= number
        return bits & -bits

    def cut(self, max_rows: int) -> "Iterator[Part]":
        for done in range(0, self.count, max_rows):
            yield Part(self.table, self.first + done, min(max_rows, self.count - done), self.shift)


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
        self._kernel = _kernel(device) if cuda else None
        with self._on_stream():
            for _ in range(num_slots):
                self._stages.put(torch.empty(stage_bytes, dtype=torch.uint8, device=device))
                self._slots.put(_Slot(device, self._stream))

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
        with self._slot() as slot, self._on_stream():
            sink.copy_(host, non_blocking=True)
            slot.finish()

    def run(self, source: Tensor, sink: Tensor, rows: Rows, stop: Event) -> None:
        """`run_parts` of all rows of a table."""
        self.run_parts(source, sink, [Part(RowTable(rows), 0, len(rows))], stop)

    def run_parts(self, source: Tensor, sink: Tensor, parts: Sequence[Part], stop: Event) -> None:
        """Copy the rows, whose places in the sink do not overlap; both are uint8 and contiguous. Blocking, GIL-free.

        When it returns or raises, nothing is being copied any more. Raise TransferError when `stop` was set before
        the last rows were submitted. What has been submitted is waited for without a deadline: it depends on no
        other process, and the caller could do nothing with blocks that may still be written.
        """
        for part in parts:
            part.check(len(source), len(sink))
        with self._slot() as slot:
            try:
                for part in parts:
                    for some in part.cut(MAX_ROWS):
                        if stop.is_set():
                            raise TransferError("stopped", retryable=True)
                        self._submit(slot, source, sink, some)
            finally:
                slot.finish()

    def _submit(self, slot: "_Slot", source: Tensor, sink: Tensor, part: Part) -> None:
        """A copy waits for every microsecond that the host takes here."""
        if self._kernel is None or self._stream is None:
            with self._on_stream():
                for source_start, sink_start, size in (part.rows + part.shift).tolist():
                    target = sink[sink_start : sink_start + size]
                    target.copy_(source[source_start : source_start + size], non_blocking=True)
            return
        start = slot.take(part.count)
        np.add(part.rows, part.shift, out=slot.rows[start : start + part.count])
        addresses, stream = (source.data_ptr(), sink.data_ptr()), self._stream.cuda_stream
        table, unit, max_bytes = slot.table + start * ROW_BYTES, part.unit(*addresses), part.table.max_bytes
        with driver.context(self.device.index):
            driver.upload(table, slot.host + start * ROW_BYTES, part.count * ROW_BYTES, stream)
            self._kernel.launch(*addresses, table, part.count, unit, max_bytes + part.shift[2], stream)

    @contextmanager
    def _slot(self) -> Iterator["_Slot"]:
        """A slot to have alone. Its last work has ended."""
        slot = self._slots.get()
        try:
            yield slot
        finally:
            self._slots.put(slot)

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            yield


class _Slot:
    """What one call has to itself: `rows` of a table in pinned memory (`host`) and on the device (`table`)."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        num_rows = MAX_ROWS if stream is not None else 0
        self._pinned = torch.empty((num_rows, 3), dtype=torch.int64, pin_memory=stream is not None)
        self._table = torch.empty((num_rows, 3), dtype=torch.int64, device=device)
        self.rows: Rows = self._pinned.numpy()
        self.host, self.table = self._pinned.data_ptr(), self._table.data_ptr()
        self._num_taken = 0
        self._stream = stream
        self._done = torch.cuda.Event() if stream is not None else None  # type: ignore[no-untyped-call]

    def take(self, count: int) -> int:
        """The first of so many rows that nothing reads any more."""
        if self._num_taken + count > MAX_ROWS:
            self.finish()
        start = self._num_taken
        self._num_taken += count
        return start

    def finish(self) -> None:
        """Wait for what was submitted, without the interpreter lock.

        It spins, for about half a millisecond a GiB: to sleep until an interrupt came took a quarter longer.
        """
        if self._done is not None:
            self._done.record(self._stream)
            self._done.synchronize()
        self._num_taken = 0


def _kernel(device: torch.device) -> "RowCopy | None":
    if find_spec("triton") is None:
        log.warning("triton is not installed: KV moves with one copy command for each piece")
        return None
    from kv_transfer.row_copy import RowCopy

    return RowCopy(device)
