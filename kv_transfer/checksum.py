"""The checksum that every piece carries: xxh3-64 over one source block's bytes of one group of layers.

Made by the source when a piece is final, compared by the sink with what is in its own memory. It finds accidents, not
attackers: both ends of a link know the deployment's token. xxhash works without the interpreter lock.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import xxhash

from engine.kv.memory import HostMemory


def checksum(piece: memoryview) -> int:
    return xxhash.xxh3_64_intdigest(piece)


class PieceChecksums(Protocol):
    """What a source has its pieces hashed with."""

    inline_bytes: int  # hashing less than this costs less than handing it to a thread

    def of(self, block_ids: Sequence[int], offset: int, piece_bytes: int) -> list[int]:
        """Of the pieces that lie `offset` bytes after the beginning of these blocks."""
        ...


class HostChecksums:
    """The PieceChecksums of host memory."""

    inline_bytes = 1 << 20

    def __init__(self, memory: HostMemory) -> None:
        self._memory = memory

    def of(self, block_ids: Sequence[int], offset: int, piece_bytes: int) -> list[int]:
        blocks = map(self._memory.block, block_ids)
        return [checksum(block[offset : offset + piece_bytes]) for block in blocks]


class Digests:
    """Checksums of pieces of the given sizes that arrive one after another, in parts."""

    def __init__(self, sizes: Iterable[int]) -> None:
        self.done: list[int] = []
        self._sizes = iter(sizes)
        self._hash = xxhash.xxh3_64()
        self._left = next(self._sizes)

    def arrived(self, part: memoryview) -> None:
        """A part never reaches beyond its piece."""
        self._hash.update(part)
        self._left -= len(part)
        assert self._left >= 0, self._left
        if self._left == 0:
            self.done.append(self._hash.intdigest())
            self._hash.reset()
            self._left = next(self._sizes, 0)
