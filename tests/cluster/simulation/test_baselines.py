"""What each rule chooses where it differs from others: a few prefill and two decode workers, a prompt of 10 blocks."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from cluster.simulation.baselines import BlockCost, CacheAware, MinimumTtft, PrefixOnly
from engine.kv.events import KvEvent
from engine.step_model import StepModel
from engine.wire import model_to_pb
from protos import worker_pb2 as pb
from router.placement import Placed, Placement, PlacementConfig
from router.policies import RequestFacts, RoutingPolicy
from tests.cluster.simulation.small import MODEL
from tests.router.dispatch.workers import BLOCK, Prompt, described

HASHES = list(range(100, 110))


@dataclass(frozen=True)
class Worker:
    worker_id: str
    cached: int = 0  # blocks of the prompt
    num_running: int = 0
    queue_ms: float = 0.0
    num_free_blocks: int = 1000
    model: StepModel = MODEL


def chosen(policy: RoutingPolicy, *workers: Worker) -> tuple[str | None, str]:
    placement: Placement[Prompt] = Placement(policy, PlacementConfig(), lambda: 0.0)
    for worker in workers:
        state = placement.attach(worker.worker_id, described(worker.worker_id, max_num_seqs=256), ())
        state.report(
            pb.Load(
                num_running=worker.num_running,
                num_free_blocks=worker.num_free_blocks,
                queue_us=round(1000 * worker.queue_ms),
                model=model_to_pb(worker.model),
            )
        )
        placement.apply(worker.worker_id, KvEvent(stored=tuple(HASHES[: worker.cached])))
    placement.add(Prompt(RequestFacts(10 * BLOCK, 16), HASHES))
    (placed,) = placement.pump()
    assert isinstance(placed, Placed)
    assert placed.decision.hit_tokens == next(
        each.cached * BLOCK for each in workers if each.worker_id == (placed.decision.prefill or placed.decision.decode)
    )
    return placed.decision.prefill, placed.decision.decode


DECODERS = (Worker("decode-0", num_running=9, num_free_blocks=900), Worker("decode-1", num_free_blocks=800))


def test_prefix_only_takes_the_longest_prefix_whatever_the_queue() -> None:
    busy = Worker("prefill-1", cached=4, num_running=200, queue_ms=60_000)
    others = (Worker("prefill-0", cached=3), busy, Worker("prefill-2"))
    assert chosen(PrefixOnly(), *others, *DECODERS) == ("prefill-1", "decode-1")


@pytest.mark.parametrize(
    ("cached", "least", "most", "expected"),
    [
        (4, 0, 64, "prefill-1"),  # above the threshold of 0.3
        (4, 0, 65, "prefill-0"),  # but out of balance: more than 64 requests above the least
        (4, 140, 210, "prefill-1"),  # not if that is no more than 1.5 times as many
        (4, 140, 211, "prefill-0"),
        (3, 0, 64, "prefill-0"),  # not above it: the fewest requests
    ],
)
def test_cache_aware_follows_its_thresholds(cached: int, least: int, most: int, expected: str) -> None:
    others = Worker("prefill-0", num_running=least), Worker("prefill-2", num_running=least + 1)
    workers = (others[0], Worker("prefill-1", cached, most), others[1])
    assert chosen(CacheAware(), *workers, *DECODERS)[0] == expected


def test_cache_aware_sends_what_matches_nowhere_to_the_fewest_requests() -> None:
    workers = (
        Worker("prefill-0", num_running=3),
        Worker("prefill-1", num_running=2),
        Worker("prefill-2", num_running=4),
    )
    assert chosen(CacheAware(), *workers, *DECODERS)[0] == "prefill-1"


@pytest.mark.parametrize(("queue_ms", "expected"), [(6.47, "prefill-1"), (6.49, "prefill-0")])
def test_block_cost_counts_tokens_on_their_way_and_decodes_where_the_fewest_blocks_are_in_use(
    queue_ms: float, expected: str
) -> None:
    """64 cached tokens against as many in the queue: 6.4 ms, and their part of the 10 ms of a step of 8,192 tokens."""
    workers = (Worker("prefill-0"), Worker("prefill-1", cached=4, queue_ms=queue_ms))
    assert chosen(BlockCost(), *workers, *DECODERS) == (expected, "decode-0")


@pytest.mark.parametrize(
    ("scale", "num_more", "expected"),
    [(1.0, 7, "decode-1"), (1.0, 9, "decode-0"), (2.0, 15, "decode-1"), (2.0, 17, "decode-0")],
)
def test_block_cost_of_one_pool_weighs_blocks_to_prefill_against_those_in_use(
    scale: float, num_more: int, expected: str
) -> None:
    """8 of 10 blocks are cached where more are in use."""
    workers = (Worker("decode-0"), Worker("decode-1", cached=8, num_free_blocks=1000 - num_more))
    assert chosen(BlockCost(prefill_load_scale=scale), *workers) == (None, expected)


def test_minimum_ttft_weighs_the_queue_against_what_is_cached() -> None:
    """64 cached tokens spare 6.4 ms."""
    assert chosen(MinimumTtft(), Worker("prefill-0"), Worker("prefill-1", 4, queue_ms=6), *DECODERS)[0] == "prefill-1"
    assert chosen(MinimumTtft(), Worker("prefill-0"), Worker("prefill-1", 4, queue_ms=7), *DECODERS)[0] == "prefill-0"


@pytest.mark.parametrize(
    ("base_s", "kv_token_s", "expected"),
    [
        (0.0128, 0.0, "decode-1"),
        (0.0132, 0.0, "decode-0"),
        (0.0110, 1e-5, "decode-1"),
        (0.0112, 1e-5, "decode-0"),
    ],
)
def test_minimum_ttft_decodes_where_a_step_takes_the_least_with_the_request(
    base_s: float, kv_token_s: float, expected: str
) -> None:
    """14 ms with it as the fourth; there 1 ms for ten, and where KV has to be read, 1.92 ms for 32 tokens and 160."""
    model = StepModel(base_s, 1e-4, 0.0, decode_s=1e-4, kv_token_s=kv_token_s)
    here, there = Worker("decode-0", num_running=3), Worker("decode-1", num_running=9, num_free_blocks=998, model=model)
    assert chosen(MinimumTtft(), Worker("prefill-0"), here, there) == ("prefill-0", expected)


@pytest.mark.parametrize("policy", [PrefixOnly, CacheAware, BlockCost, MinimumTtft])
def test_without_prefill_workers_the_rule_chooses_among_decode_workers(policy: Callable[[], RoutingPolicy]) -> None:
    assert chosen(policy(), Worker("decode-0"), Worker("decode-1", cached=8)) == (None, "decode-1")
