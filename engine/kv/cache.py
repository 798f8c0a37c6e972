"""The KV blocks of one worker: the facade over block pool and prefix cache that everybody else uses.

Owned by the engine thread. Every block is exactly one of
  free        on the pool's list,
  idle        cached and referenced by nobody: matchable, and evicted when the free list is empty,
  referenced  by sequences, leases, pulls, or by a referenced child in the prefix cache.
A reference is a count: who retained a block (or got it from `match` or `allocate`) releases it once.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from engine.kv.block_pool import BlockPool
from engine.kv.events import KvEvent
from engine.kv.layout import BlockId
from engine.kv.prefix_cache import Contents, PrefixCache

_MAX_COMING = 4096  # hashes kept for a drain that may never come


class KvCache:
    def __init__(self, num_blocks: int, block_size: int, contents: Contents | None = None) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._pool = BlockPool(num_blocks)
        self._cache = PrefixCache(num_blocks, block_size, contents)
        self._coming: list[int] = []

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could hand out now: free and idle ones."""
        return len(self._pool.free) + len(self._cache.idle)

    @property
    def num_cached(self) -> int:
        return len(self._cache.entries)

    @property
    def next_event_number(self) -> int:
        """Number of the first event that the next `drain_events` returns."""
        return self._cache.events.next_event_number

    @property
    def has_events(self) -> bool:
        """Whether anything changed since the last `drain_events`."""
        return not self._cache.events.is_empty

    def match(self, token_ids: Sequence[int], hashes: Sequence[int]) -> list[BlockId]:
        """Blocks of the longest cached prefix of `token_ids`, retained for the caller. `hashes`: of its full blocks."""
        blocks = self._cache.match(token_ids, hashes)
        self.retain(blocks)
        return blocks

    def num_likely(self, hashes: Sequence[int]) -> int:
        """How many blocks `match` would give, save for collisions. Cheap, and retains nothing."""
        return self._cache.num_likely(hashes)

    def allocate(self, num_blocks: int) -> list[BlockId] | None:
        """Blocks with undefined content, referenced once each; None, and nothing changed, when there are too few."""
        if num_blocks > self.num_free:
            return None
        pool = self._pool
        num_lacking = num_blocks - len(pool.free)
        if num_lacking > 0:
            pool.put(self._cache.evict(num_lacking))
        return pool.take(num_blocks)

    def retain(self, block_ids: Sequence[BlockId]) -> None:
        """One more reference to each of some blocks that are referenced or cached."""
        entries, idle = self._cache.entries, self._cache.idle
        first = self._pool.retain(block_ids)
        while first:
            parents = []
            for block in first:
                assert block in idle, f"block {block} is free and cannot be retained"
                del idle[block]
                parent = entries[block].parent
                if parent is not None:
                    parents.append(parent)
            first = self._pool.retain(parents)  # a referenced child holds its parent

    def release(self, block_ids: Sequence[BlockId]) -> None:
        """One reference less to each. A cached block without any is idle, behind its children in order of eviction."""
        entries, idle, references, free = self._cache.entries, self._cache.idle, self._pool.references, self._pool.free
        for block in block_ids:
            here: BlockId | None = block
            while here is not None:
                left = references[here] - 1
                assert left >= 0, f"block {here} is released more often than it was retained"
                references[here] = left
                if left:
                    break
                entry = entries.get(here)
                if entry is None:
                    free.append(here)
                    break
                idle[here] = None
                here = entry.parent

    def store(
        self, token_ids: Sequence[int], hashes: Sequence[int], block_ids: list[BlockId], num_tokens: int
    ) -> list[BlockId]:
        """Make the full blocks among the first `num_tokens`, whose KV is computed, matchable. Idempotent.

        The caller holds references to `block_ids`. Where another block caches the same content already, that one
        takes the place of the caller's: what two sequences computed at the same time is kept once, and a sequence
        never needs more blocks than its tokens fill. Returns the blocks replaced, which the caller releases.
        """
        parents, twins = self._cache.insert(token_ids, hashes, block_ids, num_tokens // self.block_size)
        self.retain(parents)
        replaced = []
        for place, twin in twins:
            self.retain([twin])
            replaced.append(block_ids[place])
            block_ids[place] = twin
        return replaced

    def clear(self) -> None:
        """Forget every prefix. Referenced blocks stay with their holders."""
        held = [entry.parent for block, entry in self._cache.entries.items() if self._pool.references[block]]
        idle = list(self._cache.idle)
        self._cache.clear()
        self._pool.put(idle)
        self.release([parent for parent in held if parent is not None])

    def drain_events(self) -> list[KvEvent]:
        """What changed since the last call. Applied in order, they make a mirror of the cached hashes exact."""
        return self._cache.events.drain()

    def expect(self, hashes: Sequence[int]) -> None:
        """Blocks that are going to be computed, or some of them: nothing but news for who drains it."""
        self._coming += hashes
        del self._coming[:-_MAX_COMING]

    def drain_coming(self) -> list[int]:
        """What has been expected since the last call, the latest of it."""
        coming, self._coming = self._coming, []
        return coming

    def snapshot(self) -> list[int]:
        """Hashes of all cached blocks; a mirror goes on from it with event `next_event_number`."""
        return list(self._cache.by_hash)

    def check_invariants(self, holders: Iterable[BlockId] | None = None) -> None:
        """Assert that every block has exactly one state, and that what is cached hangs together. O(num_blocks).

        `holders`: one entry for each reference that somebody outside holds; when given, counts must agree exactly.
        """
        references, entries, idle = self._pool.references, self._cache.entries, self._cache.idle
        free = set(self._pool.free)
        assert len(free) == len(self._pool.free), "a block is free twice"
        held = Counter(entry.parent for block, entry in entries.items() if references[block])
        outside = None if holders is None else Counter(holders)
        for block in map(BlockId, range(self.num_blocks)):
            states = (block in free, block in idle, references[block] > 0)
            assert sum(states) == 1, (block, states, references[block])
            assert not (block in free and block in entries), f"block {block} is free and cached"
            assert references[block] >= held[block], (block, references[block], held[block])
            if outside is not None:
                assert references[block] == held[block] + outside[block], (block, references[block], outside[block])
        assert len(entries) == len(self._cache.by_hash), "a cached block has no hash of its own"
        order = {block: i for i, block in enumerate(idle)}
        for block, entry in entries.items():
            assert self._cache.by_hash[entry.block_hash] == block, (block, entry.block_hash)
            assert entry.parent is None or entry.parent in entries, f"block {block} is cached without its parent"
            if entry.parent is not None and entry.parent in order:
                assert order[block] < order[entry.parent], f"block {block} would be evicted after its parent"
