"""Who waits, which workers there are, and who goes where: the router's decisions without its network.

Pure and synchronous. The dispatcher drives it with real workers, the simulator with simulated ones; the clock is an
argument. A candidate is a request that wants workers: added, then placed or refused by `pump`, perhaps put back after
a failed attempt, at last released.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import msgspec
import numpy as np

from engine.kv.block_hash import sampled
from protos import worker_pb2 as pb
from router.admission import Admission, AdmissionConfig
from router.affinity import Affinity, Turn
from router.block_table import Hashes
from router.cluster_view import Reservation, WorkerState
from router.coming_prefixes import ComingPrefixes, ComingPrompt
from router.compiled import Floats
from router.fairness import cost_of
from router.policies import LATE, Reject, RequestFacts, RoutingDecision, RoutingPolicy
from router.prefix_index import PrefixIndex
from router.queue_shares import QueuedPrompt, QueueShares
from router.worker_table import WorkerTable

_MAX_DIRTY = 16  # workers whose reports wait for a decision, which saves work where reports come more often


class Candidate(Protocol):
    """Hashable by identity."""

    @property
    def reusable(self) -> bool:
        """Whether cached blocks spare any work."""
        ...

    def facts(self) -> RequestFacts: ...

    def hashes(self, block_size: int) -> Hashes:
        """Of its full blocks."""
        ...


class KvEvent(Protocol):
    """pb.KvEvent or engine.kv.events.KvEvent."""

    @property
    def removed(self) -> Sequence[int]: ...

    @property
    def stored(self) -> Sequence[int]: ...

    @property
    def cleared(self) -> bool: ...


C = TypeVar("C", bound=Candidate)


@dataclass(frozen=True, slots=True)
class PlacementConfig:
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    seqs_per_slot: float = 1.5  # sequences sent per decode slot, so that freed slots find a prefilled successor


class Placed(msgspec.Struct, Generic[C], frozen=True):
    """To reserve: `on_prefill`, where there is a prefill worker, and `on_decode`."""

    candidate: C
    decision: RoutingDecision
    prefill: WorkerState | None
    decode: WorkerState
    on_prefill: Reservation
    on_decode: Reservation


class Refused(msgspec.Struct, Generic[C], frozen=True):
    """The candidate is out of the queue; `retry_after` in seconds, None where it would never be served."""

    candidate: C
    reason: str
    retry_after: float | None


class Placement(Generic[C]):
    """`clock` is monotonic seconds."""

    def __init__(self, policy: RoutingPolicy, config: PlacementConfig, clock: Callable[[], float]) -> None:
        self._policy = policy
        self._config = config
        self._clock = clock
        self._queue: Admission[C] = Admission(config.admission, clock)
        self._index = PrefixIndex()
        self._slots: dict[str, int] = {}  # in the index, by worker id
        self._states: dict[str, WorkerState] = {}
        self._table = WorkerTable()
        self._latest: dict[C, float] = {}  # of those that wait and have limits, when the first token is late
        self._fresh: list[C] = []  # added since the last pump: as many are refused at most
        self._coming = ComingPrefixes()
        self._computed: dict[C, ComingPrompt] = {}  # of those, by the candidate that was placed
        self._shares = QueueShares()
        self._queued: dict[C, QueuedPrompt] = {}  # of those, by the candidate that was placed
        self._affinity = Affinity()
        self._turns: dict[C, Turn] = {}  # of sessions, by the candidate that was placed

    @property
    def num_waiting(self) -> int:
        return self._queue.num_waiting

    @property
    def num_running(self) -> int:
        return self._queue.num_running

    @property
    def num_hashes(self) -> int:
        """Blocks in the prefix index."""
        return self._index.num_hashes

    def num_blocks(self, worker_id: str) -> int:
        """That the index knows an attached worker to hold."""
        return self._index.num_blocks(self._slots[worker_id])

    def waiting(self) -> list[C]:
        return self._queue.waiting()

    def attach(self, worker_id: str, description: pb.Description, hashes: Iterable[int]) -> WorkerState:
        """A worker may get requests; `hashes` are the blocks it holds. Replaces an earlier life of it."""
        self.detach(worker_id)
        state = WorkerState(worker_id, description, self._config.seqs_per_slot, self._table.dirty)
        self._states[worker_id] = state
        self._open_slot(state)
        self._index.apply(self._slots[worker_id], list(hashes))
        return state

    def detach(self, worker_id: str) -> None:
        """It gets no more requests, and its blocks count no more. Idempotent."""
        state = self._states.pop(worker_id, None)
        if state is not None:
            self._table.remove(state)
            self._shares.forget(self._close_slot(worker_id))

    def apply(self, worker_id: str, event: KvEvent) -> None:
        """One KV event of an attached worker."""
        if event.cleared:
            slot = self._close_slot(worker_id)
            self._open_slot(self._states[worker_id])
            self._shares.move(slot, self._slots[worker_id])
        # A slice, as one of a message's fields is a list, which is read in half the time.
        self._index.apply(self._slots[worker_id], event.stored[:], event.removed[:])

    def expect(self, worker_id: str, hashes: Sequence[int]) -> None:
        """An attached worker has taken prompts that have it compute these blocks, as it samples them; perhaps this
        router's own."""
        self._coming.expect(worker_id, hashes[:], self._states[worker_id].load.queue_us / 1e6, self._clock())

    def reported(self) -> bool:
        """A worker has; whether somebody waits, whom that may help. What several report is taken in before a decision
        has to wait for all of it."""
        if len(self._table.dirty) >= _MAX_DIRTY:
            self._table.refresh()
        return self._queue.num_waiting > 0

    def add(self, candidate: C) -> None:
        facts = candidate.facts()
        cost = cost_of(facts.num_tokens, min(facts.max_new_tokens, self._table.demand.mean_output))
        self._queue.add(candidate, facts.priority, facts.tenant, cost)
        self._fresh.append(candidate)
        if facts.ttft_s is not None:
            self._latest[candidate] = facts.arrived + facts.ttft_s

    def put_back(self, candidate: C) -> None:
        """A placed candidate waits again, where it stood."""
        self._leave_queue(candidate)
        self._expect_no_more(candidate)
        self._queue.put_back(candidate)

    def release(self, candidate: C, num_output_tokens: int | None = None) -> None:
        """It is over, wherever it was. Idempotent. `num_output_tokens`: of its answer, if it has one."""
        if not self._queue.release(candidate):
            return
        self._leave_queue(candidate)
        if num_output_tokens is None:
            self._expect_no_more(candidate)
        else:
            self._computed.pop(candidate, None)
        self._latest.pop(candidate, None)
        turn = self._turns.pop(candidate, None)
        if turn is not None:
            turn.ended(num_output_tokens or 0, self._clock())
        if num_output_tokens is not None:
            self._table.demand.ended(num_output_tokens)

    def pump(self) -> Iterator[Placed[C] | Refused[C]]:
        """All that can be decided now: first come first, until one finds no room. Reserve before taking the next."""
        yield from self._late()
        while (candidate := self._queue.head()) is not None:
            outcome = self._decide(candidate)
            if outcome is None:
                break
            yield outcome
        fresh, self._fresh = self._fresh, []
        for candidate in filter(self._queue.waits, fresh):
            too_long = self._too_long(candidate, candidate.facts())
            if too_long is not None:
                yield too_long
        for _ in range(sum(map(self._queue.waits, fresh))):  # those put back push nobody out
            refused = self._queue.refuse_excess()
            if refused is None:
                break
            self._leave(refused)
            yield Refused(refused, "too many requests are waiting", self._queue.retry_after())

    def _late(self) -> Iterator[Refused[C]]:
        """Those whose time is over, wherever in the queue they stand: others than they may have limits, or none."""
        if self._latest:
            now = self._clock()
            for candidate in [each for each, latest in self._latest.items() if latest <= now]:
                if candidate in self._latest:  # still
                    yield self._reject(candidate, LATE)

    def _leave(self, candidate: C) -> None:
        """It is out of the queue, or going out."""
        self._queue.release(candidate)
        self._latest.pop(candidate, None)

    def _reject(self, candidate: C, reason: str) -> Refused[C]:
        self._leave(candidate)
        return Refused(candidate, reason, self._queue.retry_after())

    def _decide(self, candidate: C) -> Placed[C] | Refused[C] | None:
        table = self._table
        table.refresh()
        if not len(table.decode):
            return None
        table.now = self._clock()
        table.num_own = self._queue.num_running
        facts = candidate.facts()
        too_long = self._too_long(candidate, facts)
        if too_long is not None:
            return too_long
        hits = self._hits(candidate, facts)
        table.part_ahead = self._shares.part_ahead(facts.priority, self._index.num_slots, table.now)
        decision = self._policy.choose(facts, hits, table)
        if decision is None:
            return None
        table.turn += 1
        if isinstance(decision, Reject):
            return self._reject(candidate, decision.reason)
        self._queue.take()
        self._latest.pop(candidate, None)
        self._note(candidate, facts, decision)
        decode = self._states[decision.decode]
        block_size = decode.description.block_size
        matched = int(hits[self._slots[decision.decode]])
        blocks = max(0, -(-facts.num_reserved_tokens // block_size) - matched // block_size)
        prefill_tokens = facts.num_uncached(decision.hit_tokens)
        past = facts.num_tokens - prefill_tokens
        if decision.prefill is None:
            return Placed(candidate, decision, None, decode, Reservation(), Reservation(prefill_tokens, past, blocks))
        work = Reservation(prefill_tokens, past)
        pull = Reservation(blocks=blocks, pull_tokens=facts.num_tokens - matched)
        return Placed(candidate, decision, self._states[decision.prefill], decode, work, pull)

    def _too_long(self, candidate: C, facts: RequestFacts) -> Refused[C] | None:
        """No decode worker can hold it, so it may keep nobody waiting until one of them says so."""
        decode, num_tokens = self._table.decode, facts.num_tokens
        if not len(decode) or num_tokens < decode.most_max_len:
            return None
        self._leave(candidate)
        reason = f"the prompt has {num_tokens} tokens; with room for one more, at most {decode.most_max_len - 1} fit"
        return Refused(candidate, reason, None)

    def _note(self, candidate: C, facts: RequestFacts, decision: RoutingDecision) -> None:
        demand = self._table.demand
        where = demand.on_decode if decision.prefill is None else demand.on_prefill
        where.placed(decision.prefill_s, self._table.now)
        if not self._policy.uses_hits:
            return
        self._expect(candidate, facts.priority, decision)
        if facts.session:
            block_size = self._states[decision.decode].description.block_size
            hashes = candidate.hashes(block_size)
            if len(hashes):
                turn = Turn(
                    decision.prefill, decision.decode, facts.num_tokens, block_size, len(hashes), int(hashes[-1])
                )
                self._turns[candidate] = turn
                self._affinity.placed((facts.tenant, facts.session), turn)

    def _expect(self, candidate: C, priority: int, decision: RoutingDecision) -> None:
        """Who prefills it has it in his queue, and soon holds it."""
        worker_id = decision.prefill or decision.decode
        block_size = self._states[worker_id].description.block_size
        lacking = sampled(candidate.hashes(block_size), block_size, decision.hit_tokens).tolist()
        now, slot = self._table.now, self._slots[worker_id]
        self._queued[candidate] = self._shares.placed(priority, slot, decision.prefill_s, now + decision.ttft_s)
        prompt = self._coming.expect(worker_id, lacking, decision.ttft_s, now)
        if prompt is not None:
            self._computed[candidate] = prompt

    def _leave_queue(self, candidate: C) -> None:
        """That of the worker that was to prefill it."""
        queued = self._queued.pop(candidate, None)
        if queued is not None:
            self._shares.drop(queued)

    def _expect_no_more(self, candidate: C) -> None:
        """What it was to have computed has not been, as far as is known."""
        prompt = self._computed.pop(candidate, None)
        if prompt is not None:
            self._coming.drop(prompt)

    def _hits(self, candidate: C, facts: RequestFacts) -> Floats:
        """Tokens of the request each worker is believed to hold. Workers with other block sizes hash otherwise."""
        hits: Floats = np.zeros(self._index.num_slots)
        if self._policy.uses_hits and candidate.reusable:
            for block_size in self._table.block_sizes:
                hashes = candidate.hashes(block_size)
                self._index.find(hashes, hits, block_size)
                sample = sampled(hashes, block_size).tolist()
                for worker_id, num_tokens in self._coming.find(sample, block_size, self._table.now).items():
                    slot = self._slots.get(worker_id)
                    if slot is not None and hits[slot] < num_tokens:
                        hits[slot] = num_tokens
            if facts.session:
                self._count_session(candidate, facts, hits)
        return hits

    def _count_session(self, candidate: C, facts: RequestFacts, hits: Floats) -> None:
        turn = self._affinity.last((facts.tenant, facts.session), self._table.now)
        if turn is None:
            return
        hashes = candidate.hashes(turn.block_size)
        if len(hashes) < turn.num_blocks or hashes[turn.num_blocks - 1] != turn.last_hash:
            return  # another conversation, whatever the client says
        for worker_id, num_tokens in turn.held():
            slot = self._slots.get(worker_id)
            if slot is not None:
                block_size = self._states[worker_id].description.block_size
                num_blocks = min(num_tokens, facts.num_tokens) // block_size
                hits[slot] = max(hits[slot], num_blocks * block_size)

    def _close_slot(self, worker_id: str) -> int:
        slot = self._slots.pop(worker_id)
        self._index.close(slot)
        self._coming.forget(worker_id)
        return slot

    def _open_slot(self, state: WorkerState) -> None:
        slot = self._slots[state.worker_id] = self._index.open()
        self._table.add(state, slot)
