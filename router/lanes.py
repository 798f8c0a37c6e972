"""The short way of a streamed answer's tokens: from a worker's frame to the client's socket, past all of Python.

Nearly all tokens come alone, each for another stream, and become an event each. Where hundreds of streams take turns a
processor's caches are cold at every token, so what a token costs beside the kernel's work is the memory that it
touches. Of a stream in a lane that is one row of a few arrays. Everything but the next token, alone and of known text,
goes the long way, which closes the lane first; a lane is opened when what went the long way has reached the kernel
whole. Invariants: what went by a lane is in its row until the lane is closed, and then its stream's; a lane's
descriptor stays open longer than the lane; in a lane there is one writer to a connection, the lane.
"""

import logging
import socket
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numba import types
from numba.core.types import ExternalFunction

from engine.wire import LONE_TOKEN_BYTES, LoneToken, lone_tokens_from_bytes
from router.compiled import ByteRows, Bytes, ConstWords, Int32Rows, IntRows, Ints, Words, compiled

log = logging.getLogger(__name__)

SLOT_BITS = 20  # of a handle; the rest counts
ID_BITS = 20  # of a token
MAX_VOCABULARIES = 8
MAX_KEPT = 256  # tokens in a lane, then the stream takes them
MAX_AROUND = 512  # bytes around an event's text
MAX_TEXT = 255  # bytes of an event's text
# Columns of a row. A lane that is closed awaits no index.
_HANDLE, _NEXT, _DESCRIPTOR, _BASE, _NUM_KEPT, _AT_NS, _LEN_BEFORE, _LEN_AFTER = range(8)
_CLOSED = -1
_FLAGS = int(socket.MSG_DONTWAIT | getattr(socket, "MSG_NOSIGNAL", 0))

_BUFFER = types.CPointer(types.uint8)  # type: ignore[no-untyped-call]
_send: Any = ExternalFunction("send", types.intp(types.int32, _BUFFER, types.uintp, types.int32))  # of the C library


class Gaps(Protocol):
    """A histogram of seconds."""

    counts: list[int]
    total: float

    @property
    def bounds(self) -> Sequence[float]: ...


class LaneEvents(Protocol):
    """What a lane needs to know of the events that tokens become, and who hears of them."""

    before: bytes  # their text, as JSON
    after: bytes
    vocabulary: int  # see EventTexts.vocabulary
    texts: "EventTexts"
    piece_at: float  # when the last one came, monotonic seconds

    @property
    def inter_token(self) -> Gaps: ...

    def lane_closed(self, num_tokens: int, last_at: float) -> None:
        """So many tokens went by the lane, the last of them then."""
        ...

    def lane_broke(self, rest: bytes) -> None:
        """It is closed, and the kernel did not take this rest of its last event."""
        ...


class LaneStream(Protocol):
    """Whose tokens they are."""

    def lane_closed(self, token_ids: list[int]) -> None:
        """These tokens went by the lane, which is closed."""
        ...


class EventTexts:
    """What tokens read in an event, as JSON, of each vocabulary; learned from the events that went the long way."""

    def __init__(self) -> None:
        self.spans = np.zeros(0, np.uint64)  # by vocabulary and token: where in `arena`, and length; 0: not known
        self.arena = np.zeros(1 << 16, np.uint8)
        self._used = 0
        self._vocabularies: list[object] = []

    def vocabulary(self, key: object) -> int:
        """The number of a vocabulary, which is compared by identity; -1 where there are too many."""
        for number, known in enumerate(self._vocabularies):
            if known is key:
                return number
        if len(self._vocabularies) == MAX_VOCABULARIES:
            return -1
        self._vocabularies.append(key)
        self.spans = np.concatenate([self.spans, np.zeros(1 << ID_BITS, np.uint64)])
        return len(self._vocabularies) - 1

    def learn(self, vocabulary: int, token_id: int, text: bytes) -> None:
        """`text`: not empty, and always what this token reads where nothing is held back."""
        place = vocabulary << ID_BITS | token_id
        if vocabulary < 0 or token_id >> ID_BITS or len(text) > MAX_TEXT or self.spans[place]:
            return
        while self._used + len(text) > len(self.arena):
            self.arena = np.concatenate([self.arena, np.zeros_like(self.arena)])
        self.arena[self._used : self._used + len(text)] = np.frombuffer(text, np.uint8)
        self.spans[place] = self._used << 8 | len(text)
        self._used += len(text)


