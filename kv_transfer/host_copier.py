"""Brings pieces into host memory and proves that they are right.

Pieces that fit the sink's layout as one run are copied straight into place; others go through a buffer and are
scattered once their checksum is right.
"""

from collections.abc import Sequence
from threading import Event

import numpy as np

from engine.errors import TransferError
from engine.kv.memory import HostMemory
from kv_transfer.checksum import Digests
from kv_transfer.plan import TransferPlan
from kv_transfer.target import SOURCE_RANK, Target, batches
from kv_transfer.transports.base import Fetch, PieceReader, Run


class HostCopier:
    """A Copier."""

    checksums = True

    def __init__(
        self, reader: PieceReader, plan: TransferPlan, memory: HostMemory, target: Target, job_bytes: int
    ) -> None:
        self.job_bytes = job_bytes
        self._reader = reader
        self._plan = plan
        self._memory = memory
        self._target = target
        self._source = plan.sources[SOURCE_RANK]
        self._first_sink_block = target.num_held_tokens // memory.layout.block_size
        self.groups = target.groups
        self._direct = [plan.direct_offset(SOURCE_RANK, layers) for layers in target.groups]
        self.needed_groups = target.needed_groups(plan)

    def piece_bytes(self, layer_group: int) -> int:
        return len(self._target.groups[layer_group]) * self._source.layer_bytes

    def fetch(self, runs: Sequence[Run], stop: Event) -> tuple[list[Run], str]:
        bad: list[Run] = []
        reason = ""
        sizes = [self.piece_bytes(run.layer_group) for run in runs]
        for parts in batches(runs, sizes, self._reader.batch_bytes):
            batch = [run for run, _ in parts]
            if stop.is_set():
                wrong, reason = batch, "stopped"
            else:
                try:
                    wrong = self._fetch_batch(batch, stop)
                    reason = reason if not wrong else "checksum mismatch"
                except TransferError as error:
                    wrong, reason = batch, str(error)
            bad += wrong
        return bad, reason

    def _fetch_batch(self, runs: Sequence[Run], stop: Event) -> list[Run]:
        pieces = [run.part(i, i + 1) for run in runs for i in range(run.num_blocks)]
        fetches = [self._fetch_of(piece) for piece in pieces]
        digests = Digests(len(fetch.into) for fetch in fetches)
        self._reader.read(self._target.lease_id, fetches, digests.arrived, stop)
        bad = []
        for piece, fetch, digest in zip(pieces, fetches, digests.done, strict=True):
            if digest != piece.checksums[0]:
                bad.append(piece)
            elif self._direct[piece.layer_group] is None:
                self._scatter(piece, fetch.into)
        return bad

    def _fetch_of(self, piece: Run) -> Fetch:
        layers = self._target.groups[piece.layer_group]
        size = len(layers) * self._source.layer_bytes
        block_id = self._target.source_block_ids[piece.first_block]
        offset = block_id * self._source.block_bytes + layers.start * self._source.layer_bytes
        direct = self._direct[piece.layer_group]
        if direct is None:
            into = np.empty(size, np.uint8).data
        else:
            start = self._sink_offset(piece.first_block) + direct
            into = self._memory.buffer[start : start + size]
        return Fetch(piece.layer_group, piece.first_block, offset, into)

    def _scatter(self, piece: Run, staged: memoryview) -> None:
        """numpy checks the bounds of every view and copies without the interpreter lock."""
        layers = self._target.groups[piece.layer_group]
        blocks = range(piece.first_block, piece.first_block + 1)
        for copy in self._plan.copies(
            SOURCE_RANK, layers, blocks, self._target.num_tokens, self._target.num_held_tokens
        ):
            shape = (copy.count, copy.size)
            source_start = copy.source_offset - layers.start * self._source.layer_bytes
            sink_start = self._sink_offset(copy.sink_block) + copy.sink_offset
            source = np.ndarray(shape, np.uint8, staged, source_start, (copy.source_stride, 1))
            np.copyto(np.ndarray(shape, np.uint8, self._memory.buffer, sink_start, (copy.sink_stride, 1)), source)

    def _sink_offset(self, block: int) -> int:
        """Of the sink's block at this place in the sequence."""
        block_id = self._target.sink_block_ids[block - self._first_sink_block]
        return block_id * self._memory.layout.block_bytes
