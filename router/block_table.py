"""Loops over the blocks of the prefix index, compiled: a hash table with linear probing, of (block hash, its set).

A set is a number, a row of a table of bit masks by slot. What becomes of a set when a slot joins or leaves it stands in
a table of changes: where it is not known yet a loop stops and says how far it came, for its caller to note the change
and go on. While the table is rebuilt, blocks are in `table` or still in `old`, which is empty otherwise. `uses` counts
the blocks that have each set.
"""

import numpy as np

from router.compiled import Floats, Ints, Word, WordRows, Words, compiled, inlined

Hashes = Words

NOBODY = np.uint64(0)  # the empty set; a place that holds it is free
MOVED = np.uint64(0xFFFFFFFFFFFFFFFF)  # a place of the old table whose block is gone to the new one

# What happens to a set: a slot's number twice, and one more where it leaves, or
CLEAN = np.uint64(0xFFFFFF)  # closed slots leave
CHANGES_BITS = 15  # of the number of places for changes
_CODE_BITS = np.uint64(24)
_MIX = np.uint64(0x9E3779B97F4A7C15)
_MIX_SHIFT = np.uint64(64 - CHANGES_BITS)

_ONE, _WORD, _BYTE, _BYTE_BITS = np.uint64(1), 64, np.uint64(0xFF), np.uint64(8)


@inlined
def place_of(table: WordRows, block_hash: Word) -> Word:
    """Where the block is, or the free place where it would be."""
    last = np.uint64(len(table) - 1)
    place = block_hash & last
    while table[place, 1] != NOBODY and table[place, 0] != block_hash:
        place = (place + _ONE) & last
    return place


@compiled
def set_of(table: WordRows, old: WordRows, block_hash: Word) -> Word:
    """Its set."""
    held = table[place_of(table, block_hash), 1]
    if held == NOBODY and len(old) != 0:
        held = old[place_of(old, block_hash), 1]
    return NOBODY if held == MOVED else held


@inlined
def _change_of(changes: WordRows, held: Word, code: Word) -> Word:
    """Where the change of a set is noted, or the free place where it would be."""
    change = (held << _CODE_BITS) | code
    last = np.uint64(len(changes) - 1)
    place = (change * _MIX) >> _MIX_SHIFT
    while changes[place, 1] != NOBODY and changes[place, 0] != change:
        place = (place + _ONE) & last
    return place


@compiled
def note(changes: WordRows, held: Word, code: Word, after: Word, was_in: Word) -> None:
    """What becomes of a set, and (0 or 1) whether the slot was in it; there is room for it."""
    place = _change_of(changes, held, code)
    changes[place, 0] = (held << _CODE_BITS) | code
    changes[place, 1] = ((after + _ONE) << _ONE) | was_in


@inlined
def _erase(table: WordRows, place: Word) -> None:
    """Free a place, and move up what would not be found behind it."""
    last = np.uint64(len(table) - 1)
    free = following = place
    while True:
        following = (following + _ONE) & last
        if table[following, 1] == NOBODY:
            break
        home = table[following, 0] & last
        if ((following - home) & last) >= ((following - free) & last):
            table[free, 0], table[free, 1] = table[following, 0], table[following, 1]
            free = following
    table[free, 1] = NOBODY


@inlined
def _locate(table: WordRows, old: WordRows, block_hash: Word) -> tuple[Word, Word, Word, bool]:
    """Where the block is or would be in the table, and in the old one; its set; whether it is still in the old one."""
    place = place_of(table, block_hash)
    held, old_place = table[place, 1], NOBODY
    if held == NOBODY and len(old) != 0:
        old_place = place_of(old, block_hash)
        held = old[old_place, 1]
        if held != NOBODY and held != MOVED:
            return place, old_place, held, True
        held = NOBODY
    return place, old_place, held, False


