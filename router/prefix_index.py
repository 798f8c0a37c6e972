"""Which worker holds which prefix: block hash -> set of workers.

Owned by the placement, which feeds it the KV events and snapshots of every session and asks it before each routing
decision. It only predicts; a worker compares token ids before it reuses a block.

Invariant the search rests on: workers evict leaves first, so a worker that holds block i of a chain holds
blocks 0..i-1 too. Along a chain the sets of living workers can therefore only lose members, and the places where they
do are found by bisection instead of a walk: what one bisection learns of blocks further on, the next ones start from.

A worker is a slot: a number. Blocks name their set of slots by the number of a row in a table of bit masks; which set
comes of another when a slot joins or leaves is worked out once and then remembered. A closed slot is masked out of
every answer at once; its bits leave with later events, and only then is its number given out again.

The blocks are one hash table (router/block_table.py). To grow, to shrink and to rid it of closed slots it is rebuilt,
some places with each event, so no call pauses for the whole of it: first the new one's memory is had from the system,
then blocks are in the new table or in the old one.
"""

from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt

from router.block_table import CHANGES_BITS, CLEAN, NOBODY, Hashes, find, move, note, remove, set_of, store
from router.compiled import WordRows

_MIN_PLACES = 1 << 10
_GROW_LOAD, _MAX_LOAD = 0.6, 0.7
_SPARSE = 8  # places for each block, from which on the table shrinks

# Places of the old table cleared with an event while there is one: some, and more than there are for what came with
# the event, so that workers that come and go with all their blocks cannot outrun it.
_MIN_STEP = 512
_STEPS_PER_BLOCK = 2 * _SPARSE

_FRESH_STEP = 1 << 16  # places of a new table whose memory is had with an event
_PLACES_PER_PAGE = 256

_WORD = 64  # bits of a mask's words


_EMPTY: WordRows = np.zeros((0, 2), np.uint64)


