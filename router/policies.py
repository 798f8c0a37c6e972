"""Where a request goes. Pure: the same facts, hits and table give the same decision.

Placement calls `choose` when a request reaches the head of its queue; `None` means that no decode worker has
room, so the request stays in the router (decode first: nothing is prefilled that nobody can decode).
A prefill worker is only ever paired with a decode worker of the same fingerprint.

Everything is computed for all workers of a pool at once: arrays are indexed by position in the pool.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import msgspec
import numpy as np

from router.costs import PrefillCost, PrefillLoad, cheapest, decode_cost, prefill_cost
from router.demand import PrefillDemand
from router.worker_table import Bools, Floats, Pool, WorkerTable

# Output tokens for which a decode worker must have room before it gets a request. Reserving all of max_tokens
# would leave most memory idle, since most answers end early; a worker preempts when the guess was too low.
OUTPUT_RESERVE_TOKENS = 256

# What a handoff costs before anything moves, as prompt tokens that could be computed meanwhile: one more hop and the
# setup of a transfer.
HANDOFF_TOKENS = 64

LINK_PRICE = 0.1  # of the time that a transfer takes from others

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
        decode = cheapest(np.where(decoders, table.decode.occupancy, np.inf), table.turn)
        there = partners(facts, decode, table)
        queues = np.where(there, table.prefill.wait_s, np.inf)
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
        pool = table.decode
        hits_here = hits[pool.rows]
        needed = _blocks_needed(facts, hits_here, pool)
        able = _with_room(facts, needed, pool)
        if facts.ttft_s is None and not np.count_nonzero(able):
            return None
        routes = self._routes(facts, hits, hits_here, table)
        decode = decode_cost(
            facts.num_tokens, facts.max_new_tokens, needed, pool, routes.decoding, table.demand.mean_output
        )
        if facts.ttft_s is not None or facts.tpot_s is not None:
            in_time = routes.seconds < np.inf
            if facts.tpot_s is not None:
                in_time &= decode.step <= facts.tpot_s
            if not np.count_nonzero(in_time):
                late = facts.ttft_s is not None and table.now - facts.arrived >= facts.ttft_s
                if not late and _idle(table):  # what is believed of them may be wrong, and nobody would wait
                    return self.choose(msgspec.structs.replace(facts, ttft_s=None, tpot_s=None), hits, table)
                return Reject(LATE)
            in_time &= able
            if not np.count_nonzero(in_time):  # it would keep others from those that have room
                return Reject(LATE) if np.count_nonzero(able) else None
            able = in_time
        costs = np.where(able, routes.seconds + self._price(decode.step) * decode.answers + decode.waits, np.inf)
        best = cheapest(costs, table.turn)
        return routes.decision(best, hits, table, float(costs[best]))

    def _price(self, step: Floats) -> Floats:
        """Of a second of an answer where a step takes so long: from nothing up to twice `answer_price` at the limit, as
        of a loss that grows with the square of the step, and at the limit is what it is at a constant price."""
        price: Floats = np.minimum(2.0 * self.answer_price, (2.0 * self.answer_price / self.tpot_s) * step)
        return price

    def _routes(self, facts: RequestFacts, hits: Floats, hits_here: Floats, table: WorkerTable) -> "_Routes":
        """To each decode worker, the best way to have the prompt computed."""
        pool, num_tokens = table.decode, facts.num_tokens
        left = np.inf if facts.ttft_s is None else facts.ttft_s - (table.now - facts.arrived)
        routers = _num_routers(table)
        handoffs = _handoffs(facts, hits, left, routers, table)
        # Numbers where there is one fingerprint, else arrays by decode worker.
        numbers: Sequence[float | Floats] = handoffs[0].numbers
        paired: bool | Bools = handoffs[0].paired
        if len(handoffs) > 1:
            numbers = tuple(np.array([handoff.numbers for handoff in handoffs]).T[:, pool.fingerprint])
            paired = np.array([handoff.paired for handoff in handoffs])[pool.fingerprint]
        delayed, first, wait, setup = numbers
        uncached = np.maximum(1.0, num_tokens - hits_here)
        transfer = uncached * pool.transfer_token_s
        exposed = np.maximum(0.0, np.maximum(pool.pull_wait_s, wait) + transfer - first)
        seconds: Floats = delayed + setup + exposed + LINK_PRICE * transfer
        most = self.local_prefill_max_tokens
        local: Bools | None = None if most is None else np.logical_not(paired) | (uncached <= most)
        if local is not None and not np.count_nonzero(local):
            return _Routes(seconds, first, handoffs, None, None)
        load = _load(table.demand.on_decode, pool, routers, table.now)
        cost = prefill_cost(num_tokens, uncached, pool, load, table.wait_s(pool))
        # Every sequence that decodes here by then stands still meanwhile, and keeps its memory.
        stalled = self._price(pool.step_s) * pool.num_seqs + pool.stall_price
        seconds_here = cost.first + cost.others + cost.work * stalled
        # Else one decode worker would get all long prompts once prefill workers are full, and they would wait there.
        here: Bools = (seconds_here <= seconds) & (cost.first <= first + setup + exposed)
        if local is not None:
            here &= local
        if left < np.inf:
            here &= cost.first <= left
        return _Routes(np.where(here, seconds_here, seconds), np.where(here, 0.0, first), handoffs, here, cost)


class _Handoff(NamedTuple):
    """From the best prefill worker of a fingerprint: its `position`, the `work` that it has, and `numbers`: seconds
    until the first token and of delay to other prompts, when the first token is there, until the prompt would begin,
    and to set up a transfer. Infinite where there is none in time; `paired`: there is one, perhaps not in time."""

    paired: bool
    position: int = -1
    work: float = 0.0
    numbers: tuple[float, float, float, float] = (np.inf, np.inf, 0.0, 0.0)


def _handoffs(facts: RequestFacts, hits: Floats, left: float, routers: float, table: WorkerTable) -> list[_Handoff]:
    """By fingerprint."""
    pool = table.prefill
    if not len(pool):
        return [_Handoff(paired=False)] * table.num_fingerprints
    load, wait_s = _load(table.demand.on_prefill, pool, routers, table.now), table.wait_s(pool)
    cost = prefill_cost(facts.num_tokens, np.maximum(1.0, facts.num_tokens - hits[pool.rows]), pool, load, wait_s)
    seconds = cost.first + cost.others
    there = pool.holding(facts.num_tokens)
    if facts.excluded:
        rest = ~pool.among(facts.excluded)
        there = rest if there is None else there & rest
    if there is not None:
        seconds = np.where(there, seconds, np.inf)
    if left < np.inf:
        seconds = np.where(cost.first <= left, seconds, np.inf)
    if table.num_fingerprints == 1:
        return [_best_handoff(seconds, cost, wait_s, there is None or bool(there.any()), table)]
    handoffs = []
    for fingerprint in range(table.num_fingerprints):
        mine = pool.fingerprint == fingerprint
        paired = bool((mine if there is None else mine & there).any())
        handoffs.append(_best_handoff(np.where(mine, seconds, np.inf), cost, wait_s, paired, table))
    return handoffs


def _best_handoff(seconds: Floats, cost: PrefillCost, wait_s: Floats, paired: bool, table: WorkerTable) -> _Handoff:
    pool, best = table.prefill, cheapest(seconds, table.turn)
    least = float(seconds[best])
    if least == np.inf:
        return _Handoff(paired)
    setup = HANDOFF_TOKENS * float(pool.prefill_token_s[best])
    numbers = (least, float(cost.first[best]), float(wait_s[best]), setup)
    return _Handoff(paired, best, float(cost.work[best]), numbers)


class _Routes:
    """By decode worker: `seconds` until the first token and of delay to other prompts (inf: no way in time), and what
    of them it spends on `decoding`; whether it prefills `here`, which costs it `cost`."""

    def __init__(
        self,
        seconds: Floats,
        decoding: Floats | float,
        handoffs: Sequence[_Handoff],
        here: Bools | None,
        cost: PrefillCost | None,
    ) -> None:
        self.seconds = seconds
        self.decoding = decoding
        self._handoffs = handoffs
        self._here = here
        self._cost = cost

    def decision(self, decode: int, hits: Floats, table: WorkerTable, cost_s: float) -> RoutingDecision:
        handoff, cost = self._handoffs[int(table.decode.fingerprint[decode])], self._cost
        if cost is None or self._here is None or not self._here[decode]:
            predicted = (handoff.numbers[1], handoff.work, cost_s)
            return decision(handoff.position, decode, hits, table, "least cost", *predicted)
        reason = "local prefill is cheaper" if handoff.paired else "no prefill worker"
        return decision(None, decode, hits, table, reason, float(cost.first[decode]), float(cost.work[decode]), cost_s)


def _idle(table: WorkerTable) -> bool:
    """Whether somebody of each pool has nothing to do."""
    prefill_idle = not len(table.prefill) or bool((table.prefill.wait_s == 0.0).any())
    return prefill_idle and bool((table.decode.num_seqs == 0).any())


def _num_routers(table: WorkerTable) -> float:
    """Whose requests the workers have, if each sends as many as this one: by the sequences on decode workers."""
    return max(1.0, table.decode.total_seqs / max(1, table.num_own))


def _load(demand: PrefillDemand, pool: Pool, routers: float, now: float) -> PrefillLoad:
    """Of one of the pool's workers. What other routers send is taken to be like what this one sends."""
    per_worker = routers / len(pool)
    return PrefillLoad(demand.prompts_per_s(now) * per_worker, demand.busy_workers(now) * per_worker)


def _blocks_needed(facts: RequestFacts, hits_here: Floats, pool: Pool) -> Floats:
    """To have free on each decode worker before it gets this request; hits are of whole blocks."""
    needed: Floats = np.ceil((facts.num_reserved_tokens - hits_here) / pool.block_size)
    return needed


def _with_room(facts: RequestFacts, needed: Floats, pool: Pool) -> Bools:
    able: Bools = needed <= pool.room
    holding = pool.holding(facts.num_tokens)
    if holding is not None:
        able &= holding
    if facts.excluded:
        rest: Bools = able & ~pool.among(facts.excluded)
        return rest if rest.any() else able
    return able


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
    return _with_room(facts, _blocks_needed(facts, hits[pool.rows], pool), pool)


def partners(facts: RequestFacts, decode: int, table: WorkerTable) -> Bools:
    """Prefill workers to pair `decode` with. Those that just failed are left out even when there is no other:
    the decode worker can prefill by itself, which does not depend on what failed."""
    pool = table.prefill
    able: Bools = pool.fingerprint == table.decode.fingerprint[decode]
    holding = pool.holding(facts.num_tokens)
    if holding is not None:
        able &= holding
    return able & ~pool.among(facts.excluded) if facts.excluded else able
