"""Offered KV on its way into a decode worker: matched, reserved, pulled, handed to the engine; and what the router is
told of it.

Owned by the engine thread. An entry is waiting (no blocks yet), pulling (blocks reserved, a pull running on the
asyncio loop writes into them) or gone. Blocks of a running pull are never released before the pull has reported
its end, also when the request is cancelled meanwhile: until then the transport may still write into them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Protocol

from decode_workers.transfer_rate import TransferRate
from engine.errors import TransferError
from engine.kv.cache import KvCache
from engine.kv.layout import BlockId
from engine.request import Request, RequestId
from protos import worker_pb2 as pb

if TYPE_CHECKING:  # a simulation of the cluster uses the intake, without the network
    from kv_transfer.sink import Pulled


@dataclass(frozen=True, slots=True)
class PullEnded:
    """Posted to the engine thread exactly once for each pull started. `error` None and `pulled` None: cancelled."""

    request_id: RequestId
    pulled: "Pulled | None"
    error: TransferError | None


class RunningPull(Protocol):
    """A Future, of which only this is asked."""

    def cancel(self) -> bool: ...


class IntakeEngine(Protocol):
    """What the intake needs of engine.engine.Engine."""

    @property
    def kv(self) -> KvCache: ...
    @property
    def short_of_blocks(self) -> bool: ...
    def check(self, request: Request) -> None: ...
    def hashes(self, request: Request) -> list[int]: ...


@dataclass(slots=True)
class Entry:
    request: Request
    hashes: list[int]  # of the prompt's full blocks
    offer: bytes
    deadline: float
    num_lacking: int  # blocks that it will take, as far as was known when it came
    num_held_tokens: int = 0
    block_ids: list[BlockId] = field(default_factory=list)  # of the whole prompt, matched ones first
    pull: RunningPull | None = None
    cancelled: bool = False


# Starts a pull and returns a future that can be cancelled; the end is reported as PullEnded either way.
StartPull = Callable[[Entry], RunningPull]


class Intake:
    """`max_pulls` bounds how many pulls run at once; the rest wait in order of priority, then arrival."""

    def __init__(self, engine: IntakeEngine, start_pull: StartPull, max_pulls: int) -> None:
        self._engine = engine
        self._start_pull = start_pull
        self._max_pulls = max_pulls
        self._waiting: list[Entry] = []
        self._pulling: dict[RequestId, Entry] = {}
        self._rate = TransferRate()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def moved(self, num_tokens: int, seconds: float, now: float) -> None:
        """KV of so many tokens has come in so much time of the link."""
        self._rate.observe(num_tokens, seconds, now)

    def add_load(self, load: pb.Load, now: float) -> None:
        """Add what is here to the engine's load."""
        load.num_waiting += self.num_waiting
        load.num_handoffs = len(self._pulling)
        # They will have them before anybody who comes now.
        load.num_free_blocks -= min(load.num_free_blocks, sum(entry.num_lacking for entry in self._waiting))
        load.num_pull_tokens = sum(
            len(entry.request.token_ids) - entry.num_held_tokens
            for entry in chain(self._waiting, self._pulling.values())
        )
        load.transfer_token_s = self._rate.token_s(now, pulling=bool(self._pulling))

    def add(self, request: Request, offer: bytes, deadline: float) -> None:
        """Queue a request with the offer of its KV. Raises InvalidRequest when it can never run here."""
        self._engine.check(request)
        hashes, kv = self._engine.hashes(request), self._engine.kv
        num_lacking = -(-len(request.token_ids) // kv.block_size) - kv.num_likely(hashes)
        self._waiting.append(Entry(request, hashes, offer, deadline, num_lacking))
        self._waiting.sort(key=lambda entry: entry.request.priority)  # stable: arrival within a priority

    def start(self) -> None:
        """Start pulls for as many waiting entries, in order, as there are blocks and places for.

        None while sequences already in the engine lack blocks: those came first.
        """
        while self._waiting and len(self._pulling) < self._max_pulls and not self._engine.short_of_blocks:
            entry = self._waiting[0]
            if not self._reserve(entry):
                return
            self._waiting.pop(0)
            self._pulling[entry.request.id] = entry
            entry.pull = self._start_pull(entry)

    def _reserve(self, entry: Entry) -> bool:
        """All blocks of the prompt or none: the cached prefix is shared, the rest is fresh."""
        kv = self._engine.kv
        token_ids = entry.request.token_ids
        held = kv.match(token_ids, entry.hashes)
        fresh = kv.allocate(-(-len(token_ids) // kv.block_size) - len(held))
        if fresh is None:
            kv.release(held)
            return False
        entry.block_ids = held + fresh
        entry.num_held_tokens = len(held) * kv.block_size
        return True

    def cancel(self, request_id: RequestId) -> bool:
        """Drop a waiting entry, or stop its pull; its blocks return when the pull has ended."""
        entry = self._pulling.get(request_id)
        if entry is not None and entry.pull is not None:
            entry.cancelled = True
            entry.pull.cancel()
            return True
        before = len(self._waiting)
        self._waiting = [entry for entry in self._waiting if entry.request.id != request_id]
        return len(self._waiting) < before

    def end(self, request_id: RequestId) -> Entry:
        """The pull has reported: the entry leaves, and its blocks are the caller's to use or release."""
        return self._pulling.pop(request_id)
