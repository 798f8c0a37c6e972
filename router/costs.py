"""What a request would cost on each worker, in seconds, and where it costs least.

Tokens become seconds by each worker's own model of its steps. Arrays are indexed by position in a pool, one for each
number: over 1,000 workers that takes three quarters of the time that a record for each worker took.
"""

import math
from enum import IntEnum
from typing import Annotated, NamedTuple

import numba
import numpy as np

from router.compiled import Bools, FloatRows, Floats, Ints, compiled, inlined

# What a handoff costs before anything moves, as prompt tokens that could be computed meanwhile: one more hop and the
# setup of a transfer.
HANDOFF_TOKENS = 64

LINK_PRICE = 0.1  # of the time that a transfer takes from others

MIN_FREE = 0.05  # of a worker's memory, which is divided by

# How far a queue is taken to be from never emptying, at least; else one second of work would seem to delay all others.
_MIN_SLACK = 0.1

# What `best_route` says in place of a decode worker's position.
NO_ROOM = -1  # nobody has room
NOBODY_IN_TIME = -2  # whatever their room
ONLY_FULL_ONES_IN_TIME = -3  # others have room

# And in place of a prefill worker's, where the decode worker computes the prompt.
CHEAPER_HERE = -1
NO_PARTNER = -2

_DELAYED, _FIRST, _WAIT, _SETUP, _WORK = range(5)  # of a handoff, in seconds; see `_handoffs`


class Column(IntEnum):
    """One number for each worker: its limit, what it reports, its StepModel, and what follows from both."""

    BATCH_TOKENS = 0  # of a step
    BLOCK_SIZE = 1
    NUM_BLOCKS = 2
    NUM_SEQS = 3
    NUM_RUNNING = 4
    NUM_FREE_BLOCKS = 5
    BASE_S = 6
    PREFILL_TOKEN_S = 7
    PAIR_S = 8
    DECODE_S = 9
    KV_TOKEN_S = 10
    WAIT_S = 11  # until a prompt that comes now would begin
    OCCUPANCY = 12  # sequences, or as many as the used memory stands for if that is more
    NUM_TOKENS = 13  # that its blocks hold
    SEQ_TOKENS = 14  # of KV that a sequence has, on average
    NEWCOMER_S = 15  # that one more sequence adds to a step, before its KV
    STEP_S = 16  # a decode step now
    TRANSFER_TOKEN_S = 17  # of its link, for each token of KV that comes
    PULL_WAIT_S = 18  # until what is on its way has come
    ROOM = 19  # blocks a newcomer may take: none at the limit of sequences, any when idle
    NUM_COMING = 20  # sequences that do not run yet
    BLOCK_PART = 21  # one block's of its memory
    FREE_PART = 22  # of its memory
    PRESSURE = 23  # sequences, times the part of its memory that is taken
    STALL_PRICE = 24  # seconds that others wait for memory longer, for each in which it decodes nothing
    BESIDE_S = 25  # what decodes in a step beside a prompt takes of it


class Question(NamedTuple):
    """Of one request."""

    num_tokens: float
    num_reserved_tokens: float  # to have room for on a decode worker
    max_new_tokens: float
    left_s: float  # until the first token is late; inf: never
    tpot_s: float  # what a later one may take; inf: anything
    max_local_tokens: float  # that a decode worker may compute where there is a prefill worker for it
    answer_price: float  # of a second of an answer where a step takes half of `price_tpot_s`
    price_tpot_s: float
    mean_output: float  # tokens of an answer
    # Of one worker of each pool: prompts to compute that come each second, and the part of its time that they take.
    prefill_rate: float
    prefill_busy: float
    decode_rate: float
    decode_busy: float


_Question = Annotated[Question, numba.types.NamedUniTuple(numba.types.float64, len(Question._fields), Question)]

_Workers = tuple[Ints, Ints, Ints]  # slots in the prefix index, numbers of their fingerprints, longest sequences


