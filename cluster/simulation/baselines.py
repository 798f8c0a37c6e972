"""Routing rules of other systems, for comparison in the simulator. They implement router.policies.RoutingPolicy.

Each gets what Baton's own policy gets: the exact index, every worker's report, what was sent since, and Baton's
decode-first admission (a request waits in the router while no decode worker has room). The rule alone differs. Where a
cluster has no prefill workers, the rule for prefill chooses among the decode workers.
"""

from dataclasses import dataclass

import numpy as np

from router.compiled import Floats
from router.costs import Column, cheapest, prefill_cost
from router.policies import RequestFacts, RoutingDecision, decision, partners, with_room
from router.worker_table import Pool, WorkerTable


def prefillers(table: WorkerTable) -> Pool:
    """The workers that prefill."""
    return table.prefill if len(table.prefill) else table.decode


def _place(
    facts: RequestFacts, hits: Floats, table: WorkerTable, prefill_costs: Floats, decode_costs: Floats, reason: str
) -> RoutingDecision | None:
    """The least of each; ties are spread. `prefill_costs` by position in `prefillers(table)`."""
    pool, decode_pool = prefillers(table), table.decode
    able = with_room(facts, hits, decode_pool)
    if not able.any():
        return None
    if pool is decode_pool:
        decode = cheapest(np.where(able, prefill_costs + decode_costs, np.inf), table.turn)
        return decision(None, decode, hits, table, reason)
    decode = cheapest(np.where(able, decode_costs, np.inf), table.turn)
    there = partners(facts, decode, table)
    prefill = cheapest(np.where(there, prefill_costs, np.inf), table.turn) if there.any() else None
    return decision(prefill, decode, hits, table, reason)


@dataclass(frozen=True, slots=True)
class PrefixOnly:
    """The longest cached prefix, whatever the load. Decode: the fewest sequences."""

    uses_hits: bool = True

    def choose(self, facts: RequestFacts, hits: Floats, table: WorkerTable) -> RoutingDecision | None:
        pool = prefillers(table)
        # Where one pool does both, a sequence more must not outweigh a cached token.
        fewest = table.decode[Column.NUM_SEQS] / (1.0 + table.decode[Column.NUM_SEQS].max())
        return _place(facts, hits, table, -hits[pool.rows], fewest, "longest prefix")


@dataclass(frozen=True, slots=True)
class CacheAware:
    """SGLang's cache_aware rule, with the defaults of its gateway 0.3.1 (its tie-break as it is since December 2025):
    the longest match where it covers more than `cache_threshold` of the prompt, else the worker with the fewest
    requests; that one too while requests are unbalanced. Decode: the fewest sequences.

    Its router guesses what workers hold from what it has sent; here it knows.
    """

    cache_threshold: float = 0.3
    balance_abs_threshold: int = 64
    balance_rel_threshold: float = 1.5
    uses_hits: bool = True

    def choose(self, facts: RequestFacts, hits: Floats, table: WorkerTable) -> RoutingDecision | None:
        pool = prefillers(table)
        # With one pool, its choice is made once, by the rule.
        decode_costs = table.decode[Column.NUM_SEQS] if pool is table.prefill else np.zeros(len(pool))
        return _place(facts, hits, table, self._costs(facts, hits, pool), decode_costs, "cache aware")

    def _costs(self, facts: RequestFacts, hits: Floats, pool: Pool) -> Floats:
        most, least = float(pool[Column.NUM_SEQS].max()), float(pool[Column.NUM_SEQS].min())
        if most - least > self.balance_abs_threshold and most > self.balance_rel_threshold * least:
            return pool[Column.NUM_SEQS]
        matched = hits[pool.rows]
        return -matched if matched.max() > self.cache_threshold * facts.num_tokens else pool[Column.NUM_SEQS]


@dataclass(frozen=True, slots=True)
class BlockCost:
    """Dynamo's documented cost at temperature 0: prefill_load_scale x blocks to prefill, those on their way and those
    of the request that are not cached, + blocks that are decoded from.

    With separate pools its prefill router leaves decode blocks out, and its decode router prefill and overlap. Tokens
    on their way are told from the seconds that the worker reports for them.
    """

    prefill_load_scale: float = 1.0
    uses_hits: bool = True

    def choose(self, facts: RequestFacts, hits: Floats, table: WorkerTable) -> RoutingDecision | None:
        pool, decode = prefillers(table), table.decode
        on_their_way = pool[Column.WAIT_S] / np.maximum(
            pool[Column.PREFILL_TOKEN_S] + pool[Column.BASE_S] / pool[Column.BATCH_TOKENS], 1e-9
        )
        uncached = np.maximum(1.0, facts.num_tokens - hits[pool.rows])
        prefill_blocks = self.prefill_load_scale * (on_their_way + uncached) / pool[Column.BLOCK_SIZE]
        return _place(
            facts, hits, table, prefill_blocks, decode[Column.NUM_BLOCKS] - decode[Column.NUM_FREE_BLOCKS], "blocks"
        )


@dataclass(frozen=True, slots=True)
class MinimumTtft:
    """Mooncake's Conductor (FAST'25, algorithm 1): the least predicted time to the first token. Decode: the least
    predicted time between tokens.

    Baton's workers do not fetch a prefix from each other before they prefill: that part of the algorithm is not here.
    """

    uses_hits: bool = True

    def choose(self, facts: RequestFacts, hits: Floats, table: WorkerTable) -> RoutingDecision | None:
        pool, decode = prefillers(table), table.decode
        uncached = np.maximum(1.0, facts.num_tokens - hits[pool.rows])
        _, ttft = prefill_cost(pool.columns, float(facts.num_tokens), uncached, pool[Column.WAIT_S])
        kv_tokens = (decode[Column.NUM_BLOCKS] - decode[Column.NUM_FREE_BLOCKS]) * decode[
            Column.BLOCK_SIZE
        ] + facts.num_tokens
        tpot = (
            decode[Column.BASE_S]
            + decode[Column.DECODE_S] * (decode[Column.NUM_SEQS] + 1)
            + decode[Column.KV_TOKEN_S] * kv_tokens
        )
        return _place(facts, hits, table, ttft, tpot, "minimum TTFT")
