"""Traces of requests: when they came, how long they were, and what they have in common.

Mooncake's format (a JSON object a line: `timestamp` in ms, `input_length`, `output_length`, `hash_ids` of blocks of 512
tokens, each id standing for the whole prefix up to there; here also, where a line says them, the fields of Hints) and
that of Azure's 2023 traces (CSV: TIMESTAMP, ContextTokens, GeneratedTokens; no two prompts have anything in common).

No token ids are made up: a block of the simulation is named by the trace's block that it lies in and its place there.
What an answer says is known where a later prompt goes on from it, as the next turn of a conversation does: the first
later request that shares all full blocks of a prompt and is at least as long as that prompt with its answer.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from random import Random
from typing import Annotated, NamedTuple

import msgspec
import numpy as np

from router.block_table import Hashes
from router.params import PRIORITIES

TRACE_BLOCK = 512  # tokens a hash id stands for
WINDOW_S = 3.0  # Mooncake's clock ticks so; arrivals are drawn anew within windows of this length
MAX_TOKENS = 1 << 30  # of a prompt or an answer
MAX_TIMESTAMP_MS = 1e13  # three centuries: milliseconds since 1970, too
MAX_ID = (1 << 48) - 1  # names of blocks are made of ids in 64 bits
_SCRAMBLE = 0x9E3779B97F4A7C15  # odd, so multiplication modulo 2**64 keeps names apart


class TraceError(ValueError):
    """The file holds no trace. The message names the line and the field."""


class Hints(NamedTuple):
    """What a client says of a request beside its prompt, as in headers X-Session-ID, X-Tenant-ID, X-SLO-TTFT-MS and
    X-SLO-TPOT-MS and in `priority`. Limits are for routers, to refuse it by; a report's are others."""

    session_id: str = ""
    tenant: str = ""
    priority: int = 0
    slo_ttft_ms: float | None = None
    slo_tpot_ms: float | None = None


NO_HINTS = Hints()


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """`contents` names the blocks of TRACE_BLOCK tokens of prompt and answer together."""

    number: int  # place in the trace
    arrived: float  # seconds
    num_prompt_tokens: int
    num_output_tokens: int
    contents: Sequence[int]
    num_unshared: int = 0  # of `contents`, the last ones that begin in the prompt and go on in an answer nobody repeats
    hints: Hints = NO_HINTS

    @property
    def num_tokens(self) -> int:
        """Of prompt and answer."""
        return self.num_prompt_tokens + self.num_output_tokens

    def hashes(self, block_size: int) -> Hashes:
        """Of the full blocks of prompt and answer. `block_size` divides TRACE_BLOCK."""
        per_block = TRACE_BLOCK // block_size
        names = np.repeat(np.array(self.contents, np.uint64), per_block) * np.uint64(TRACE_BLOCK)
        names += np.tile(np.arange(per_block, dtype=np.uint64), len(self.contents))
        names = names[: self.num_tokens // block_size]
        if self.num_unshared:
            own = slice(
                self.num_prompt_tokens // block_size, self.num_prompt_tokens // TRACE_BLOCK * per_block + per_block
            )
            names[own] |= np.uint64(1 << 63)
            names[own] += np.uint64(self.number << 32)
        hashes: Hashes = (names + np.uint64(1)) * np.uint64(_SCRAMBLE)
        return hashes


@dataclass(frozen=True, slots=True)
class Trace:
    name: str
    requests: Sequence[TraceRequest]

    @property
    def seconds(self) -> float:
        return self.requests[-1].arrived - self.requests[0].arrived if self.requests else 0.0

    @property
    def max_output_tokens(self) -> int:
        """What clients of the trace might have asked for: the longest answer."""
        return max((request.num_output_tokens for request in self.requests), default=1)


def arrivals(trace: Trace, seed: int, rate_scale: float = 1.0) -> list[float]:
    """Seconds of each request's arrival from the trace's begin, ascending, time compressed by `rate_scale`.

    Each window of WINDOW_S keeps its requests and their order, and their times in it are drawn anew, uniformly: so
    random arrivals at the trace's own rate, as often as one likes.
    """
    random = Random(seed)
    times: list[float] = []
    start = trace.requests[0].arrived if trace.requests else 0.0
    windows = [int((request.arrived - start + 1e-6) // WINDOW_S) for request in trace.requests]
    place = 0
    while place < len(windows):
        end = place
        while end < len(windows) and windows[end] == windows[place]:
            end += 1
        drawn = sorted(random.random() for _ in range(end - place))
        times += [(windows[place] + each) * WINDOW_S / rate_scale for each in drawn]
        place = end
    return times


def load_trace(path: Path, max_requests: int | None = None) -> Trace:
    """Raises TraceError and OSError."""
    with path.open(encoding="utf-8", errors="replace") as file:
        rows = _azure_rows(file) if path.suffix == ".csv" else _mooncake_rows(file)
        found: list[_Row] = []
        try:
            found += islice(rows, max_requests)
        except csv.Error as error:
            raise TraceError(str(error)) from None
    if not found:
        raise TraceError("holds no request")
    found.sort(key=lambda row: row.seconds)
    return Trace(path.stem, _with_answers(found))


@dataclass(frozen=True, slots=True)
class _Row:
    seconds: float
    num_prompt_tokens: int
    num_output_tokens: int
    ids: Sequence[int]
    hints: Hints = NO_HINTS

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_output_tokens


_Priority = Annotated[int, msgspec.Meta(ge=PRIORITIES[0], le=PRIORITIES[-1])]
_Limit = Annotated[float, msgspec.Meta(gt=0)]


class _MooncakeLine(msgspec.Struct):
    timestamp: Annotated[float, msgspec.Meta(ge=0, le=MAX_TIMESTAMP_MS)]
    input_length: Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)]
    output_length: Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)]
    hash_ids: list[Annotated[int, msgspec.Meta(ge=0, le=MAX_ID)]]
    session_id: str | int | None = None
    tenant: str | int | None = None
    priority: _Priority | None = None
    slo_ttft_ms: _Limit | None = None
    slo_tpot_ms: _Limit | None = None

    @property
    def hints(self) -> Hints:
        session_id, tenant = ("" if each is None else str(each) for each in (self.session_id, self.tenant))
        return Hints(session_id, tenant, self.priority or 0, self.slo_ttft_ms, self.slo_tpot_ms)


