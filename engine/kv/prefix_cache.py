"""Which blocks hold the KV of which prefix, and in what order idle ones are evicted.

Owned by `KvCache`. A cached block is an entry of a tree: its parent is the cached block before it in the chain, which
need not be the one that its holder has there (two may have computed the same block at the same time). `KvCache` keeps
a parent referenced while a child is, so a parent always becomes idle after its children. Hence the block idle for
longest is a leaf, and evicting in that order keeps "block i cached implies blocks 0..i-1 cached".
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice

import msgspec

from engine.kv.block_hash import TOKEN_BYTES, token_bytes
from engine.kv.events import KvEventLog
from engine.kv.layout import BlockId

# What is in the blocks `first` to `end` (exclusive) of a sequence: equal bytes exactly for equal tokens.
Contents = Callable[[Sequence[int], int, int], Sequence[bytes]]


class CachedBlock(msgspec.Struct, frozen=True, gc=False):
    block_hash: int
    content: bytes
    parent: BlockId | None  # None: the first block of its chain


class PrefixCache:
    """`contents` None: the tokens themselves. Who has none (a simulation) says what stands for them."""

    def __init__(self, num_blocks: int, block_size: int, contents: Contents | None = None) -> None:
        self._contents = contents or partial(token_contents, block_size)
        self.by_hash: dict[int, BlockId] = {}
        self.entries: dict[BlockId, CachedBlock] = {}
        self.idle: OrderedDict[BlockId, None] = OrderedDict()  # idle for longest first
        self.events = KvEventLog(self.by_hash.keys, max_hashes=4 * num_blocks)

    def match(self, token_ids: Sequence[int], hashes: Sequence[int]) -> list[BlockId]:
        """Blocks of the longest cached prefix, every one compared token by token."""
        num_likely = self.num_likely(hashes)
        if num_likely == 0:
            return []
        blocks: list[BlockId] = []
        parent = None
        for block_hash, content in zip(hashes, self._contents(token_ids, 0, num_likely), strict=False):
            block = self._find(block_hash, content, parent)
            if block is None:
                break
            blocks.append(block)
            parent = block
        return blocks

    def num_likely(self, hashes: Sequence[int]) -> int:
        """How many blocks `match` gives, unless a hash collides; by bisection, as what is cached is a prefix."""
        low, high = 0, len(hashes)
        while low < high:
            middle = (low + high + 1) // 2
            if hashes[middle - 1] in self.by_hash:
                low = middle
            else:
                high = middle - 1
        return low

    def insert(
        self, token_ids: Sequence[int], hashes: Sequence[int], block_ids: Sequence[BlockId], num_blocks: int
    ) -> tuple[list[BlockId], list[tuple[int, BlockId]]]:
        """Cache the first `num_blocks` of `block_ids`, except those whose content another block caches already.

        Returns the parents of the new entries, for the caller to retain one reference for each, and (place, block)
        of those others.
        """
        first = num_blocks  # what comes before a cached block is cached: only the end of the chain can be new
        while first > 0 and block_ids[first - 1] not in self.entries:
            first -= 1
        parent = block_ids[first - 1] if first else None
        parents: list[BlockId] = []
        twins: list[tuple[int, BlockId]] = []
        stored: list[int] = []
        by_hash, entries = self.by_hash, self.entries
        for i, content in enumerate(self._contents(token_ids, first, num_blocks), first):
            block_hash, block = hashes[i], block_ids[i]
            if by_hash.setdefault(block_hash, block) != block:
                parent = self._find(block_hash, content, parent)
                if parent is None:  # a collision: what follows cannot be reached
                    break
                twins.append((i, parent))
                continue
            entries[block] = CachedBlock(block_hash, content, parent)
            stored.append(block_hash)
            if parent is not None:
                parents.append(parent)
            parent = block
        self.events.stored(stored)
        return parents, twins

    def evict(self, num_blocks: int) -> list[BlockId]:
        """Forget the blocks idle for longest. The caller knows there are as many."""
        by_hash, entries, idle = self.by_hash, self.entries, self.idle
        evicted = list(islice(idle, num_blocks))
        removed = []
        for block in evicted:
            del idle[block]
            block_hash = entries.pop(block).block_hash
            del by_hash[block_hash]
            removed.append(block_hash)
        self.events.removed(removed)
        return evicted

    def clear(self) -> None:
        self.by_hash.clear()
        self.entries.clear()
        self.idle.clear()
        self.events.cleared()

    def _find(self, block_hash: int, content: bytes, parent: BlockId | None) -> BlockId | None:
        """The block cached under this hash if it has this content after that parent, hence the whole prefix."""
        block = self.by_hash.get(block_hash)
        if block is None:
            return None
        entry = self.entries[block]
        return block if entry.content == content and entry.parent == parent else None


def token_contents(block_size: int, token_ids: Sequence[int], first: int, end: int) -> list[bytes]:
    """The tokens of each of these blocks."""
    tokens, size = token_bytes(token_ids[first * block_size : end * block_size]), block_size * TOKEN_BYTES
    return [tokens[start : start + size] for start in range(0, len(tokens), size)]