class Lanes:
    """Of one process. A handle names a request to a worker, no other one in the process's life, and may have a lane."""

    def __init__(self, num_slots: int = 256) -> None:
        self._rows = np.zeros((num_slots, 8), np.int64)
        self._around = np.zeros((num_slots, MAX_AROUND), np.uint8)
        self._kept = np.zeros((num_slots, MAX_KEPT), np.int32)
        self._owners: list[tuple[LaneStream, LaneEvents] | None] = [None] * num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._num_handles = 0
        self._num_open = 0
        self._texts = EventTexts()
        self._gaps: Gaps | None = None
        self._bounds_ns = np.zeros(0, np.int64)
        self._gap_counts = np.zeros(0, np.int64)
        self._event = np.zeros(MAX_AROUND + MAX_TEXT + 16, np.uint8)
        self._left = np.zeros(0, np.int64)
        self._broken = np.zeros(0, np.int64)

    def new_handle(self) -> int:
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self._num_handles += 1
        return self._num_handles << SLOT_BITS | slot

    def release(self, handle: int) -> None:
        """Nothing comes for a handle any more."""
        self.close(handle)
        self._free.append(handle & (1 << SLOT_BITS) - 1)

    def open(self, handle: int, stream: LaneStream, index: int, descriptor: int, events: LaneEvents) -> bool:
        """Send this and the next output tokens of a handle that has no lane as events to `descriptor`, a connection's,
        in chunks of HTTP. False: not such events."""
        before, after = events.before, events.after
        if events.vocabulary < 0 or len(before) + len(after) > MAX_AROUND:
            return False
        slot = handle & (1 << SLOT_BITS) - 1
        assert self._owners[slot] is None, handle
        if self._gaps is not events.inter_token:
            self._gaps = events.inter_token
            self._bounds_ns = np.array([int(1e9 * bound) for bound in self._gaps.bounds], np.int64)
            self._gap_counts = np.zeros(len(self._bounds_ns) + 2, np.int64)  # the last: nanoseconds in all
        self._texts = events.texts
        self._around[slot, : len(before) + len(after)] = np.frombuffer(before + after, np.uint8)
        base = events.vocabulary << ID_BITS
        at_ns = int(1e9 * events.piece_at)
        self._rows[slot] = (handle, index, descriptor, base, 0, at_ns, len(before), len(after))
        self._owners[slot] = stream, events
        self._num_open += 1
        return True

    def close(self, handle: int) -> None:
        """Idempotent. Its stream gets what went by the lane."""
        slot = handle & (1 << SLOT_BITS) - 1
        owner, row = self._owners[slot], self._rows[slot]
        if owner is not None and row[_HANDLE] == handle:
            row[_NEXT] = _CLOSED
            self._owners[slot] = None
            self._num_open -= 1
            self._count_gaps()
            token_ids = self._kept[slot, : row[_NUM_KEPT]].tolist()
            owner[0].lane_closed(token_ids)
            owner[1].lane_closed(len(token_ids), int(row[_AT_NS]) / 1e9)

    def route(self, tokens: bytes, now: float) -> Sequence[LoneToken]:
        """Takes Frame.tokens; returns those that have to go the long way. Raises ValueError for bytes that are none."""
        num_tokens, odd = divmod(len(tokens), LONE_TOKEN_BYTES)
        if not self._num_open or not num_tokens or odd:
            return list(lone_tokens_from_bytes(tokens))
        if len(self._left) < num_tokens:
            self._left = np.zeros(2 * num_tokens, np.int64)
            self._broken = np.zeros(2 * num_tokens, np.int64)
        num_left, num_broken = send_tokens(
            np.frombuffer(tokens, np.uint64),
            int(1e9 * now),
            self._rows,
            self._around,
            self._kept,
            self._texts.spans,
            self._texts.arena,
            self._bounds_ns,
            self._gap_counts,
            self._event,
            self._left,
            self._broken,
        )
        if num_broken:
            for slot in self._broken[:num_broken].tolist():
                self._break(slot)
        if not num_left:
            return ()
        known = list(lone_tokens_from_bytes(tokens))
        return [known[number] for number in self._left[:num_left].tolist()]

    def _break(self, slot: int) -> None:
        """The kernel did not take the event of the last token in this lane, or not all of it."""
        owner, row = self._owners[slot], self._rows[slot]
        if owner is None:
            return
        span = int(self._texts.spans[row[_BASE] + self._kept[slot, row[_NUM_KEPT] - 1]])
        text = self._texts.arena[span >> 8 : (span >> 8) + (span & 0xFF)].tobytes()
        event = owner[1].before + text + owner[1].after
        num_sent = max(0, int(row[_DESCRIPTOR]))
        self.close(int(row[_HANDLE]))
        try:
            owner[1].lane_broke((b"%x\r\n%b\r\n" % (len(event), event))[num_sent:])
        except Exception:  # the guard between connections, as in `WriteBatch`
            log.exception("the rest of an event could not be written")

    def _count_gaps(self) -> None:
        """Of all lanes; not at each frame, as Python's part of those costs as much as several tokens."""
        gaps, counts = self._gaps, self._gap_counts
        assert gaps is not None
        for place in counts[:-1].nonzero()[0].tolist():
            gaps.counts[place] += int(counts[place])
        gaps.total += int(counts[-1]) / 1e9
        counts[:] = 0

    def _grow(self) -> None:
        num_slots = len(self._owners)
        if num_slots >> SLOT_BITS:
            raise RuntimeError(f"{num_slots} requests are open")
        self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
        self._around = np.concatenate([self._around, np.zeros_like(self._around)])
        self._kept = np.concatenate([self._kept, np.zeros_like(self._kept)])
        self._owners += [None] * num_slots
        self._free = list(range(2 * num_slots - 1, num_slots - 1, -1))


