"""Which worker holds which prefix: block hash -> set of workers.

Owned by the placement, which feeds it the KV events and snapshots of every session and asks it before each routing
decision. It only predicts; a worker compares token ids before it reuses a block.

Invariant the search rests on: workers evict leaves first, so a worker that holds block i of a chain holds
blocks 0..i-1 too. Along a chain the sets of living workers can therefore only lose members, and the places where they
do are found by bisection instead of a walk: what one bisection learns of blocks further on, the next ones start from.

A worker is a slot: a number. Blocks name their set of slots by the number of a row in a table of bit masks; which set
comes of another when a slot joins or leaves is worked out once and then remembered. A closed slot is masked out of
every answer at once; its bits leave with later events, and only then is its number given out again.

The blocks are one hash table with linear probing. To grow, to shrink and to rid it of closed slots it is rebuilt, some
places with each event, so no call pauses for the whole of it: first the new one's memory is had from the system, then
blocks are in the new table or in the old one.
"""

from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt

from router.compiled import Floats, Ints, Word, WordRows, Words, compiled, inlined

Hashes = Words

_NOBODY = 0  # the empty set; a place that holds it is free
_MOVED = np.uint64(0xFFFFFFFFFFFFFFFF)  # a place of the old table whose block is gone to the new one

_MIN_PLACES = 1 << 10
_GROW_LOAD, _MAX_LOAD = 0.6, 0.7
_SPARSE = 8  # places for each block, from which on the table shrinks

# Places of the old table cleared with an event while there is one: some, and more than there are for what came with
# the event, so that workers that come and go with all their blocks cannot outrun it.
_MIN_STEP = 512
_STEPS_PER_BLOCK = 2 * _SPARSE

_FRESH_STEP = 1 << 16  # places of a new table whose memory is had with an event
_PLACES_PER_PAGE = 256

_CHANGES_BITS = 15  # of the number of remembered changes
_MIX = np.uint64(0x9E3779B97F4A7C15)
_MIX_SHIFT = np.uint64(64 - _CHANGES_BITS)
_CODE_BITS = np.uint64(24)  # of a change: what happens to a set
_CLEAN = np.uint64(
    (1 << 24) - 1
)  # closed slots leave; other codes are a slot's number twice, and one more where it leaves
_ONE, _WORD, _BYTE, _BYTE_BITS = np.uint64(1), 64, np.uint64(0xFF), np.uint64(8)
_FREE = np.uint64(_NOBODY)


@inlined
def _place(table: WordRows, block_hash: Word) -> Word:
    """Where the block is, or the free place where it would be."""
    last = np.uint64(len(table) - 1)
    place = block_hash & last
    while table[place, 1] != _FREE and table[place, 0] != block_hash:
        place = (place + _ONE) & last
    return place


@compiled
def _held(table: WordRows, old: WordRows, block_hash: Word) -> Word:
    """Its set."""
    held = table[_place(table, block_hash), 1]
    if held == _FREE and len(old) != 0:
        held = old[_place(old, block_hash), 1]
    return _FREE if held == _MOVED else held


@compiled
def _change(changes: WordRows, held: Word, code: Word) -> Word:
    """Where the change of a set is noted, or the free place where it would be."""
    change = (held << _CODE_BITS) | code
    last = np.uint64(len(changes) - 1)
    place = (change * _MIX) >> _MIX_SHIFT
    while changes[place, 1] != _FREE and changes[place, 0] != change:
        place = (place + _ONE) & last
    return place


@inlined
def _erase(table: WordRows, place: Word) -> None:
    """Free a place, and move up what would not be found behind it."""
    last = np.uint64(len(table) - 1)
    free = following = place
    while True:
        following = (following + _ONE) & last
        if table[following, 1] == _FREE:
            break
        home = table[following, 0] & last
        if ((following - home) & last) >= ((following - free) & last):
            table[free, 0], table[free, 1] = table[following, 0], table[following, 1]
            free = following
    table[free, 1] = _FREE