@compiled
def prefill_cost(pool: FloatRows, num_tokens: float, uncached: Floats, wait_s: Floats) -> tuple[Floats, Floats]:
    """Seconds to compute what is not cached, and until its first token is there; `wait_s` until the prompt begins."""
    base_s, token_s, pair_s = pool[Column.BASE_S], pool[Column.PREFILL_TOKEN_S], pool[Column.PAIR_S]
    batch_tokens, beside_s = pool[Column.BATCH_TOKENS], pool[Column.BESIDE_S]
    work, first = np.empty_like(uncached), np.empty_like(uncached)
    for i in range(len(uncached)):
        pairs_each = (num_tokens + 0.5) - 0.5 * uncached[i]
        num_steps = np.ceil(uncached[i] / batch_tokens[i])
        work[i] = num_steps * base_s[i] + uncached[i] * (token_s[i] + pair_s[i] * pairs_each)
        # The step under way when it comes is half over.
        first[i] = wait_s[i] + work[i] + (num_steps + 0.5) * beside_s[i]
    return work, first


@compiled
def work_price(pool: FloatRows, requests_per_s: float, busy: float) -> float:
    """By how much a second of work delays requests which come later, in seconds.

    It is one price for the whole pool, and it rises as the pool fills up. The work takes the place of other work in the
    part of the time that workers are busy. Where even the shortest queue is not empty, each request that comes before
    it would be waits longer by the work; what comes meanwhile stretches that time (a busy period).
    """
    least = math.inf
    for wait_s in pool[Column.WAIT_S]:
        least = min(least, wait_s)
    return min(1.0, busy) + requests_per_s * (least / max(_MIN_SLACK, 1.0 - busy))


@compiled
def decode_cost(
    pool: FloatRows, num_tokens: float, max_new_tokens: float, mean_output: float, needed: Floats, after: Floats
) -> tuple[Floats, Floats, Floats]:
    """For a request whose prefill ends `after` so many seconds and that needs so many blocks: what a step takes then
    with the newcomer; the time of its own tokens and what it adds to those of others; the wait for memory, its own and
    that of others.

    Answers end at a constant rate, one in `mean_output` tokens. By then some of the running sequences have ended, the
    rest have grown, and those that other prefills are bound here with have come.
    """
    base_s, newcomer_s, kv_token_s = pool[Column.BASE_S], pool[Column.NEWCOMER_S], pool[Column.KV_TOKEN_S]
    num_running, num_coming, seq_tokens = pool[Column.NUM_RUNNING], pool[Column.NUM_COMING], pool[Column.SEQ_TOKENS]
    block_size, block_part, num_kv_tokens = pool[Column.BLOCK_SIZE], pool[Column.BLOCK_PART], pool[Column.NUM_TOKENS]
    pressure, free_part = pool[Column.PRESSURE], pool[Column.FREE_PART]
    step_s = pool[Column.STEP_S]
    output = min(max_new_tokens, mean_output)
    step, answers, waits = np.empty_like(after), np.empty_like(after), np.empty_like(after)
    for i in range(len(after)):
        num_steps = after[i] / step_s[i]
        num_seqs = num_running[i] * math.exp(num_steps * (-1.0 / mean_output)) + num_coming[i]
        tokens = num_seqs * (seq_tokens[i] + min(num_steps, mean_output))
        growth = newcomer_s[i] + kv_token_s[i] * (num_tokens + 0.5 * output)
        step[i] = base_s[i] + newcomer_s[i] * num_seqs + kv_token_s[i] * tokens + growth
        own = output * step[i]
        answers[i] = own + num_seqs * growth * mean_output
        # The fuller the memory, the more of those who come wait for it, while this request holds its part.
        part = needed[i] * block_part[i]
        wait = part * own * pressure[i] / max(MIN_FREE, free_part[i] - part)
        # Memory that is missing comes back as answers end.
        missing = needed[i] * block_size[i] + tokens - num_kv_tokens[i]
        freed = max(1.0, seq_tokens[i]) * max(1.0, num_seqs) / (mean_output * step[i])
        waits[i] = wait + max(0.0, min(missing, num_kv_tokens[i])) / freed
    return step, answers, waits


@compiled
def cheapest(costs: Floats, turn: int) -> int:
    """Position of the least cost; among equals, the next one after `turn`."""
    least = math.inf
    for cost in costs:
        least = min(least, cost)
    num_ties = 0
    for cost in costs:
        num_ties += cost == least
    left = turn % num_ties
    for position in range(len(costs)):
        if costs[position] == least:
            if left == 0:
                return position
            left -= 1
    return -1


