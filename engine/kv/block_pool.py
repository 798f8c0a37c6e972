"""Who holds which block of a worker's KV pool: reference counts and the free list. Every operation is O(1) a block.

A block is free (on the list here), referenced (count above 0) or, between the two, handed back by `release` to its
caller, the prefix cache, which keeps it idle or frees it.
"""

from engine.kv.layout import BlockId


class BlockPool:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.references = [0] * num_blocks
        self.free = [BlockId(block) for block in reversed(range(num_blocks))]  # a stack: a warm block is used first

    def take(self) -> BlockId:
        """A free block, referenced once. The caller knows there is one."""
        block = self.free.pop()
        self.references[block] = 1
        return block

    def put(self, block: BlockId) -> None:
        assert self.references[block] == 0, (block, self.references[block])
        self.free.append(block)

    def retain(self, block: BlockId) -> bool:
        """One reference more. True when it is the first."""
        self.references[block] += 1
        return self.references[block] == 1

    def release(self, block: BlockId) -> bool:
        """One reference less. True when it was the last."""
        left = self.references[block] - 1
        assert left >= 0, f"block {block} is released more often than it was retained"
        self.references[block] = left
        return left == 0