@compiled
def _store(
    table: WordRows,
    old: WordRows,
    changes: WordRows,
    uses: Ints,
    hashes: Hashes,
    start: int,
    code: Word,
    alone: Word,
) -> tuple[int, int, int]:
    """From `start` on, up to a change that is not known. Returns that position, how many blocks are new to the index,
    and how many to the slot, whose set of its own is `alone`."""
    seen, merged, joins = _FREE, _FREE, False  # the blocks of a prompt mostly share one set
    num_new = num_joined = 0
    position = start
    while position < len(hashes):
        block_hash = hashes[position]
        place = _place(table, block_hash)
        held, old_place = table[place, 1], _FREE
        from_old = held == _FREE and len(old) != 0
        if from_old:
            old_place = _place(old, block_hash)
            held = old[old_place, 1]
            from_old = held != _FREE and held != _MOVED
            if not from_old:
                held = _FREE
        if held == _FREE:
            table[place, 0], table[place, 1] = block_hash, alone
            uses[alone] += 1
            num_new += 1
            num_joined += 1
            position += 1
            continue
        if held != seen:
            change = _change(changes, held, code)
            known = changes[change, 1]
            if known == _FREE:
                break
            seen, merged, joins = held, (known >> _ONE) - _ONE, known & _ONE == _FREE
        if from_old:
            old[old_place, 1] = _MOVED
            table[place, 0] = block_hash
        if from_old or merged != held:
            table[place, 1] = merged
            uses[held] -= 1
            uses[merged] += 1
        num_joined += joins
        position += 1
    return position, num_new, num_joined


@compiled
def _remove(
    table: WordRows, old: WordRows, changes: WordRows, uses: Ints, hashes: Hashes, start: int, code: Word
) -> tuple[int, int, int]:
    """From `start` on, up to a change that is not known. Returns that position, how many blocks are gone from the
    index, and how many from the slot."""
    seen, left, leaves = _FREE, _FREE, False
    num_gone = num_left = 0
    position = start
    while position < len(hashes):
        block_hash = hashes[position]
        place = _place(table, block_hash)
        held, old_place = table[place, 1], _FREE
        from_old = held == _FREE and len(old) != 0
        if from_old:
            old_place = _place(old, block_hash)
            held = old[old_place, 1]
            if held == _MOVED:
                held = _FREE
        if held != _FREE:
            if held != seen:
                change = _change(changes, held, code)
                known = changes[change, 1]
                if known == _FREE:
                    break
                seen, left, leaves = held, (known >> _ONE) - _ONE, known & _ONE != _FREE
            if leaves:
                num_left += 1
                uses[held] -= 1
                if from_old:
                    old[old_place, 1] = _MOVED
                    table[place, 0] = block_hash
                if left != _FREE:
                    table[place, 1] = left
                    uses[left] += 1
                else:
                    num_gone += 1
                    if not from_old:
                        _erase(table, place)
        position += 1
    return position, num_gone, num_left


@compiled
def _move(table: WordRows, old: WordRows, changes: WordRows, uses: Ints, start: int, end: int) -> tuple[int, int]:
    """Blocks from these places of the old table to the new one, without closed slots, up to a change that is not known.
    Returns that place and how many blocks are gone from the index."""
    seen, clean = _FREE, _FREE
    num_gone = 0
    place = start
    while place < end:
        held = old[place, 1]
        if held != _FREE and held != _MOVED:
            if held != seen:
                known = changes[_change(changes, held, _CLEAN), 1]
                if known == _FREE:
                    break
                seen, clean = held, (known >> _ONE) - _ONE
            uses[held] -= 1
            if clean != _FREE:
                new = _place(table, old[place, 0])
                table[new, 0], table[new, 1] = old[place, 0], clean
                uses[clean] += 1
            else:
                num_gone += 1
            old[place, 1] = _MOVED
        place += 1
    return place, num_gone