@inlined
def _waits(pool: FloatRows, slots: Ints, part_ahead: Floats) -> Floats:
    """Until a prompt like this one would begin. A step that is under way ends first: half of one."""
    wait_s: Floats = pool[Column.WAIT_S]
    if len(part_ahead) == 0:
        return wait_s
    waits: Floats = np.empty_like(wait_s)
    base_s, token_s, batch_tokens = pool[Column.BASE_S], pool[Column.PREFILL_TOKEN_S], pool[Column.BATCH_TOKENS]
    for i in range(len(waits)):
        step_s = base_s[i] + token_s[i] * batch_tokens[i]
        waits[i] = max(part_ahead[slots[i]] * wait_s[i], min(0.5 * step_s, wait_s[i]))
    return waits


@inlined
def _with_room(pool: FloatRows, max_lens: Ints, needed: Floats, failed: Bools, num_tokens: float) -> tuple[Bools, int]:
    """Who has room, and how many; not those that just failed, unless there is no other."""
    room, able = pool[Column.ROOM], np.empty(len(needed), np.bool_)
    num_able = num_failed = 0
    for i in range(len(needed)):
        able[i] = (needed[i] <= room[i]) & (max_lens[i] > num_tokens)
        num_able += able[i]
        num_failed += able[i] and len(failed) > 0 and failed[i]
    if 0 < num_failed < num_able:
        num_able -= num_failed
        for i in range(len(needed)):
            able[i] = able[i] and not failed[i]
    return able, num_able


@inlined
def _answer_price(step_s: float, question: Question) -> float:
    """Of a second of an answer where a step takes so long: from nothing up to twice `answer_price` at the limit, as of
    a loss that grows with the square of the step, and at the limit is what it is at a constant price."""
    most = 2.0 * question.answer_price
    return min(most, most / question.price_tpot_s * step_s)


@inlined
def _handoffs(
    pool: FloatRows,
    workers: _Workers,
    num_fingerprints: int,
    hits: Floats,
    part_ahead: Floats,
    failed: Bools,
    turn: int,
    question: Question,
) -> tuple[Ints, FloatRows]:
    """By fingerprint: the position of the prefill worker where the prompt costs least; of that one, until the first
    token and of delay to other prompts, when the first token is there, until the prompt begins, to set up a transfer
    (infinite where nobody is in time), and the work."""
    partners, handoffs = np.empty(num_fingerprints, np.int64), np.zeros((num_fingerprints, 5))
    for fingerprint in range(num_fingerprints):
        partners[fingerprint] = NO_PARTNER
        handoffs[fingerprint, _DELAYED] = handoffs[fingerprint, _FIRST] = math.inf
    slots, fingerprints, max_lens = workers
    price = work_price(pool, question.prefill_rate, question.prefill_busy)
    waits = _waits(pool, slots, part_ahead)
    work, first = prefill_cost(pool, question.num_tokens, _uncached(slots, hits, question), waits)
    seconds, mine = np.empty_like(first), np.empty_like(first)
    for i in range(len(seconds)):
        avoided = max_lens[i] <= question.num_tokens or (len(failed) > 0 and failed[i])
        seconds[i] = math.inf if avoided or first[i] > question.left_s else first[i] + work[i] * price
        if not avoided:
            partners[fingerprints[i]] = CHEAPER_HERE  # perhaps in time
    for fingerprint in range(num_fingerprints):
        if partners[fingerprint] == NO_PARTNER:
            continue
        for i in range(len(seconds)):
            mine[i] = seconds[i] if fingerprints[i] == fingerprint else math.inf
        best = cheapest(mine, turn)
        if mine[best] < math.inf:
            partners[fingerprint] = best
            handoffs[fingerprint, _DELAYED] = mine[best]
            handoffs[fingerprint, _FIRST] = first[best]
            handoffs[fingerprint, _WAIT] = waits[best]
            handoffs[fingerprint, _SETUP] = HANDOFF_TOKENS * pool[Column.PREFILL_TOKEN_S, best]
            handoffs[fingerprint, _WORK] = work[best]
    return partners, handoffs


@inlined
def _uncached(slots: Ints, hits: Floats, question: Question) -> Floats:
    """Tokens to compute; the last one always is, for its logits."""
    uncached = np.empty(len(slots))
    for i in range(len(slots)):
        uncached[i] = max(1.0, question.num_tokens - hits[slots[i]])
    return uncached