class PrefixIndex:
    def __init__(self) -> None:
        self._table: WordRows = np.zeros((_MIN_PLACES, 2), np.uint64)
        self._fresh: WordRows = _EMPTY  # becomes the table when all of its memory is there
        self._old: WordRows = _EMPTY  # while the table is rebuilt
        self._next_place = 0  # of the old table; those before it are free or moved. Or of the fresh one
        self._num_hashes = 0

        self._num_blocks: list[int] = []  # by slot
        self._alone: list[np.uint64] = []  # by slot: the set of only this one
        self._free: list[int] = []  # heap: low numbers keep the masks short
        self._closed: list[int] = []  # since the rebuilding under way began
        self._leaving: list[int] = []  # free when that ends

        self._live: npt.NDArray[np.uint64] = np.zeros(1, np.uint64)  # mask of the open slots
        self._sets: npt.NDArray[np.uint64] = np.zeros((64, 1), np.uint64)  # masks by number
        self._uses: npt.NDArray[np.int64] = np.zeros(64, np.int64)  # by number of the set: blocks that have it
        self._numbers: dict[bytes, int] = {bytes(8): int(NOBODY)}  # by mask
        self._unused = list(range(63, 0, -1))  # numbers
        self._changes: WordRows = np.zeros((1 << CHANGES_BITS, 2), np.uint64)
        self._num_changes = 0

    @property
    def num_hashes(self) -> int:
        """Blocks in the index, with those of closed slots that have not left yet."""
        return self._num_hashes

    @property
    def num_slots(self) -> int:
        """Slot numbers given out so far: all are below this."""
        return len(self._num_blocks)

    def num_blocks(self, slot: int) -> int:
        return self._num_blocks[slot]

    def open(self) -> int:
        """A slot that holds nothing."""
        if self._free:
            slot = heappop(self._free)
        else:
            slot = len(self._num_blocks)
            self._num_blocks.append(0)
            self._alone.append(NOBODY)
            if slot >= len(self._live) * _WORD:
                self._widen()
        self._flip(slot)
        mask = np.zeros_like(self._live)
        mask[slot // _WORD] = 1 << slot % _WORD
        self._alone[slot] = np.uint64(self._number(mask))
        self._uses[self._alone[slot]] += 1
        return slot

    def close(self, slot: int) -> None:
        """Its blocks no longer count. To replace all that a worker holds, close its slot and open another."""
        self._check(slot)
        self._flip(slot)
        self._uses[self._alone[slot]] -= 1
        self._num_blocks[slot] = 0
        self._closed.append(slot)
        self._step(_MIN_STEP)

    def apply(self, slot: int, stored: Sequence[int] | Hashes, removed: Sequence[int] | Hashes = ()) -> None:
        """One KV event: removed, then stored."""
        self._check(slot)
        if len(removed):
            self._apply(slot, removed, leaves=True)
        if len(stored):
            num_hashes = self._num_hashes + len(stored)
            if num_hashes > _MAX_LOAD * len(self._table):
                self._move_up_to(len(self._old))
                self._rebuild(num_hashes)
            self._apply(slot, stored, leaves=False)
        self._step(len(stored) + len(removed))

    def find(self, hashes: Sequence[int] | Hashes, found: npt.NDArray[np.float64], each: float = 1.0) -> None:
        """Sets in `found`, by slot, `each` times the number of leading blocks that it holds, where it holds any."""
        assert len(found) >= self.num_slots, len(found)
        find(self._table, self._old, self._sets, self._live, _array(hashes), found, each)

    def _check(self, slot: int) -> None:
        assert int(self._live[slot // _WORD]) >> slot % _WORD & 1, slot

    def _flip(self, slot: int) -> None:
        self._live[slot // _WORD] ^= np.uint64(1 << slot % _WORD)

    def _apply(self, slot: int, hashes: Sequence[int] | Hashes, *, leaves: bool) -> None:
        code, array, position = np.uint64(slot << 1 | leaves), _array(hashes), 0
        while True:
            where = (self._table, self._old, self._changes, self._uses, array, position, code)
            if leaves:
                position, num_gone, num_left = remove(*where)
                self._num_hashes -= num_gone
                self._num_blocks[slot] -= num_left
            else:
                position, num_new, num_joined = store(*where, self._alone[slot])
                self._num_hashes += num_new
                self._num_blocks[slot] += num_joined
            if position == len(array):
                return
            self._learn(set_of(self._table, self._old, array[position]), code)

    def _step(self, num_blocks: int) -> None:
        """After an event of so many blocks."""
        if len(self._old):
            self._move_up_to(self._next_place + _MIN_STEP + _STEPS_PER_BLOCK * num_blocks)
        elif len(self._fresh):
            end = self._next_place + _FRESH_STEP
            self._fresh[self._next_place : end : _PLACES_PER_PAGE] = NOBODY
            self._next_place = end
            if end >= len(self._fresh):
                self._rebuild(self._num_hashes)
        else:
            sparse = len(self._table) > max(_MIN_PLACES, _SPARSE * self._num_hashes)
            if self._closed or sparse or self._num_hashes > _GROW_LOAD * len(self._table):
                self._fresh, self._next_place = _table_for(self._num_hashes), 0

    def _rebuild(self, num_hashes: int) -> None:
        """Begin to, for so many blocks."""
        if num_hashes > _MAX_LOAD * len(self._fresh):  # more have come meanwhile, or there was no time
            self._fresh = _table_for(num_hashes)
        self._old, self._table, self._fresh, self._next_place = self._table, self._fresh, _EMPTY, 0
        self._leaving, self._closed = self._closed, []
        self._forget_changes()  # they may bring closed slots back

    def _move_up_to(self, place: int) -> None:
        place = min(place, len(self._old))
        while self._next_place < place:
            where = (self._table, self._old, self._changes, self._uses, self._next_place, place)
            self._next_place, num_gone = move(*where)
            self._num_hashes -= num_gone
            if self._next_place < place:
                self._learn(self._old[self._next_place, 1], CLEAN)
        if len(self._old) and place == len(self._old):
            self._old = _EMPTY
            for slot in self._leaving:
                heappush(self._free, slot)
            self._leaving = []
            self._forget_changes()  # they would take these slots out of sets, which may have them again

    def _learn(self, held: np.uint64, code: np.uint64) -> None:
        """What comes of a set by a change, and whether the slot was in it."""
        if 2 * self._num_changes >= len(self._changes):
            self._forget_changes()
        mask, was_in = self._sets[held] & self._live, False
        if code != CLEAN:
            slot, leaves = divmod(int(code), 2)
            word, bit = slot // _WORD, np.uint64(1 << slot % _WORD)
            was_in = bool(mask[word] & bit)
            mask[word] = mask[word] & ~bit if leaves else mask[word] | bit
        note(self._changes, held, code, np.uint64(self._number(mask)), np.uint64(was_in))
        self._num_changes += 1

    def _number(self, mask: npt.NDArray[np.uint64]) -> int:
        """Of a set."""
        key = mask.tobytes()
        number = self._numbers.get(key)
        if number is None:
            if not self._unused:
                self._reclaim()
            number = self._numbers[key] = self._unused.pop()
            self._sets[number] = mask
        return number

    def _reclaim(self) -> None:
        """Numbers of sets that no block has; where that are few, have more."""
        unused = np.flatnonzero(self._uses == 0)[:0:-1]  # without nobody's
        for number in unused.tolist():
            del self._numbers[self._sets[number].tobytes()]
        self._unused = unused.tolist()
        self._forget_changes()
        size = len(self._sets)
        if len(self._unused) < size // 2:
            self._sets = np.concatenate((self._sets, np.zeros_like(self._sets)))
            self._uses = np.concatenate((self._uses, np.zeros_like(self._uses)))
            self._unused[:0] = range(2 * size - 1, size - 1, -1)

    def _widen(self) -> None:
        """Masks, for more slots."""
        more = len(self._live)
        self._live = np.pad(self._live, (0, more))
        self._sets = np.pad(self._sets, ((0, 0), (0, more)))
        self._numbers = {key + bytes(8 * more): number for key, number in self._numbers.items()}

    def _forget_changes(self) -> None:
        if self._num_changes:
            self._changes.fill(0)
            self._num_changes = 0


def _table_for(num_hashes: int) -> WordRows:
    return np.zeros((max(_MIN_PLACES, 1 << (2 * num_hashes - 1).bit_length()), 2), np.uint64)


def _array(hashes: Sequence[int] | Hashes) -> Hashes:
    return np.ascontiguousarray(hashes, np.uint64)
