"""Brings pieces into a device's memory.

Where the source's memory is within reach of the device, one table and one kernel copy everything that was announced
straight into place, whatever the two layouts. Otherwise pieces are brought to a stage on the device first, by the
transport itself or through pinned host memory, and scattered from there by the same kernel.
"""

from collections.abc import Sequence
from threading import Event

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import TransferError
from engine.kv.device_memory import DeviceMemory
from kv_transfer.checksum import Digests
from kv_transfer.copy_stream import CopyStream, Part, Rows, RowTable
from kv_transfer.plan import TransferPlan
from kv_transfer.target import SOURCE_RANK, Target, batches
from kv_transfer.transports.base import Fetch, MappedReader, PieceReader, Reader, Run, StageReader

MAPPED_JOB_BYTES = 4 << 30  # a few milliseconds: soon enough to hear of a stop
Batch = Sequence[tuple[Run, int]]  # with the size of its pieces

Starts = NDArray[np.int64]  # where each piece of a run begins
Pattern = NDArray[np.int64]  # [rows, 4]: offset in the source's piece, sink block, offset in that, size


def open_device_stream(memory: DeviceMemory, reader: Reader, num_slots: int, stage_bytes: int) -> CopyStream:
    """Raise TransferError when the device has no room for what this reader needs."""
    staged = not isinstance(reader, MappedReader)
    try:
        return CopyStream(memory.device, num_slots=num_slots, stage_bytes=stage_bytes if staged else 0)
    except torch.OutOfMemoryError as error:
        raise TransferError(
            f"no memory on {memory.device} for stages of {stage_bytes} bytes", retryable=True
        ) from error


