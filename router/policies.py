"""Where a request goes. Pure: the same facts, hits and table give the same decision.

Placement calls `choose` when a request reaches the head of its queue; `None` means that no decode worker has
room, so the request stays in the router (decode first: nothing is prefilled that nobody can decode).
A prefill worker is only ever paired with a decode worker of the same fingerprint.

Arrays are indexed by position in a pool.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np

from router.compiled import Bools, Floats
from router.costs import CHEAPER_HERE, NO_PARTNER, NO_ROOM, NOBODY_IN_TIME, Column, Question, best_route, cheapest
from router.demand import PrefillDemand
from router.worker_table import Pool, WorkerTable

# Output tokens for which a decode worker must have room before it gets a request. Reserving all of max_tokens
# would leave most memory idle, since most answers end early; a worker preempts when the guess was too low.
OUTPUT_RESERVE_TOKENS = 256

ANSWER_TOKENS = 200  # of an answer, where limits for its first token and for later ones are compared


def price_of_answers(ttft_s: float, tpot_s: float) -> float:
    """What a second of an answer, its own or another's, is worth beside one before a first token, as these limits say.

    At a price of 1, prompts would wait for seconds where few sequences run rather than slow down many by less than
    anybody sees.
    """
    return min(1.0, ttft_s / (tpot_s * ANSWER_TOKENS))


TPOT_S = 0.05  # limit for a later token, where nobody says another one
ANSWER_PRICE = price_of_answers(ttft_s=2.0, tpot_s=TPOT_S)


class RequestFacts(msgspec.Struct, frozen=True, gc=False):
    """Times are by the clock of the placement that decides."""

    num_tokens: int  # the prompt, and what earlier attempts produced
    max_new_tokens: int  # how many may still come
    arrived: float = 0.0
    priority: int = 0  # lower is earlier
    tenant: str = ""
    session: str = ""
    ttft_s: float | None = None  # what the first token should take from arrival on, and each later one
    tpot_s: float | None = None
    excluded: frozenset[str] = frozenset()  # workers the last attempt saw fail

    @property
    def num_reserved_tokens(self) -> int:
        """To have room for on a decode worker before it gets this request."""
        return self.num_tokens + min(self.max_new_tokens, OUTPUT_RESERVE_TOKENS)

    def num_uncached(self, matched: int) -> int:
        """Tokens to compute after a hit of `matched` tokens; the last one always is, for its logits."""
        return max(1, self.num_tokens - matched)


class RoutingDecision(msgspec.Struct, frozen=True, gc=False):
    prefill: str | None  # None: the decode worker prefills by itself
    decode: str
    hit_tokens: int  # predicted, on the worker that prefills
    reason: str
    ttft_s: float = 0.0  # predicted, from the decision on; 0 where the policy does not predict
    prefill_s: float = 0.0  # of work for whoever prefills
    cost_s: float = 0.0


LATE = "no worker can serve the request in time"


class Reject(msgspec.Struct, frozen=True, gc=False):
    """No worker is predicted to serve it in time."""

    reason: str


class RoutingPolicy(Protocol):
    @property
    def uses_hits(self) -> bool:
        """Whether hashing the prompt is worth the time."""
        ...

    def choose(self, facts: RequestFacts, hits: Floats, table: WorkerTable) -> RoutingDecision | Reject | None:
        """`hits`: tokens of cached prefix, by slot of the index. None: the request waits."""
        ...


@dataclass(frozen=True, slots=True)
class RoundRobin:
    uses_hits: bool = False

    def choose(self, facts: RequestFacts, hits: Floats, table: WorkerTable) -> RoutingDecision | None:
        decoders = np.flatnonzero(with_room(facts, hits, table.decode))
        if not len(decoders):
            return None
        decode = int(decoders[table.turn % len(decoders)])
        there = np.flatnonzero(partners(facts, decode, table))
        prefill = int(there[table.turn % len(there)]) if len(there) else None
        return decision(prefill, decode, hits, table, "round robin")


@dataclass(frozen=True, slots=True)
class LeastLoaded:
    uses_hits: bool = False

    def choose(self, facts: RequestFacts, hits: Floats, table: WorkerTable) -> RoutingDecision | None:
        decoders = with_room(facts, hits, table.decode)
        if not decoders.any():
            return None
        decode = cheapest(np.where(decoders, table.decode[Column.OCCUPANCY], np.inf), table.turn)
        there = partners(facts, decode, table)
        queues = np.where(there, table.prefill[Column.WAIT_S], np.inf)
        prefill = cheapest(queues, table.turn) if there.any() else None
        return decision(prefill, decode, hits, table, "least loaded")


@dataclass(frozen=True, slots=True)
class PrefixAware:
    """Least cost in seconds of all that a request causes: see docs/routing.md for the formula.

    The decode worker prefills by itself when it lacks at most `local_prefill_max_tokens` tokens (None: any number),
    that is cheaper, and its first token is no later; or when there is no prefill worker to pair it with.
    """

    local_prefill_max_tokens: int | None = None
    answer_price: float = ANSWER_PRICE  # on average, up to the limit
    tpot_s: float = TPOT_S
    uses_hits: bool = True

    def choose(self, facts: RequestFacts, hits: Floats, table: WorkerTable) -> RoutingDecision | Reject | None:
        question = self._question(facts, table)
        prefill, decode = table.prefill, table.decode
        place, partner, ttft_s, work_s, cost_s = best_route(
            prefill.columns,
            prefill.workers,
            prefill.among(facts.excluded) if facts.excluded else _NOBODY,
            decode.columns,
            decode.workers,
            decode.among(facts.excluded) if facts.excluded else _NOBODY,
            table.num_fingerprints,
            hits,
            _ALL if table.part_ahead is None else table.part_ahead,
            table.turn,
            question,
        )
        if place < 0:
            if place == NO_ROOM or (facts.ttft_s is None and facts.tpot_s is None):
                return None
            if place == NOBODY_IN_TIME and question.left_s > 0.0 and _idle(table):
                # What is believed of them may be wrong, and nobody would wait.
                return self.choose(msgspec.structs.replace(facts, ttft_s=None, tpot_s=None), hits, table)
            return Reject(LATE)
        prefiller, reason = (partner, "least cost") if partner >= 0 else (None, _HERE[partner])
        return decision(prefiller, place, hits, table, reason, ttft_s, work_s, cost_s)

    def _question(self, facts: RequestFacts, table: WorkerTable) -> Question:
        demand, now, most = table.demand, table.now, self.local_prefill_max_tokens
        routers = _num_routers(table)
        return Question(
            float(facts.num_tokens),
            float(facts.num_reserved_tokens),
            float(facts.max_new_tokens),
            math.inf if facts.ttft_s is None else facts.ttft_s - (now - facts.arrived),
            math.inf if facts.tpot_s is None else facts.tpot_s,
            math.inf if most is None else float(most),
            self.answer_price,
            self.tpot_s,
            demand.mean_output,
            *_load(demand.on_prefill, table.prefill, routers, now),
            *_load(demand.on_decode, table.decode, routers, now),
        )


_ALL: Floats = np.zeros(0)
_NOBODY: Bools = np.zeros(0, np.bool_)
_HERE = {CHEAPER_HERE: "local prefill is cheaper", NO_PARTNER: "no prefill worker"}


def _idle(table: WorkerTable) -> bool:
    """Whether somebody of each pool has nothing to do."""
    prefill_idle = not len(table.prefill) or bool((table.prefill[Column.WAIT_S] == 0.0).any())
    return prefill_idle and bool((table.decode[Column.NUM_SEQS] == 0).any())


def _num_routers(table: WorkerTable) -> float:
    """Whose requests the workers have, if each sends as many as this one: by the sequences on decode workers."""
    return max(1.0, table.decode.total_seqs / max(1, table.num_own))


def _load(demand: PrefillDemand, pool: Pool, routers: float, now: float) -> tuple[float, float]:
    """Of one of the pool's workers: prompts that come each second, and the part of its time that they take. What other
    routers send is taken to be like what this one sends."""
    per_worker = routers / max(1, len(pool))
    return demand.prompts_per_s(now) * per_worker, demand.busy_workers(now) * per_worker


def decision(
    prefill: int | None, decode: int, hits: Floats, table: WorkerTable, reason: str, *predicted: float
) -> RoutingDecision:
    """`predicted`: the decision's last fields."""
    pool, position = (table.decode, decode) if prefill is None else (table.prefill, prefill)
    prefill_id = None if prefill is None else table.prefill.worker_id(prefill)
    return RoutingDecision(
        prefill_id, table.decode.worker_id(decode), int(hits[pool.rows[position]]), reason, *predicted
    )


def with_room(facts: RequestFacts, hits: Floats, pool: Pool) -> Bools:
    """Decode workers that can hold the request, without those that just failed unless there is no other."""
    able: Bools = np.ceil((facts.num_reserved_tokens - hits[pool.rows]) / pool[Column.BLOCK_SIZE]) <= pool[Column.ROOM]
    able &= pool.max_len > facts.num_tokens
    if facts.excluded:
        rest: Bools = able & ~pool.among(facts.excluded)
        return rest if rest.any() else able
    return able


def partners(facts: RequestFacts, decode: int, table: WorkerTable) -> Bools:
    """Prefill workers to pair `decode` with. Those that just failed are left out even when there is no other:
    the decode worker can prefill by itself, which does not depend on what failed."""
    pool = table.prefill
    able: Bools = (pool.fingerprint == table.decode.fingerprint[decode]) & (pool.max_len > facts.num_tokens)
    return able & ~pool.among(facts.excluded) if facts.excluded else able
