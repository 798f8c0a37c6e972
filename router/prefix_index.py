"""Which worker holds which prefix: block hash -> integer bit mask of workers.

Owned by the dispatcher, which feeds it the KV events and snapshots of every session and asks it before each
routing decision. It only predicts; a worker compares token ids before it reuses a block.

Invariant the search rests on: workers evict leaves first, so a worker that holds block i of a chain holds
blocks 0..i-1 too. Along a chain the masks can therefore only lose bits, and the places where they do are
found by galloping and bisection instead of a walk.
"""

from collections.abc import Iterable, Iterator, Sequence


class PrefixIndex:
    def __init__(self) -> None:
        self._masks: dict[int, int] = {}
        self._held: dict[str, set[int]] = {}  # so that removing a worker touches only its own blocks
        self._slots: dict[str, int] = {}
        self._workers: list[str] = []  # by slot; "" where free
        self._free_slots: list[int] = []

    @property
    def num_hashes(self) -> int:
        return len(self._masks)

    def num_blocks(self, worker: str) -> int:
        return len(self._held.get(worker, ()))

    def apply(self, worker: str, stored: Iterable[int], removed: Iterable[int], cleared: bool = False) -> None:
        """One KV event of `worker`: cleared, then removed, then stored."""
        if cleared:
            self.remove(worker)
        bit = self._bit(worker)
        held = self._held[worker]
        self._discard(removed, bit)
        held.difference_update(removed)
        masks = self._masks
        get = masks.get
        for block_hash in stored:
            mask = get(block_hash)
            # The common case shares one int object among all blocks that only this worker holds.
            masks[block_hash] = bit if mask is None else mask | bit
        held.update(stored)

    def replace(self, worker: str, hashes: Iterable[int]) -> None:
        """A snapshot: `worker` holds exactly `hashes`."""
        self.remove(worker)
        self.apply(worker, hashes, ())

    def remove(self, worker: str) -> None:
        """Forget `worker`; its slot goes to the next new one."""
        slot = self._slots.pop(worker, None)
        if slot is None:
            return
        self._discard(self._held.pop(worker), 1 << slot)
        self._workers[slot] = ""
        self._free_slots.append(slot)

    def match(self, hashes: Sequence[int]) -> list[tuple[str, int]]:
        """(worker, number of leading blocks it holds) for every worker that holds the first one, shortest first."""
        if not hashes:
            return []
        found: list[tuple[str, int]] = []
        get = self._masks.get
        position, end = 0, len(hashes)
        mask = get(hashes[0], 0)
        while mask:
            # Gallop to the first probe that differs, then bisect down to where the change happened.
            same, step = position, 1
            while (probe := same + step) < end and get(hashes[probe], 0) == mask:
                same = probe
                step += step
            different = min(probe, end)
            while different - same > 1:
                middle = (same + different) >> 1
                if get(hashes[middle], 0) == mask:
                    same = middle
                else:
                    different = middle
            position = different
            rest = mask & get(hashes[position], 0) if position < end else 0
            found.extend((self._workers[slot], position) for slot in _bits(mask & ~rest))
            mask = rest
        return found

    def _bit(self, worker: str) -> int:
        slot = self._slots.get(worker)
        if slot is None:
            if self._free_slots:
                slot = self._free_slots.pop()
                self._workers[slot] = worker
            else:
                slot = len(self._workers)
                self._workers.append(worker)
            self._slots[worker] = slot
            self._held[worker] = set()
        return 1 << slot

    def _discard(self, hashes: Iterable[int], bit: int) -> None:
        masks = self._masks
        for block_hash in hashes:
            rest = masks.get(block_hash, 0) & ~bit
            if rest:
                masks[block_hash] = rest
            else:
                masks.pop(block_hash, None)


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