@compiled
def send_tokens(
    tokens: ConstWords,
    now_ns: int,
    rows: IntRows,
    around: ByteRows,
    kept: Int32Rows,
    spans: Words,
    arena: Bytes,
    bounds_ns: Ints,
    gap_counts: Ints,
    event: Bytes,
    left: Ints,
    broken: Ints,
) -> tuple[int, int]:
    """Sends the tokens that have a lane. Returns how many have not, their numbers in `left`, and how many lanes broke:
    their slots in `broken`, closed, how much of the last event was sent in the descriptor's place."""
    num_left = num_broken = 0
    for number in range(len(tokens) // 2):
        handle, word = np.int64(tokens[2 * number]), tokens[2 * number + 1]
        index, token_id = np.int64(word & np.uint64(0xFFFFFFFF)), np.int64(word >> np.uint64(32))
        slot = handle & ((1 << SLOT_BITS) - 1)
        span = np.int64(0)
        if slot < len(rows) and token_id >> ID_BITS == 0:
            row = rows[slot]
            if row[_HANDLE] == handle and row[_NEXT] == index and row[_NUM_KEPT] < MAX_KEPT:
                span = np.int64(spans[row[_BASE] + token_id])
        if span == 0:
            left[num_left] = number
            num_left += 1
            continue
        row = rows[slot]
        len_text, len_before, len_after = span & 0xFF, row[_LEN_BEFORE], row[_LEN_AFTER]
        size = len_before + len_text + len_after
        place = 0
        for shift in (8, 4, 0):
            digit = size >> shift & 15
            if place or digit:
                event[place] = digit + (48 if digit < 10 else 87)
                place += 1
        event[place], event[place + 1] = 13, 10
        place += 2
        for each in range(len_before):
            event[place + each] = around[slot, each]
        place += len_before
        for each in range(len_text):
            event[place + each] = arena[(span >> 8) + each]
        place += len_text
        for each in range(len_after):
            event[place + each] = around[slot, len_before + each]
        place += len_after
        event[place], event[place + 1] = 13, 10
        place += 2
        num_sent = _send(row[_DESCRIPTOR], event.ctypes, place, _FLAGS)
        kept[slot, row[_NUM_KEPT]] = token_id
        row[_NUM_KEPT] += 1
        row[_NEXT] += 1
        gap_ns = now_ns - row[_AT_NS]
        row[_AT_NS] = now_ns
        gap_counts[np.searchsorted(bounds_ns, gap_ns)] += 1
        gap_counts[-1] += gap_ns
        if num_sent != place:
            row[_NEXT], row[_DESCRIPTOR] = _CLOSED, num_sent
            broken[num_broken] = slot
            num_broken += 1
    return num_left, num_broken
