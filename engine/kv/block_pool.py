"""Who holds which block of a worker's KV pool: reference counts and the free list. Every operation is O(1) a block, and
takes many at once: a prompt has hundreds.

A block is free (on the list here), referenced (count above 0) or, between the two, idle in the prefix cache. `KvCache`
gives references back, and knows where a block goes with its last one.
"""

from collections.abc import Iterable, Sequence

from engine.kv.layout import BlockId


class BlockPool:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.references = [0] * num_blocks
        self.free = [BlockId(block) for block in reversed(range(num_blocks))]  # a stack: a warm block is used first

    def take(self, count: int) -> list[BlockId]:
        """Free blocks, referenced once each. The caller knows there are as many."""
        free, references = self.free, self.references
        taken = free[: -count - 1 : -1]
        del free[len(free) - count :]
        for block in taken:
            references[block] = 1
        return taken

    def put(self, block_ids: Sequence[BlockId]) -> None:
        references = self.references
        for block in block_ids:
            assert references[block] == 0, (block, references[block])
        self.free += block_ids

    def retain(self, block_ids: Iterable[BlockId]) -> list[BlockId]:
        """One reference more to each. Returns those for which it is the first."""
        references, first = self.references, []
        for block in block_ids:
            count = references[block]
            references[block] = count + 1
            if not count:
                first.append(block)
        return first