class DeviceCopier:
    """A Copier. Raise TransferError when the target's pieces are larger than a stage."""

    def __init__(
        self, reader: Reader, plan: TransferPlan, memory: DeviceMemory, target: Target, stream: CopyStream
    ) -> None:
        self._reader = reader
        self._plan = plan
        self._sink = plan.sink
        self._pool = memory.tensor[: memory.size]
        self._target = target
        self._stream = stream
        self._source = plan.sources[SOURCE_RANK]
        self._source_ids = np.array(target.source_block_ids, np.int64)
        self._sink_ids = np.array(target.sink_block_ids, np.int64)
        self._first_sink_block = target.num_held_tokens // memory.layout.block_size
        self.groups = target.groups
        self.needed_groups = target.needed_groups(plan)
        self._blocks = self._block_table()
        self._shifts = [self._shift(layers) for layers in target.groups]
        self.checksums = isinstance(reader, PieceReader)
        self._mapped: MappedReader | None = None
        if isinstance(reader, MappedReader):  # slow to find out
            self._mapped = reader
            self.job_bytes = MAPPED_JOB_BYTES
        else:
            self.job_bytes = min(reader.batch_bytes, stream.stage_bytes)
            if max(map(self.piece_bytes, range(len(self.groups)))) > stream.stage_bytes:
                raise TransferError(f"the offer's pieces are larger than {stream.stage_bytes} bytes", retryable=False)

    def piece_bytes(self, layer_group: int) -> int:
        return len(self._target.groups[layer_group]) * self._source.layer_bytes

    def fetch(self, runs: Sequence[Run], stop: Event) -> tuple[list[Run], str]:
        if self._mapped is not None:
            try:
                self._stream.run_parts(self._mapped.memory, self._pool, self._parts(runs), stop)
            except TransferError as error:
                return list(runs), str(error)
            return [], ""
        bad: list[Run] = []
        reason = ""
        sizes = [self.piece_bytes(run.layer_group) for run in runs]
        for batch in batches(runs, sizes, self.job_bytes):
            try:
                if stop.is_set():
                    raise TransferError("stopped", retryable=True)
                self._fetch_batch(batch, stop)
            except TransferError as error:
                bad += [run for run, _ in batch]
                reason = str(error)
        return bad, reason

    def _fetch_batch(self, batch: Batch, stop: Event) -> None:
        """By way of a stage."""
        num_bytes = sum(run.num_blocks * size for run, size in batch)
        with self._stream.stage() as whole:
            stage = whole[:num_bytes]
            if isinstance(self._reader, StageReader):
                runs, sizes = [run for run, _ in batch], [size for _, size in batch]
                self._reader.read_into(self._target.lease_id, runs, sizes, stage, stop)
            elif isinstance(self._reader, PieceReader):
                self._read_through_host(self._reader, batch, stage, stop)
            tables, start = [], 0
            for run, size in batch:
                tables.append(self._staged(run, start + np.arange(run.num_blocks) * size))
                start += run.num_blocks * size
            self._stream.run(stage, self._pool, np.concatenate(tables), stop)

    def _read_through_host(self, reader: PieceReader, batch: Batch, stage: Tensor, stop: Event) -> None:
        """One wrong piece fails the batch: all of it is read again."""
        with self._stream.pinned() as whole:
            host = whole[: len(stage)]
            buffer = host.numpy().data
            fetches, start = [], 0
            for run, size in batch:
                for i, offset in enumerate(self._source_starts(run).tolist()):
                    into = buffer[start : start + size]
                    fetches.append(Fetch(run.layer_group, run.first_block + i, offset, into))
                    start += size
            digests = Digests(len(fetch.into) for fetch in fetches)
            reader.read(self._target.lease_id, fetches, digests.arrived, stop)
            if digests.done != [sum_ for run, _ in batch for sum_ in run.checksums]:
                raise TransferError("checksum mismatch", retryable=True)
            self._stream.copy(host, stage)

    def _source_starts(self, run: Run) -> Starts:
        """Of each piece in the source's memory."""
        layers = self._target.groups[run.layer_group]
        block_ids = self._source_ids[run.first_block : run.first_block + run.num_blocks]
        return block_ids * self._source.block_bytes + layers.start * self._source.layer_bytes

    def _block_table(self) -> RowTable:
        """From each of the source's blocks to the sink's at its place, of no size, where blocks are of equal size."""
        rows = np.zeros((len(self._sink_ids), 3), np.int64)
        if self._source.block_size == self._sink.block_size:
            rows[:, 0] = self._source_ids[self._first_sink_block :] * self._source.block_bytes
            rows[:, 1] = self._sink_ids * self._sink.block_bytes
        return RowTable(rows)

    def _shift(self, layers: range) -> tuple[int, int, int] | None:
        """Where these layers begin in blocks of the source and of the sink, and their size. None: scattered."""
        direct = self._plan.direct_offset(SOURCE_RANK, layers)
        if direct is None:
            return None
        return layers.start * self._source.layer_bytes, direct, len(layers) * self._source.layer_bytes

    def _parts(self, runs: Sequence[Run]) -> list[Part]:
        """From the source's memory into the sink's blocks. Of the same blocks, layers that lie together go together."""
        parts: list[Part] = []
        for run in runs:
            shift = self._shifts[run.layer_group]
            if shift is None:
                rows = self._scattered(run, self._source_starts(run))
                parts.append(Part(RowTable(rows), 0, len(rows)))
                continue
            first, count = run.first_block - self._first_sink_block, run.num_blocks
            if parts and (parts[-1].table, parts[-1].first, parts[-1].count) == (self._blocks, first, count):
                source, sink, size = parts[-1].shift
                if (source + size, sink + size) == shift[:2]:
                    shift = source, sink, size + shift[2]
                    parts.pop()
            parts.append(Part(self._blocks, first, count, shift))
        return parts

    def _staged(self, run: Run, starts: Starts) -> Rows:
        """Into the sink's blocks, from pieces that begin at `starts` in a stage."""
        shift = self._shifts[run.layer_group]
        if shift is None:
            return self._scattered(run, starts)
        first = run.first_block - self._first_sink_block
        rows: Rows = self._blocks.rows[first : first + run.num_blocks] + shift
        rows[:, 0] = starts
        return rows

    def _scattered(self, run: Run, starts: Starts) -> Rows:
        """By the transfer plan. The copies of a block repeat with the period in which the two block sizes meet, so the
        plan is asked for one period and for the blocks that begin or end within the sequence."""
        source_size, sink_size = self._source.block_size, self._sink.block_size
        num_held, num_tokens = self._target.num_held_tokens, self._target.num_tokens
        period = max(1, sink_size // source_size)
        blocks = np.arange(run.first_block, run.first_block + run.num_blocks)
        end = self._sink.num_blocks_for(num_tokens) * sink_size
        whole = (blocks * source_size >= num_held) & ((blocks + 1) * source_size <= end)
        tables = [np.empty((0, 3), np.int64)]
        for phase in range(period):
            picked = blocks[whole & (blocks % period == phase)]
            if len(picked):
                pattern = self._pattern(run.layer_group, phase, period * source_size, 0)
                first_sink_blocks = picked // period * (period * source_size // sink_size)
                tables.append(self._apply(pattern, starts[picked - run.first_block], first_sink_blocks))
        for block in blocks[~whole].tolist():
            pattern = self._pattern(run.layer_group, block, num_tokens, num_held)
            tables.append(self._apply(pattern, starts[[block - run.first_block]], np.zeros(1, np.int64)))
        return np.concatenate(tables)

    def _pattern(self, layer_group: int, block: int, num_tokens: int, num_held: int) -> Pattern:
        """The copies of one source block of such a sequence, row by row."""
        layers = self._target.groups[layer_group]
        copies = self._plan.copies(SOURCE_RANK, layers, range(block, block + 1), num_tokens, num_held)
        first = layers.start * self._source.layer_bytes
        rows = [
            (
                copy.source_offset - first + i * copy.source_stride,
                copy.sink_block,
                copy.sink_offset + i * copy.sink_stride,
                copy.size,
            )
            for copy in copies
            for i in range(copy.count)
        ]
        return np.array(rows, np.int64).reshape(-1, 4)

    def _apply(self, pattern: Pattern, starts: Starts, first_sink_blocks: Starts) -> Rows:
        """The pattern for pieces that begin at `starts`, its sink blocks counted from `first_sink_blocks`."""
        source, sink_block, sink, size = pattern.T
        places = first_sink_blocks[:, None] + sink_block - self._first_sink_block
        rows = np.empty((len(starts), len(pattern), 3), np.int64)
        rows[:, :, 0] = starts[:, None] + source
        rows[:, :, 1] = self._sink_ids[places] * self._sink.block_bytes + sink
        rows[:, :, 2] = size
        return rows.reshape(-1, 3)
