"""Brings the pieces of one lease into the sink's blocks and proves that they are right.

Made by a pull, called from copy threads. Invariant: it writes only into the blocks it was given, only inside `fetch`,
and what `fetch` reports as good has been verified after it arrived. Pieces that fit the sink's layout as one run are
copied straight into place; others go through a staging buffer and are scattered once their checksum is right.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from threading import Event

import numpy as np

from engine.errors import TransferError
from engine.kv.memory import HostMemory
from kv_transfer.checksum import Digests
from kv_transfer.plan import TransferPlan
from kv_transfer.transports.base import Fetch, PieceReader

SOURCE_RANK = 0  # one link reads one rank


@dataclass(frozen=True, slots=True)
class Piece:
    layer_group: int
    block_index: int  # in the order of the lease
    checksum: int
    num_failures: int = 0

    def failed_again(self) -> "Piece":
        return replace(self, num_failures=self.num_failures + 1)


@dataclass(frozen=True, slots=True)
class Target:
    """Where one pull's pieces come from and go. All sizes and ids have been checked."""

    lease_id: str
    groups: tuple[range, ...]  # the source's layers of each group
    source_block_ids: Sequence[int]
    sink_block_ids: Sequence[int]  # for positions from num_held_tokens on
    num_tokens: int
    num_held_tokens: int


class Copier:
    def __init__(self, reader: PieceReader, plan: TransferPlan, memory: HostMemory, target: Target) -> None:
        self._reader = reader
        self._plan = plan
        self._memory = memory
        self._target = target
        self._source = plan.sources[SOURCE_RANK]
        self._first_sink_block = target.num_held_tokens // memory.layout.block_size
        self.groups = target.groups
        self._direct = [plan.direct_offset(SOURCE_RANK, layers) for layers in target.groups]
        self.needed_groups = frozenset(
            group for group, layers in enumerate(target.groups) if plan.needs(SOURCE_RANK, layers)
        )

    def piece_bytes(self, layer_group: int) -> int:
        return len(self._target.groups[layer_group]) * self._source.layer_bytes

    def fetch(self, pieces: Sequence[Piece], stop: Event) -> tuple[list[Piece], str]:
        """Copy, verify and place; returns the pieces that did not arrive right, and why. Blocking."""
        bad: list[Piece] = []
        reason = ""
        start = 0
        while start < len(pieces):
            if stop.is_set():
                return [*bad, *pieces[start:]], "stopped"
            end, num_bytes = start, 0
            while end < len(pieces) and (end == start or num_bytes < self._reader.batch_bytes):
                num_bytes += self.piece_bytes(pieces[end].layer_group)
                end += 1
            batch = pieces[start:end]
            try:
                wrong = self._fetch_batch(batch, stop)
                reason = reason if not wrong else "checksum mismatch"
            except TransferError as error:
                wrong, reason = list(batch), str(error)
            bad += wrong
            start = end
        return bad, reason

    def _fetch_batch(self, pieces: Sequence[Piece], stop: Event) -> list[Piece]:
        fetches = [self._fetch_of(piece) for piece in pieces]
        digests = Digests(len(fetch.into) for fetch in fetches)
        self._reader.read(self._target.lease_id, fetches, digests.arrived, stop)
        bad = []
        for piece, fetch, digest in zip(pieces, fetches, digests.done, strict=True):
            if digest != piece.checksum:
                bad.append(piece)
            elif self._direct[piece.layer_group] is None:
                self._scatter(piece, fetch.into)
        return bad

    def _fetch_of(self, piece: Piece) -> Fetch:
        layers = self._target.groups[piece.layer_group]
        size = len(layers) * self._source.layer_bytes
        block_id = self._target.source_block_ids[piece.block_index]
        offset = block_id * self._source.block_bytes + layers.start * self._source.layer_bytes
        direct = self._direct[piece.layer_group]
        if direct is None:
            into = np.empty(size, np.uint8).data
        else:
            start = self._sink_offset(piece.block_index) + direct
            into = self._memory.buffer[start : start + size]
        return Fetch(piece.layer_group, piece.block_index, offset, into)

    def _scatter(self, piece: Piece, staged: memoryview) -> None:
        """numpy checks the bounds of every view and copies without the interpreter lock."""
        layers = self._target.groups[piece.layer_group]
        blocks = range(piece.block_index, piece.block_index + 1)
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