@compiled
def best_route(
    prefill: FloatRows,
    prefillers: _Workers,
    failed_prefillers: Bools,
    decode: FloatRows,
    decoders: _Workers,
    failed_decoders: Bools,
    num_fingerprints: int,
    hits: Floats,
    part_ahead: Floats,
    turn: int,
    question: _Question,
) -> tuple[int, int, float, float, float]:
    """Positions of a decode worker and of a prefill worker, or what else there is to say; seconds until the first token
    and of work to compute the prompt; the cost.

    Of each pool its columns, its workers, and who is avoided (empty: nobody). `hits`: cached tokens by slot.
    `part_ahead`: of each queue, by slot, what goes before the request; empty: all.
    """
    slots, fingerprints, max_lens = decoders
    num_workers, block_size = len(slots), decode[Column.BLOCK_SIZE]
    needed = np.empty(num_workers)  # blocks to have free before it gets this request; hits are of whole blocks
    for i in range(num_workers):
        needed[i] = np.ceil((question.num_reserved_tokens - hits[slots[i]]) / block_size[i])
    able, num_able = _with_room(decode, max_lens, needed, failed_decoders, question.num_tokens)
    if num_workers == 0 or (num_able == 0 and question.left_s == math.inf):
        return NO_ROOM, NO_PARTNER, 0.0, 0.0, 0.0
    partners, handoffs = _handoffs(
        prefill, prefillers, num_fingerprints, hits, part_ahead, failed_prefillers, turn, question
    )

    # On each decode worker, until the first token and of delay to other prompts; what of it goes by before it decodes.
    seconds, after, here = np.empty(num_workers), np.empty(num_workers), np.empty(num_workers, np.bool_)
    uncached = _uncached(slots, hits, question)
    price = work_price(decode, question.decode_rate, question.decode_busy)
    work, first_here = prefill_cost(decode, question.num_tokens, uncached, _waits(decode, slots, part_ahead))
    token_s, pull_wait_s, step_s = decode[Column.TRANSFER_TOKEN_S], decode[Column.PULL_WAIT_S], decode[Column.STEP_S]
    num_seqs, stall_price = decode[Column.NUM_SEQS], decode[Column.STALL_PRICE]
    for i in range(num_workers):
        kind = fingerprints[i]
        first, setup = handoffs[kind, _FIRST], handoffs[kind, _SETUP]
        transfer = uncached[i] * token_s[i]
        exposed = max(0.0, max(pull_wait_s[i], handoffs[kind, _WAIT]) + transfer - first)
        handed_over = handoffs[kind, _DELAYED] + setup + exposed + LINK_PRICE * transfer
        # Every sequence that decodes here by then stands still meanwhile, and keeps its memory.
        stalled = _answer_price(step_s[i], question) * num_seqs[i] + stall_price[i]
        seconds_here = first_here[i] + work[i] * price + work[i] * stalled
        # Else one decode worker would get all long prompts once prefill workers are full, and they would wait there.
        soon = (first_here[i] <= first + setup + exposed) & (first_here[i] <= question.left_s)
        allowed = (partners[kind] == NO_PARTNER) | (uncached[i] <= question.max_local_tokens)
        here[i] = (seconds_here <= handed_over) & soon & allowed
        seconds[i], after[i] = (seconds_here, 0.0) if here[i] else (handed_over, first)

    step, answers, waits = decode_cost(
        decode, question.num_tokens, question.max_new_tokens, question.mean_output, needed, after
    )
    num_in_time, costs = 0, np.empty(num_workers)
    for i in range(num_workers):
        in_time = (seconds[i] < math.inf) & (step[i] <= question.tpot_s)
        num_in_time += in_time
        cost = seconds[i] + _answer_price(step[i], question) * answers[i] + waits[i]
        costs[i] = cost if in_time & able[i] else math.inf
    best = cheapest(costs, turn)
    if costs[best] == math.inf:
        outcome = NOBODY_IN_TIME if num_in_time == 0 else NO_ROOM if num_able == 0 else ONLY_FULL_ONES_IN_TIME
        return outcome, NO_PARTNER, 0.0, 0.0, 0.0
    kind = fingerprints[best]
    if here[best]:
        return best, min(partners[kind], CHEAPER_HERE), first_here[best], work[best], costs[best]
    return best, partners[kind], handoffs[kind, _FIRST], handoffs[kind, _WORK], costs[best]
