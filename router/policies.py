"""Where a request goes. Pure: the same facts, matches and view give the same decision.

The dispatcher calls `choose` when a request reaches the head of its queue; `None` means that no decode worker has
room, so the request stays in the router (decode first: nothing is prefilled that nobody can decode).
A prefill worker is only ever paired with a decode worker of the same fingerprint.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from engine.step_model import StepModel
from router.cluster_view import ClusterView, WorkerView

# Of an H200 with an 8B model: what workers are taken for until one of them has run some steps.
REFERENCE = StepModel(base_s=0.0035, prefill_token_s=21e-6, pair_s=1e-9, decode_s=26e-6, kv_token_s=3e-8)

# Output tokens for which a decode worker must have room before it gets a request. Reserving all of max_tokens
# would leave most memory idle, since most answers end early; a worker preempts when the guess was too low.
OUTPUT_RESERVE_TOKENS = 256

# What a handoff costs, as prompt tokens that could be computed meanwhile: one more hop and the setup of a transfer,
# and for each token moved, for a transfer hides behind prefill but takes bandwidth from others.
HANDOFF_TOKENS = 64
TRANSFER_TOKENS = 0.1


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RequestFacts:
    num_tokens: int  # the prompt, and what earlier attempts produced
    max_new_tokens: int  # how many may still come
    turn: int  # counts decisions: spreads ties
    excluded: frozenset[str] = frozenset()  # workers the last attempt saw fail

    def num_blocks_on(self, worker: WorkerView) -> int:
        """Blocks to have free on a decode worker before it gets this request."""
        num_tokens = self.num_tokens + min(self.max_new_tokens, OUTPUT_RESERVE_TOKENS)
        return -(-num_tokens // worker.block_size)

    def num_uncached(self, matched: int) -> int:
        """Tokens to compute after a hit of `matched` tokens; the last one always is, for its logits."""
        return max(1, self.num_tokens - matched)


@dataclass(frozen=True, slots=True)
class RoutingDecision:
    prefill: str | None  # None: the decode worker prefills by itself
    decode: str
    hit_tokens: int  # predicted, on the worker that prefills
    reason: str


Matches = Mapping[str, int]  # tokens of cached prefix, by worker id


class RoutingPolicy(Protocol):
    @property
    def uses_matches(self) -> bool:
        """Whether hashing the prompt is worth the time."""
        ...

    def choose(self, facts: RequestFacts, matches: Matches, view: ClusterView) -> RoutingDecision | None: ...


@dataclass(frozen=True, slots=True)
class RoundRobin:
    uses_matches: bool = False

    def choose(self, facts: RequestFacts, matches: Matches, view: ClusterView) -> RoutingDecision | None:
        decoders = _with_room(facts, matches, view)
        if not decoders:
            return None
        decode = decoders[facts.turn % len(decoders)]
        partners = _partners(facts, decode, view)
        prefill = partners[facts.turn % len(partners)] if partners else None
        return _decision(prefill, decode, matches, "round robin")


@dataclass(frozen=True, slots=True)
class LeastLoaded:
    uses_matches: bool = False

    def choose(self, facts: RequestFacts, matches: Matches, view: ClusterView) -> RoutingDecision | None:
        decoders = _with_room(facts, matches, view)
        if not decoders:
            return None
        decode = _least(decoders, [_occupancy(worker) for worker in decoders], facts.turn)
        partners = _partners(facts, decode, view)
        queues = [_queue_seconds(worker, _model(worker, view.prefill)) for worker in partners]
        prefill = _least(partners, queues, facts.turn) if partners else None
        return _decision(prefill, decode, matches, "least loaded")


@dataclass(frozen=True, slots=True)
class PrefixAware:
    """Least cost in seconds, by each worker's own model of its steps: the wait for the first token (queue, tokens to
    compute), what a handoff takes, and how much longer the decode worker's sequences will take.

    The decode worker prefills by itself when it lacks at most `local_prefill_max_tokens` tokens (0: never) and its
    own queue makes that no slower than a handoff, or when there is no prefill worker to pair it with. A threshold
    alone would send short prompts to busy decode workers.
    """

    local_prefill_max_tokens: int = 64
    uses_matches: bool = True

    def choose(self, facts: RequestFacts, matches: Matches, view: ClusterView) -> RoutingDecision | None:
        decoders = _with_room(facts, matches, view)
        if not decoders:
            return None
        partners = self._best_prefill(facts, matches, view)
        options = [self._option(facts, matches, view, decode, partners.get(decode.fingerprint)) for decode in decoders]
        index = _least(range(len(options)), [option[0] for option in options], facts.turn)
        _, prefill, reason = options[index]
        return _decision(prefill, decoders[index], matches, reason)

    def _best_prefill(
        self, facts: RequestFacts, matches: Matches, view: ClusterView
    ) -> dict[str, tuple[float, WorkerView]]:
        """The cheapest prefill worker of each fingerprint, with its cost."""
        best: dict[str, tuple[float, WorkerView]] = {}
        num_workers = len(view.prefill)
        for offset in range(num_workers):
            worker = view.prefill[(facts.turn + offset) % num_workers]
            if worker.id in facts.excluded:
                continue
            cost = _first_token_seconds(facts, matches, worker, _model(worker, view.prefill))
            if worker.fingerprint not in best or cost < best[worker.fingerprint][0]:
                best[worker.fingerprint] = (cost, worker)
        return best

    def _option(
        self,
        facts: RequestFacts,
        matches: Matches,
        view: ClusterView,
        decode: WorkerView,
        partner: tuple[float, WorkerView] | None,
    ) -> tuple[float, WorkerView | None, str]:
        uncached, model = facts.num_uncached(matches.get(decode.id, 0)), _model(decode, view.decode)
        prefiller = model if partner is None else _model(partner[1], view.prefill)
        # Each of its sequences makes every step of the newcomer longer, as the newcomer does theirs.
        load = _occupancy(decode) * min(facts.max_new_tokens, OUTPUT_RESERVE_TOKENS) * _growth(facts, decode, model)
        local = load + _first_token_seconds(facts, matches, decode, model if model.prefill_token_s else prefiller)
        if partner is None:
            return local, None, "no prefill worker"
        cost, prefill = partner
        disaggregated = load + cost + prefiller.prefill_token_s * (HANDOFF_TOKENS + TRANSFER_TOKENS * uncached)
        if uncached <= self.local_prefill_max_tokens and local <= disaggregated:
            return local, None, "local prefill is cheaper"
        return disaggregated, prefill, "least cost"


def _model(worker: WorkerView, pool: Sequence[WorkerView]) -> StepModel:
    """Its own, or that of another one in its pool."""
    return worker.model or next((each.model for each in pool if each.model), REFERENCE)


def _queue_seconds(worker: WorkerView, model: StepModel) -> float:
    num_tokens = worker.num_waiting_tokens
    return worker.queue_s + (model.prefill_seconds(num_tokens, 0) if num_tokens else 0.0)


def _first_token_seconds(facts: RequestFacts, matches: Matches, worker: WorkerView, model: StepModel) -> float:
    uncached = facts.num_uncached(matches.get(worker.id, 0))
    return _queue_seconds(worker, model) + model.prefill_seconds(uncached, facts.num_tokens - uncached)


def _growth(facts: RequestFacts, decode: WorkerView, model: StepModel) -> float:
    """Seconds that one more sequence adds to a step; noise must not say that it is free, or one worker gets all."""
    return max(model.decode_s, model.base_s / decode.max_num_seqs) + model.kv_token_s * facts.num_tokens


def _with_room(facts: RequestFacts, matches: Matches, view: ClusterView) -> list[WorkerView]:
    """Decode workers that can hold the request, without those that just failed unless there is no other."""
    able = [worker for worker in view.decode if _has_room(facts, matches.get(worker.id, 0), worker)]
    return [worker for worker in able if worker.id not in facts.excluded] or able


def _has_room(facts: RequestFacts, matched: int, worker: WorkerView) -> bool:
    if worker.num_seqs == 0:
        return True  # what does not fit in an empty worker never will: let it say so
    needed = facts.num_blocks_on(worker) - matched // worker.block_size
    return worker.num_seqs < worker.seq_limit and needed <= worker.num_free_blocks


def _partners(facts: RequestFacts, decode: WorkerView, view: ClusterView) -> list[WorkerView]:
    """Prefill workers to pair `decode` with. Those that just failed are left out even when there is no other:
    the decode worker can prefill by itself, which does not depend on what failed."""
    return [
        worker
        for worker in view.prefill
        if worker.fingerprint == decode.fingerprint and worker.id not in facts.excluded
    ]


def _occupancy(worker: WorkerView) -> float:
    """Sequences it decodes, or as many as its used memory stands for if that is more."""
    used = 1.0 - worker.num_free_blocks / worker.num_blocks if worker.num_blocks else 0.0
    return max(float(worker.num_seqs), used * worker.max_num_seqs)


def _least(items: Sequence[T], costs: Sequence[float], turn: int) -> T:
    """The cheapest item; among equals, the next one after `turn`."""
    least = min(costs)
    ties = [item for item, cost in zip(items, costs, strict=True) if cost == least]
    return ties[turn % len(ties)]


def _decision(prefill: WorkerView | None, decode: WorkerView, matches: Matches, reason: str) -> RoutingDecision:
    worker = prefill or decode
    return RoutingDecision(prefill.id if prefill else None, decode.id, matches.get(worker.id, 0), reason)
