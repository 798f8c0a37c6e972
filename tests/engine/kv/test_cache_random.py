"""A hundred thousand random operations on a tiny pool, a vocabulary of two, and a brute-force twin beside it."""

import random
from collections import Counter
from dataclasses import dataclass

import pytest

from engine.kv.block_hash import block_hashes
from engine.kv.cache import KvCache
from engine.kv.layout import BlockId

SIZE = 2
Prefix = tuple[int, ...]


@dataclass
class Holder:
    tokens: list[int]
    blocks: list[BlockId]
    num_computed: int


class Twin:
    """Knows the content of every block, and works everything out anew by looking at all of it."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.cached: dict[Prefix, BlockId] = {}
        self.holders: Counter[BlockId] = Counter()
        self.idle_since: dict[Prefix, int] = {}
        self.now = 0

    def referenced(self, prefix: Prefix) -> bool:
        return any(self.holders[block] for other, block in self.cached.items() if other[: len(prefix)] == prefix)

    def idle(self) -> set[Prefix]:
        return {prefix for prefix in self.cached if not self.referenced(prefix)}

    def num_free(self) -> int:
        used = {block for block, count in self.holders.items() if count}
        used |= {block for prefix, block in self.cached.items() if self.referenced(prefix)}
        return self.num_blocks - len(used)

    def match(self, tokens: list[int]) -> list[BlockId]:
        blocks = []
        for end in range(SIZE, len(tokens) + 1, SIZE):
            if tuple(tokens[:end]) not in self.cached:
                break
            blocks.append(self.cached[tuple(tokens[:end])])
        return blocks

    def store(self, tokens: list[int], blocks: list[BlockId], num_tokens: int) -> None:
        """Those of `blocks` behind the last one that is cached itself become the cached ones."""
        prefixes = [tuple(tokens[: (i + 1) * SIZE]) for i in range(num_tokens // SIZE)]
        own = [i for i, prefix in enumerate(prefixes) if self.cached.get(prefix) == blocks[i]]
        for i in range(max(own, default=-1) + 1, num_tokens // SIZE):
            cached = self.cached.setdefault(tuple(tokens[: (i + 1) * SIZE]), blocks[i])
            self.holders.subtract([blocks[i]])
            self.holders.update([cached])
            blocks[i] = cached

    def evict(self, gone: set[Prefix]) -> None:
        """Each one evicted must have been idle for longest among idle leaves, when its turn came."""
        for _ in range(len(gone)):
            leaves = {
                prefix
                for prefix in self.idle()
                if not any(other != prefix and other[: len(prefix)] == prefix for other in self.cached)
            }
            oldest = min(self.idle_since[prefix] for prefix in leaves)
            candidates = {prefix for prefix in leaves if self.idle_since[prefix] == oldest} & gone
            assert candidates, (leaves, gone)
            for prefix in candidates:
                del self.cached[prefix]
                gone = gone - {prefix}
            if not gone:
                return

    def tick(self) -> None:
        self.now += 1
        idle = self.idle()
        self.idle_since = {prefix: self.idle_since.get(prefix, self.now) for prefix in idle}


class Drive:
    """`hash_bits`: fewer than 64 make hashes collide all the time."""

    def __init__(self, seed: int, num_blocks: int, hash_bits: int) -> None:
        self.rng = random.Random(seed)
        self.kv = KvCache(num_blocks, SIZE)
        self.mask = (1 << hash_bits) - 1
        self.exact = hash_bits == 64
        self.twin = Twin(num_blocks)
        self.content: dict[BlockId, Prefix] = {}
        self.mirror: set[int] = set()
        self.event_number = 0
        self.held: list[Holder] = []

    def hashes(self, tokens: list[int]) -> list[int]:
        return [each & self.mask for each in block_hashes(tokens, SIZE, 5)]

    def step(self) -> None:
        choice = self.rng.random()
        if choice < 0.35 or not self.held:
            self.admit()
        elif choice < 0.65:
            self.compute(self.rng.choice(self.held))
        elif choice < 0.7:
            self.lease(self.rng.choice(self.held))
        elif choice < 0.999:
            self.drop(self.rng.randrange(len(self.held)))
        else:
            self.kv.clear()
            self.twin.cached.clear()

    def admit(self) -> None:
        tokens = [self.rng.randrange(2) for _ in range(self.rng.randrange(1, 13))]
        held = self.kv.match(tokens, self.hashes(tokens))
        for i, block in enumerate(held):
            assert self.content[block] == tuple(tokens[: (i + 1) * SIZE]), "a wrong block was reused"
        if self.exact:
            assert held == self.twin.match(tokens)
        self.twin.holders.update(held)
        if self.exact:
            self.twin.tick()  # what was matched is no longer idle, even if it is released at once
        needed = -(-len(tokens) // SIZE) - len(held)
        free = self.kv.num_free
        fresh = self.kv.allocate(needed)
        assert (fresh is None) == (needed > free)
        if fresh is None:
            self.release(held)
            return
        if self.exact:
            left = set(self.kv.snapshot())
            self.twin.evict({p for p in self.twin.cached if self.hashes(list(p))[-1] not in left})
        for block in fresh:
            self.content.pop(block, None)
        self.twin.holders.update(fresh)
        self.held.append(Holder(tokens, held + fresh, len(held) * SIZE))

    def compute(self, holder: Holder) -> None:
        end = self.rng.randint(holder.num_computed, len(holder.tokens))
        for i in range(holder.num_computed // SIZE, end // SIZE):
            self.content[holder.blocks[i]] = tuple(holder.tokens[: (i + 1) * SIZE])
        holder.num_computed = end
        expected = list(holder.blocks)
        self.twin.store(holder.tokens, expected, end)
        self.kv.release(self.kv.store(holder.tokens, self.hashes(holder.tokens), holder.blocks, end))
        assert holder.blocks == expected or not self.exact

    def lease(self, holder: Holder) -> None:
        self.kv.retain(holder.blocks)
        self.twin.holders.update(holder.blocks)
        self.held.append(Holder(holder.tokens, list(holder.blocks), holder.num_computed))

    def drop(self, place: int) -> None:
        self.release(self.held.pop(place).blocks)

    def release(self, blocks: list[BlockId]) -> None:
        self.kv.release(blocks)
        self.twin.holders.subtract(blocks)

    def check(self, *, thoroughly: bool) -> None:
        for event in self.kv.drain_events():
            self.event_number += 1
            if event.cleared:
                self.mirror.clear()
            self.mirror.difference_update(event.removed)
            self.mirror.update(event.stored)
        assert self.event_number == self.kv.next_event_number
        assert self.mirror == set(self.kv.snapshot())
        assert len(self.mirror) == self.kv.num_cached
        if thoroughly:
            self.kv.check_invariants([block for holder in self.held for block in holder.blocks])
        if self.exact:
            self.twin.tick()
            assert self.mirror == {self.hashes(list(prefix))[-1] for prefix in self.twin.cached}
            if thoroughly:
                assert self.kv.num_free == self.twin.num_free()


@pytest.mark.parametrize(("seed", "num_blocks", "rounds"), [(1, 7, 25_000), (2, 12, 25_000)])
def test_the_cache_agrees_with_its_twin_after_every_operation(seed: int, num_blocks: int, rounds: int) -> None:
    drive = Drive(seed, num_blocks, hash_bits=64)
    for _ in range(rounds):
        drive.step()
        drive.check(thoroughly=True)
    while drive.held:
        drive.drop(0)
    drive.check(thoroughly=True)
    assert drive.kv.num_free == num_blocks


@pytest.mark.parametrize(("seed", "hash_bits"), [(3, 64), (4, 4), (5, 2)])
def test_no_wrong_block_is_ever_reused_even_where_hashes_collide(seed: int, hash_bits: int) -> None:
    drive = Drive(seed, 10, hash_bits)
    drive.exact = False
    for i in range(30_000):
        drive.step()
        drive.check(thoroughly=i % 10 == 0)
    while drive.held:
        drive.drop(0)
    drive.check(thoroughly=True)
    assert drive.kv.num_free == 10