@compiled
def store(
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
    seen, merged, joins = NOBODY, NOBODY, False  # the blocks of a prompt mostly share one set
    num_new = num_joined = 0
    position = start
    while position < len(hashes):
        block_hash = hashes[position]
        place, old_place, held, from_old = _locate(table, old, block_hash)
        if held == NOBODY:
            table[place, 0], table[place, 1] = block_hash, alone
            uses[alone] += 1
            num_new += 1
            num_joined += 1
            position += 1
            continue
        if held != seen:
            change = _change_of(changes, held, code)
            known = changes[change, 1]
            if known == NOBODY:
                break
            seen, merged, joins = held, (known >> _ONE) - _ONE, known & _ONE == NOBODY
        if from_old:
            old[old_place, 1] = MOVED
            table[place, 0] = block_hash
        if from_old or merged != held:
            table[place, 1] = merged
            uses[held] -= 1
            uses[merged] += 1
        num_joined += joins
        position += 1
    return position, num_new, num_joined


@compiled
def remove(
    table: WordRows, old: WordRows, changes: WordRows, uses: Ints, hashes: Hashes, start: int, code: Word
) -> tuple[int, int, int]:
    """From `start` on, up to a change that is not known. Returns that position, how many blocks are gone from the
    index, and how many from the slot."""
    seen, left, leaves = NOBODY, NOBODY, False
    num_gone = num_left = 0
    position = start
    while position < len(hashes):
        block_hash = hashes[position]
        place, old_place, held, from_old = _locate(table, old, block_hash)
        if held != NOBODY:
            if held != seen:
                change = _change_of(changes, held, code)
                known = changes[change, 1]
                if known == NOBODY:
                    break
                seen, left, leaves = held, (known >> _ONE) - _ONE, known & _ONE != NOBODY
            if leaves:
                num_left += 1
                uses[held] -= 1
                if from_old:
                    old[old_place, 1] = MOVED
                    table[place, 0] = block_hash
                if left != NOBODY:
                    table[place, 1] = left
                    uses[left] += 1
                else:
                    num_gone += 1
                    if not from_old:
                        _erase(table, place)
        position += 1
    return position, num_gone, num_left


@compiled
def move(table: WordRows, old: WordRows, changes: WordRows, uses: Ints, start: int, end: int) -> tuple[int, int]:
    """Blocks from these places of the old table to the new one, without closed slots, up to a change that is not known.
    Returns that place and how many blocks are gone from the index."""
    seen, clean = NOBODY, NOBODY
    num_gone = 0
    place = start
    while place < end:
        held = old[place, 1]
        if held != NOBODY and held != MOVED:
            if held != seen:
                known = changes[_change_of(changes, held, CLEAN), 1]
                if known == NOBODY:
                    break
                seen, clean = held, (known >> _ONE) - _ONE
            uses[held] -= 1
            if clean != NOBODY:
                new = place_of(table, old[place, 0])
                table[new, 0], table[new, 1] = old[place, 0], clean
                uses[clean] += 1
            else:
                num_gone += 1
            old[place, 1] = MOVED
        place += 1
    return place, num_gone


@compiled
def find(
    table: WordRows, old: WordRows, sets: WordRows, live: Words, hashes: Hashes, found: Floats, each: float
) -> None:
    """Sets in `found`, by slot, `each` times the number of leading blocks, where there are any.

    Blocks may differ in bits of closed slots only. That costs probes and changes no answer: two blocks with equal sets
    have equal living slots, and so has every block between them.
    """
    position, end = 0, len(hashes)
    held = set_of(table, old, hashes[0]) if end else NOBODY
    holders = live & sets[held]
    # Blocks further on and their sets, the nearest last; past the end nobody holds anything.
    ends, sets_there = np.empty(64, np.int64), np.empty(64, np.uint64)
    ends[0], sets_there[0] = end, NOBODY
    num_known = 1
    while held != NOBODY:
        num_known -= 1
        end, after = ends[num_known], sets_there[num_known]
        if after != held:
            while end - position > 1:
                middle = (position + end) // 2
                probed = set_of(table, old, hashes[middle])
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
