"""What a request would cost on each worker, in seconds: arrays by position in a pool, from columns and the request.

Tokens become seconds by each worker's own model of its steps.
"""

import msgspec
import numpy as np

from router.worker_table import MIN_FREE, Bools, Floats, Pool

# How far a queue is taken to be from never emptying, at least; else one second of work would seem to delay all others.
_MIN_SLACK = 0.1


class PrefillLoad(msgspec.Struct, frozen=True, gc=False):
    """Of one worker that prefills: requests that come each second, and the part of its time that they take."""

    requests_per_s: float
    busy: float


class PrefillCost(msgspec.Struct, frozen=True, gc=False):
    """`work` to compute what is not cached, and when its `first` token is there; `others`: by how much that delays
    requests which come later."""

    work: Floats
    first: Floats
    others: Floats


class DecodeCost(msgspec.Struct, frozen=True, gc=False):
    """`step` is what a step takes with the newcomer once prefill has ended; `answers` counts its own tokens and what it
    adds to those of others; `waits` the wait for memory, its own and that of others."""

    step: Floats
    answers: Floats
    waits: Floats


def prefill_cost(
    num_tokens: int, uncached: Floats, pool: Pool, load: PrefillLoad, wait_s: Floats | None = None
) -> PrefillCost:
    """`wait_s`: until the prompt would begin; the whole queue if not given.

    A second of work has one price for the whole pool, and it rises as the pool fills up. It takes the place of
    other work in the part of the time that workers are busy. Where even the shortest queue is not empty, each request
    that comes before it would be waits longer by the work; what comes meanwhile stretches that time (a busy period).
    """
    pairs_each = (num_tokens + 0.5) - 0.5 * uncached
    num_steps = np.ceil(uncached / pool.batch_tokens)
    work: Floats = num_steps * pool.base_s + uncached * (pool.prefill_token_s + pool.pair_s * pairs_each)
    # The step under way when it comes is half over.
    first: Floats = (pool.wait_s if wait_s is None else wait_s) + work + (num_steps + 0.5) * pool.beside_s
    busy_period = float(pool.wait_s[pool.wait_s.argmin()]) / max(_MIN_SLACK, 1.0 - load.busy)
    price = min(1.0, load.busy) + load.requests_per_s * busy_period
    return PrefillCost(work, first, work * price)


def decode_cost(
    num_tokens: int, max_new_tokens: int, needed: Floats, pool: Pool, after: Floats | float, mean_output: float
) -> DecodeCost:
    """For a request whose prefill ends `after` so many seconds and that needs so many blocks.

    Answers end at a constant rate, one in `mean_output` tokens. By then some of the running sequences have ended, the
    rest have grown, and those that other prefills are bound here with have come.
    """
    output = min(float(max_new_tokens), mean_output)
    steps = after / pool.step_s
    num_seqs = pool.num_running * np.exp(steps * (-1.0 / mean_output)) + pool.num_coming
    tokens = num_seqs * (pool.seq_tokens + np.minimum(steps, mean_output))
    growth = pool.newcomer_s + pool.kv_token_s * (num_tokens + 0.5 * output)
    step: Floats = pool.base_s + pool.newcomer_s * num_seqs + pool.kv_token_s * tokens + growth
    own = output * step
    answers: Floats = own + num_seqs * growth * mean_output
    # The fuller the memory, the more of those who come wait for it, while this request holds its part.
    part = needed * pool.block_part
    waits: Floats = part * own * pool.pressure / np.maximum(MIN_FREE, pool.free_part - part)
    missing = needed * pool.block_size + tokens - pool.num_tokens
    short: Bools = missing > 0.0
    if np.count_nonzero(short):  # memory comes back as answers end
        freed = np.maximum(1.0, pool.seq_tokens) * np.maximum(1.0, num_seqs) / (mean_output * step)
        waits = waits + np.where(short, np.minimum(missing, pool.num_tokens) / freed, 0.0)
    return DecodeCost(step, answers, waits)


def cheapest(costs: Floats, turn: int) -> int:
    """Position of the least cost; among equals, the next one after `turn`."""
    ties = (costs == costs[costs.argmin()]).nonzero()[0]
    return int(ties[turn % len(ties)])
