"""What each rule chooses where it differs from others: a few prefill and two decode workers, a prompt of 10 blocks."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from cluster.simulation.baselines import BlockCost, CacheAware, MinimumTtft, PrefixOnly
from engine.kv.events import KvEvent
from engine.wire import model_to_pb
from protos import worker_pb2 as pb
from router.placement import Placed, Placement, PlacementConfig
from router.policies import RequestFacts, RoutingPolicy
from tests.cluster.simulation.small import MODEL

SIZE = 16
HASHES = list(range(100, 110))


@dataclass(eq=False)
class Prompt:
    reusable: bool = True

    def facts(self) -> RequestFacts:
        return RequestFacts(num_tokens=10 * SIZE, max_new_tokens=16)

    def hashes(self, block_size: int) -> list[int]:
        assert block_size == SIZE
        return HASHES


@dataclass(frozen=True)
class Worker:
    worker_id: str
    cached: int = 0  # blocks of the prompt
    num_running: int = 0
    queue_ms: int = 0
    num_free_blocks: int = 1000

    @property
    def role(self) -> str:
        return self.worker_id.split("-", maxsplit=1)[0]


def chosen(policy: RoutingPolicy, *workers: Worker) -> tuple[str | None, str]:
    placement: Placement[Prompt] = Placement(policy, PlacementConfig(), lambda: 0.0)
    for worker in workers:
        described = pb.Description(
            worker_id=worker.worker_id,
            role=worker.role,
            block_size=SIZE,
            num_blocks=1000,
            max_model_len=100_000,
            max_batch_tokens=8192,
            max_num_seqs=256,
        )
        state = placement.attach(worker.worker_id, described, ())
        state.report(
            pb.Load(
                num_running=worker.num_running,
                num_free_blocks=worker.num_free_blocks,
                queue_us=1000 * worker.queue_ms,
                model=model_to_pb(MODEL),
            )
        )
        placement.apply(worker.worker_id, KvEvent(stored=tuple(HASHES[: worker.cached])))
    placement.add(Prompt())
    (placed,) = placement.pump()
    assert isinstance(placed, Placed)
    assert placed.decision.hit_tokens == next(
        each.cached * SIZE for each in workers if each.worker_id == (placed.decision.prefill or placed.decision.decode)
    )
    return placed.decision.prefill, placed.decision.decode


DECODERS = (Worker("decode-0", num_running=9, num_free_blocks=900), Worker("decode-1", num_free_blocks=800))


def test_prefix_only_takes_the_longest_prefix_whatever_the_queue() -> None:
    busy = Worker("prefill-1", cached=4, num_running=200, queue_ms=60_000)
    others = (Worker("prefill-0", cached=3), busy, Worker("prefill-2"))
    assert chosen(PrefixOnly(), *others, *DECODERS) == ("prefill-1", "decode-1")


@pytest.mark.parametrize(
    ("cached", "num_running", "expected"),
    [
        (4, 60, "prefill-1"),  # above the threshold of 0.3
        (4, 65, "prefill-0"),  # but out of balance: more than 64 requests above the least, and 1.5 times as many
        (3, 60, "prefill-0"),  # not above it: the fewest requests
    ],
)
def test_cache_aware_follows_its_thresholds(cached: int, num_running: int, expected: str) -> None:
    workers = (Worker("prefill-0"), Worker("prefill-1", cached, num_running), Worker("prefill-2", num_running=1))
    assert chosen(CacheAware(), *workers, *DECODERS)[0] == expected


def test_cache_aware_sends_what_matches_nowhere_to_the_fewest_requests() -> None:
    workers = (
        Worker("prefill-0", num_running=3),
        Worker("prefill-1", num_running=2),
        Worker("prefill-2", num_running=4),
    )
    assert chosen(CacheAware(), *workers, *DECODERS)[0] == "prefill-1"


def test_block_cost_counts_tokens_on_their_way_and_decodes_where_the_fewest_blocks_are_in_use() -> None:
    """A queue of 10 ms stands for 100 tokens. 160 - 64 + 100 tokens against 160 - 0."""
    workers = (Worker("prefill-0"), Worker("prefill-1", cached=4, queue_ms=10))
    assert chosen(BlockCost(), *workers, *DECODERS) == ("prefill-0", "decode-0")
    workers = (Worker("prefill-0"), Worker("prefill-1", cached=4, queue_ms=6))
    assert chosen(BlockCost(), *workers, *DECODERS) == ("prefill-1", "decode-0")


def test_minimum_ttft_weighs_the_queue_against_what_is_cached() -> None:
    """64 cached tokens spare 6.4 ms."""
    assert chosen(MinimumTtft(), Worker("prefill-0"), Worker("prefill-1", 4, queue_ms=6), *DECODERS)[0] == "prefill-1"
    assert chosen(MinimumTtft(), Worker("prefill-0"), Worker("prefill-1", 4, queue_ms=7), *DECODERS)[0] == "prefill-0"


@pytest.mark.parametrize("policy", [PrefixOnly, CacheAware, BlockCost, MinimumTtft])
def test_without_prefill_workers_the_rule_chooses_among_decode_workers(policy: Callable[[], RoutingPolicy]) -> None:
    assert chosen(policy(), Worker("decode-0"), Worker("decode-1", cached=8)) == (None, "decode-1")
