"""Which worker holds which prefix: block hash -> integer bit mask of workers.

Owned by the dispatcher, which feeds it the KV events and snapshots of every session and asks it before each
routing decision. It only predicts; a worker compares token ids before it reuses a block.

Invariant the search rests on: workers evict leaves first, so a worker that holds block i of a chain holds
blocks 0..i-1 too. Along a chain the masks of living workers can therefore only lose bits, and the places where they
do are found by bisection instead of a walk: what one bisection learns of blocks further on, the next ones start from.

A worker is a slot: the number of its bit. A closed slot is masked out of every answer at once; its bits leave shard by
shard with later events, and only then is the number given out again. Blocks with equal masks share one int.
"""

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt

# Many small dicts instead of one: each grows, is swept and shrinks on its own, so no call pauses for the whole index.
_NUM_SHARDS = 1024
_SHARD = _NUM_SHARDS - 1

# Blocks swept with an event while a closed slot has bits left: some, and more than came with the event, so that
# workers that come and go with all their blocks cannot outrun the sweep.
_MIN_SWEEP = 1024
_SWEEP_PER_BLOCK = 4

_MAX_KNOWN = 1 << 16  # masks remembered for sharing


class PrefixIndex:
    def __init__(self) -> None:
        self._shards: list[dict[int, int]] = [{} for _ in range(_NUM_SHARDS)]
        self._num_blocks: list[int] = []  # by slot
        self._bits: list[int] = []  # by slot; the one int that all blocks of only this slot share
        self._live = 0
        self._free: list[int] = []  # heap: low numbers keep the masks short
        self._closed: list[int] = []  # since the sweep under way began
        self._sweeping: list[int] = []  # free when that sweep ends
        self._next_shard = 0
        self._known: dict[int, int] = {}  # masks of several slots, to share them

    @property
    def num_hashes(self) -> int:
        """Blocks in the index, with those of closed slots that are not swept out yet."""
        return sum(map(len, self._shards))

    @property
    def num_slots(self) -> int:
        """Slot numbers given out so far: all are below this."""
        return len(self._bits)

    def num_blocks(self, slot: int) -> int:
        return self._num_blocks[slot]

    def open(self) -> int:
        """A slot that holds nothing."""
        if self._free:
            slot = heappop(self._free)
        else:
            slot = len(self._bits)
            self._bits.append(1 << slot)
            self._num_blocks.append(0)
        self._live |= self._bits[slot]
        return slot

    def close(self, slot: int) -> None:
        """Its blocks no longer count. To replace all that a worker holds, close its slot and open another."""
        assert self._live & self._bits[slot], slot
        self._live ^= self._bits[slot]
        self._num_blocks[slot] = 0
        self._closed.append(slot)
        self._sweep(_MIN_SWEEP)

    def apply(self, slot: int, stored: Sequence[int], removed: Sequence[int] = ()) -> None:
        """One KV event: removed, then stored."""
        bit, live = self._bits[slot], self._live
        assert live & bit, slot
        if removed:
            self._discard(slot, removed)
        shards, intern = self._shards, self._intern
        count = 0
        seen = merged = 0  # the blocks of a prompt mostly share one mask
        for block_hash in stored:
            shard = shards[block_hash & _SHARD]
            mask = shard.get(block_hash)
            if mask is None:
                shard[block_hash] = bit
                count += 1
                continue
            if mask is not seen:
                seen, merged = mask, intern(mask & live | bit)
            shard[block_hash] = merged
            count += not mask & bit
        self._num_blocks[slot] += count
        if self._sweeping or self._closed:
            self._sweep(_MIN_SWEEP + _SWEEP_PER_BLOCK * (len(stored) + len(removed)))

    def match(self, hashes: Sequence[int]) -> list[tuple[int, int]]:
        """(number of leading blocks, mask of the slots that hold exactly so many) in ascending order, none of them 0.

        Swept and unswept blocks may differ in bits of closed slots. That costs probes and changes no answer: two
        blocks with equal masks have equal live bits, and so has every block between them.
        """
        found: list[tuple[int, int]] = []
        shards = self._shards
        position, end = 0, len(hashes)
        mask = shards[hashes[0] & _SHARD].get(hashes[0], 0) if end else 0
        live = mask & self._live
        known = [(end, 0)]  # blocks further on and their masks, the nearest last; past the end nobody holds anything
        while live:
            end, after = known.pop()
            if after != mask:
                while (middle := (position + end) >> 1) != position:
                    probed = shards[(block_hash := hashes[middle]) & _SHARD].get(block_hash, 0)
                    if probed == mask:
                        position = middle
                    else:
                        known.append((end, after))
                        end, after = middle, probed
                mask = after
                rest = mask & live
                if rest != live:
                    found.append((end, live ^ rest))
                    live = rest
            position = end
        return found

    def _discard(self, slot: int, hashes: Iterable[int]) -> None:
        shards, intern, bit = self._shards, self._intern, self._bits[slot]
        keep = self._live & ~bit
        count = 0
        seen = left = 0
        for block_hash in hashes:
            shard = shards[block_hash & _SHARD]
            mask = shard.get(block_hash, 0)
            if not mask & bit:
                continue
            count += 1
            if mask is not seen:
                seen, left = mask, intern(mask & keep)
            if left:
                shard[block_hash] = left
            else:
                del shard[block_hash]
        self._num_blocks[slot] -= count

    def _intern(self, mask: int) -> int:
        """One object for each mask. Forgetting the table only costs sharing, so its size is simply capped."""
        if not mask & (mask - 1):
            return self._bits[mask.bit_length() - 1] if mask else 0
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        return self._known.setdefault(mask, mask)

    def _sweep(self, num_blocks: int) -> None:
        """Take the bits of closed slots out of the next shards, of about `num_blocks` blocks."""
        shards, live = self._shards, self._live
        while num_blocks > 0:
            if self._next_shard == 0:
                self._free_swept()
                if not self._sweeping:
                    return
            shard = shards[self._next_shard]
            num_blocks -= 1 + len(shard)
            if shard:
                shards[self._next_shard] = self._swept(shard, live)
            self._next_shard = (self._next_shard + 1) & _SHARD

    def _swept(self, shard: dict[int, int], live: int) -> dict[int, int]:
        """A new dict, as one that was deleted from never gets smaller."""
        intern = self._intern
        return {
            block_hash: mask if rest == mask else intern(rest)
            for block_hash, mask in shard.items()
            if (rest := mask & live)
        }

    def _free_swept(self) -> None:
        """One sweep is over, the next begins for what was closed meanwhile."""
        for slot in self._sweeping:
            heappush(self._free, slot)
        self._sweeping, self._closed = self._closed, []
        self._known.clear()


def bits(mask: int) -> npt.NDArray[np.intp]:
    """The numbers of the bits that are set, ascending."""
    if mask and not mask & (mask - 1):
        return np.array([mask.bit_length() - 1], np.intp)
    raw = mask.to_bytes((mask.bit_length() + 7) // 8, "little")
    return np.flatnonzero(np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little"))
