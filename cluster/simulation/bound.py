"""What no routing rule can beat: an upper bound on the share of requests whose first token comes in time.

It relaxes everything but the work. All workers that may prefill are one machine that computes as many seconds of work
each second as there are workers, may interrupt any prompt, and knows the future. Its cache has no end and is shared: a
block of any earlier request is never computed again, whether or not that request was served. A prompt's work is what is
left, at the least cost per token and per (query, key) pair of any step of the profile. Decoding costs nothing. Only for
one thing the machine is taken for single workers: a prompt that takes one of them too long, alone and in steps as large
as it computes, is not served in time (other steps may be shorter by 0.3 %, where a profile says so).
Requests it cannot serve in time are dropped, as few as possible: with the same patience for all, that number is exact
for this machine (Kise, Ibaraki, Mine 1978: one machine, release times and due dates in the same order).

So it bounds the goodput of every policy on these workers, and says nothing of time per token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.simulation.engine import StepSeconds
from cluster.simulation.simulation import PoolSetup, Setup
from cluster.simulation.trace import TRACE_BLOCK, WINDOW_S, Trace, arrivals
from engine.step_model import StepWork, num_pairs
from router.cluster_view import DECODE, PREFILL

_SIZES = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_KEYS = 1 << 24  # (query, key) pairs that show what one costs


@dataclass(frozen=True, slots=True)
class PrefillCost:
    token_s: float
    pair_s: float


def least_prefill_cost(seconds: StepSeconds, max_batch_tokens: int) -> PrefillCost:
    """Of a token and of a pair, in the step where it is least."""
    sizes = sorted({*(size for size in _SIZES if size < max_batch_tokens), max_batch_tokens})
    bare = [seconds(StepWork(size, 0)) for size in sizes]
    read = [(seconds(StepWork(size, _KEYS)) - own) / _KEYS for size, own in zip(sizes, bare, strict=True)]
    return PrefillCost(min(own / size for size, own in zip(sizes, bare, strict=True)), max(0.0, min(read)))


def prefill_work(uncached: Sequence[tuple[int, int]], cost: PrefillCost) -> list[float]:
    """Seconds of each prompt, of which (tokens, after past ones) are to compute."""
    return [cost.token_s * num_tokens + cost.pair_s * num_pairs(num_tokens, past) for num_tokens, past in uncached]


def alone_seconds(num_tokens: int, past: int, pool: PoolSetup) -> float:
    """Of a prompt that has a worker for itself."""
    end, seconds = past + num_tokens, 0.0
    while past < end:
        size = min(pool.scheduler.max_batch_tokens, end - past)
        seconds += pool.seconds(StepWork(size, num_pairs(size, past)))
        past += size
    return seconds


def uncached_parts(trace: Trace) -> list[tuple[int, int]]:
    """Tokens of each prompt to compute, and those before them, where everything that came before it is cached."""
    seen: set[int] = set()
    parts: list[tuple[int, int]] = []
    for request in trace.requests:
        num_tokens = request.num_prompt_tokens
        num_full = num_tokens // TRACE_BLOCK
        shared = 0
        for content in request.contents[:num_full]:
            if content not in seen:
                break
            shared += 1
        # Less than a block of the trace beyond the last full one may be cached, too.
        whole = shared == num_full < len(request.contents) and request.contents[num_full] in seen
        seen.update(request.contents)
        past = num_tokens - 1 if whole else min(shared * TRACE_BLOCK, num_tokens - 1)
        parts.append((num_tokens - past, past))
    return parts


def most_in_time(arrived: Sequence[float], works: Sequence[float], num_workers: int, patience_s: float) -> int:
    """How many of the requests, in order of arrival, one machine `num_workers` times as fast can end within
    `patience_s` of their arrival. One that takes longer than that is dropped first."""
    starts: list[float] = []  # of those kept since the machine was idle last, in order
    kept: list[tuple[float, float]] = []  # their arrival and length
    free_at, num_kept = 0.0, 0
    for time, work in zip(arrived, works, strict=True):
        if work > patience_s:
            continue
        if time >= free_at:
            starts, kept, free_at = [], [], time
        starts.append(free_at)
        kept.append((time, work / num_workers))
        free_at += work / num_workers
        num_kept += 1
        if free_at > time + patience_s:
            free_at = _drop(starts, kept)
            num_kept -= 1
    return num_kept


def _drop(starts: list[float], kept: list[tuple[float, float]]) -> float:
    """Leave out the one without which the rest ends first; returns when it does."""
    slack = np.array(starts) - np.array([time for time, _ in kept])  # by how much each could begin earlier
    after = np.append(np.minimum.accumulate(slack[::-1])[::-1][1:], np.inf)
    gain = np.minimum([length for _, length in kept], after)
    place = int(gain.argmax())
    end = starts[place]
    del starts[place], kept[place]
    for later in range(place, len(kept)):
        starts[later] = max(end, kept[later][0])
        end = starts[later] + kept[later][1]
    return end


def _least_cost(pools: Sequence[PoolSetup]) -> PrefillCost:
    costs = [least_prefill_cost(pool.seconds, pool.scheduler.max_batch_tokens) for pool in pools]
    return PrefillCost(min(each.token_s for each in costs), min(each.pair_s for each in costs))


def busy_rate(setup: Setup, trace: Trace) -> float:
    """How many times the trace's rate keep that one machine busy, without an end."""
    work = sum(prefill_work(uncached_parts(trace), _least_cost(setup.pools)))
    return (trace.seconds + WINDOW_S) * sum(pool.num_workers for pool in setup.pools) / work


def goodput_bound(
    setup: Setup, trace: Trace, seed: int, rate_scale: float, ttft_s: float, roles: Sequence[str] = (PREFILL, DECODE)
) -> float:
    """Share of the requests. `roles`: whose workers may prefill. Decode workers may, where a policy lets them."""
    pools = [pool for pool in setup.pools if pool.role in roles]
    parts = uncached_parts(trace)
    works = [
        work
        if request.num_tokens <= setup.max_len and any(alone_seconds(*part, pool) <= ttft_s for pool in pools)
        else math.inf
        for request, part, work in zip(trace.requests, parts, prefill_work(parts, _least_cost(pools)), strict=True)
    ]
    num_workers = sum(pool.num_workers for pool in pools)
    return most_in_time(arrivals(trace, seed, rate_scale), works, num_workers, ttft_s) / max(1, len(works))