@compiled
def _find(
    table: WordRows, old: WordRows, sets: WordRows, live: Words, hashes: Hashes, found: Floats, each: float
) -> None:
    """Sets in `found`, by slot, `each` times the number of leading blocks, where there are any.

    Blocks may differ in bits of closed slots only. That costs probes and changes no answer: two blocks with equal sets
    have equal living slots, and so has every block between them.
    """
    position, end = 0, len(hashes)
    held = _held(table, old, hashes[0]) if end else _FREE
    holders = live & sets[held]
    # Blocks further on and their sets, the nearest last; past the end nobody holds anything.
    ends, sets_there = np.empty(64, np.int64), np.empty(64, np.uint64)
    ends[0], sets_there[0] = end, _FREE
    num_known = 1
    while held != _FREE:
        num_known -= 1
        end, after = ends[num_known], sets_there[num_known]
        if after != held:
            while end - position > 1:
                middle = (position + end) // 2
                probed = _held(table, old, hashes[middle])
                if probed == held:
                    position = middle
                else:
                    ends[num_known], sets_there[num_known] = end, after
                    num_known += 1
                    end, after = middle, probed
            for word in range(len(holders)):
                ending = holders[word] & ~sets[after, word]
                holders[word] ^= ending
                slot = word * _WORD
                while ending:
                    while not ending & _BYTE:
                        ending >>= _BYTE_BITS
                        slot += 8
                    if ending & _ONE:
                        found[slot] = each * end
                    ending >>= _ONE
                    slot += 1
            held = after
        position = end


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
        self._numbers: dict[bytes, int] = {bytes(8): _NOBODY}  # by mask
        self._unused = list(range(63, 0, -1))  # numbers
        self._changes: WordRows = np.zeros((1 << _CHANGES_BITS, 2), np.uint64)
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
            self._alone.append(_FREE)
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
        self._step(0)

    def apply(self, slot: int, stored: Sequence[int] | Hashes, removed: Sequence[int] | Hashes = ()) -> None:
        """One KV event: removed, then stored."""
        self._check(slot)
        if len(removed):
            self._apply(slot, removed, leaves=True)
        if len(stored):
            num_hashes = self._num_hashes + len(stored)
            if num_hashes > _MAX_LOAD * len(self._table):
                self._move_up_to(len(self._old))
                if num_hashes > _MAX_LOAD * len(self._fresh):
                    self._fresh = _table_for(num_hashes)
                self._rebuild()
            self._apply(slot, stored, leaves=False)
        self._step(len(stored) + len(removed))

    def find(self, hashes: Sequence[int] | Hashes, found: npt.NDArray[np.float64], each: float = 1.0) -> None:
        """Sets in `found`, by slot, `each` times the number of leading blocks that it holds, where it holds any."""
        assert len(found) >= self.num_slots, len(found)
        _find(self._table, self._old, self._sets, self._live, _array(hashes), found, each)

    def _check(self, slot: int) -> None:
        assert int(self._live[slot // _WORD]) >> slot % _WORD & 1, slot

    def _flip(self, slot: int) -> None:
        self._live[slot // _WORD] ^= np.uint64(1 << slot % _WORD)

    def _apply(self, slot: int, hashes: Sequence[int] | Hashes, *, leaves: bool) -> None:
        code, array, position = np.uint64(slot << 1 | leaves), _array(hashes), 0
        while True:
            where = (self._table, self._old, self._changes, self._uses, array, position, code)
            if leaves:
                position, num_gone, num_left = _remove(*where)
                self._num_hashes -= num_gone
                self._num_blocks[slot] -= num_left
            else:
                position, num_new, num_joined = _store(*where, self._alone[slot])
                self._num_hashes += num_new
                self._num_blocks[slot] += num_joined
            if position == len(array):
                return
            self._learn(_held(self._table, self._old, array[position]), code)

    def _step(self, num_blocks: int) -> None:
        """After an event of so many blocks."""
        if len(self._old):
            self._move_up_to(self._next_place + _MIN_STEP + _STEPS_PER_BLOCK * num_blocks)
        elif len(self._fresh):
            end = self._next_place + _FRESH_STEP
            self._fresh[self._next_place : end : _PLACES_PER_PAGE] = _NOBODY
            self._next_place = end
            if end >= len(self._fresh):
                self._rebuild()
        else:
            sparse = len(self._table) > max(_MIN_PLACES, _SPARSE * self._num_hashes)
            if self._closed or sparse or self._num_hashes > _GROW_LOAD * len(self._table):
                self._fresh, self._next_place = _table_for(self._num_hashes), 0

    def _rebuild(self) -> None:
        """Begin to."""
        self._old, self._table, self._fresh, self._next_place = self._table, self._fresh, _EMPTY, 0
        self._leaving, self._closed = self._closed, []
        self._forget_changes()  # they may bring closed slots back

    def _move_up_to(self, place: int) -> None:
        place = min(place, len(self._old))
        while self._next_place < place:
            where = (self._table, self._old, self._changes, self._uses, self._next_place, place)
            self._next_place, num_gone = _move(*where)
            self._num_hashes -= num_gone
            if self._next_place < place:
                self._learn(self._old[self._next_place, 1], _CLEAN)
        if len(self._old) and place == len(self._old):
            self._old = _EMPTY
            for slot in self._leaving:
                heappush(self._free, slot)
            self._leaving = []

    def _learn(self, held: np.uint64, code: np.uint64) -> None:
        """What comes of a set by a change, and whether the slot was in it."""
        if 2 * self._num_changes >= len(self._changes):
            self._forget_changes()
        mask, was_in = self._sets[held] & self._live, False
        if code != _CLEAN:
            slot, leaves = divmod(int(code), 2)
            word, bit = slot // _WORD, np.uint64(1 << slot % _WORD)
            was_in = bool(mask[word] & bit)
            mask[word] = mask[word] & ~bit if leaves else mask[word] | bit
        number = self._number(mask)
        place = _change(self._changes, held, code)
        self._changes[place] = int(held) << int(_CODE_BITS) | int(code), number + 1 << 1 | was_in
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