def _mooncake_rows(lines: Iterator[str]) -> Iterator[_Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data = msgspec.json.decode(line, type=_MooncakeLine)
        except msgspec.MsgspecError as error:
            raise TraceError(f"line {number}: {error}") from None
        row = _Row(data.timestamp / 1000, data.input_length, data.output_length, data.hash_ids, data.hints)
        num_blocks = -(-row.num_prompt_tokens // TRACE_BLOCK)
        if len(row.ids) != num_blocks:
            raise TraceError(
                f"line {number}: hash_ids: {len(row.ids)} are given; input_length {row.num_prompt_tokens} needs"
                f" {num_blocks}, one for each block of {TRACE_BLOCK} tokens"
            )
        yield row


def _azure_rows(lines: Iterator[str]) -> Iterator[_Row]:
    for number, line in enumerate(csv.DictReader(lines), 2):
        written = line.get("TIMESTAMP")
        try:
            seconds = datetime.fromisoformat((written or "")[:26]).timestamp()
        except (ValueError, OverflowError):
            allowed = "a time such as 2023-11-16 18:15:46.680590"
            raise TraceError(f"line {number}: TIMESTAMP: {written!r} is not allowed; allowed: {allowed}") from None
        num_prompt, num_output = (_azure_count(line, field, number) for field in ("ContextTokens", "GeneratedTokens"))
        yield _Row(seconds, num_prompt, num_output, ())


def _azure_count(line: Mapping[str, str | None], field: str, number: int) -> int:
    """One at least, as all requests here have."""
    written = line.get(field)
    if written is None or not written.strip().isdecimal() or len(written) > 16 or int(written) > MAX_TOKENS:
        raise TraceError(f"line {number}: {field}: {written!r} is not allowed; allowed: 0 to {MAX_TOKENS}")
    return max(1, int(written))


def _with_answers(rows: Sequence[_Row]) -> list[TraceRequest]:
    """Last first: what follows a prompt is known when the prompt that repeats it is."""
    children = _children(rows)
    filled: dict[int, int] = {}  # by the id of a prompt's last, partial block, the id of that block in the next turn
    for number, child in children.items():
        num_full = rows[number].num_prompt_tokens // TRACE_BLOCK
        if num_full < len(rows[number].ids):
            filled[rows[number].ids[num_full]] = rows[child].ids[num_full]
    fresh = 1 + max((max(row.ids, default=0) for row in rows), default=0)  # ids from here on are in no prompt
    contents: list[Sequence[int]] = [()] * len(rows)
    unshared = [0] * len(rows)
    for number in reversed(range(len(rows))):
        row = rows[number]
        num_blocks, num_full = -(-row.num_tokens // TRACE_BLOCK), row.num_prompt_tokens // TRACE_BLOCK
        known = list(row.ids)
        if number in children:
            known[num_full:] = contents[children[number]][num_full:num_blocks]
        elif num_full < len(known):
            passed: set[int] = set()  # a trace may name a block alike in two turns, or go in a circle
            while known[num_full] in filled and known[num_full] not in passed:
                passed.add(known[num_full])
                known[num_full] = filled[known[num_full]]
            unshared[number] = 1
        num_fresh = num_blocks - len(known)
        contents[number] = (*known, *range(fresh, fresh + num_fresh))
        fresh += num_fresh
    return [
        TraceRequest(
            number,
            row.seconds,
            row.num_prompt_tokens,
            row.num_output_tokens,
            contents[number],
            unshared[number],
            row.hints,
        )
        for number, row in enumerate(rows)
    ]


def _children(rows: Sequence[_Row]) -> dict[int, int]:
    """For each request that one goes on from, the first that does. A first block alone says nothing: all share it."""
    ends: dict[int, int] = {}  # by the id of a prompt's last full block, the latest such request
    children: dict[int, int] = {}
    for number, row in enumerate(rows):
        for block_id in reversed(row.ids):
            parent = ends.get(block_id)
            if parent is not None and parent not in children and row.num_prompt_tokens >= rows[parent].num_tokens:
                children[parent] = number
                break
        num_full = row.num_prompt_tokens // TRACE_BLOCK
        if row.ids and num_full > 1:
            ends[row.ids[num_full - 1]] = number
    return children
