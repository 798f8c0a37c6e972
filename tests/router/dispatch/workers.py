"""Workers that are a few numbers, as policies and the placement see them. Ids begin with their role: `p..` or `d..`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.step_model import StepModel
from engine.wire import model_to_pb
from protos import worker_pb2 as pb
from router.block_table import Hashes
from router.cluster_view import WorkerState
from router.placement import Placed, Placement, PlacementConfig, Refused
from router.policies import PrefixAware, RequestFacts, RoutingDecision, RoutingPolicy
from router.worker_table import WorkerTable
from tests.fakes import FakeClock

BLOCK = 16
TOKEN_S = 0.001
# A prompt of 1,000 tokens takes 10 ms and 1 s, a step 10 ms and 1 ms for each sequence.
MODEL = StepModel(base_s=0.01, prefill_token_s=TOKEN_S, pair_s=0.0, decode_s=TOKEN_S, kv_token_s=0.0)
FAST_MODEL = StepModel(base_s=0.004, prefill_token_s=1e-4, pair_s=0.0, decode_s=2e-4, kv_token_s=0.0)


def described(worker_id: str, **fields: Any) -> pb.Description:
    sizes = {"block_size": BLOCK, "num_blocks": 1000, "max_model_len": 100_000, "max_batch_tokens": 8192}
    role = "prefill" if worker_id[0] == "p" else "decode"
    defaults = {"worker_id": worker_id, "role": role, "fingerprint": "f", "max_num_seqs": 64}
    return pb.Description(**(defaults | sizes | fields))


def attached(worker_id: str, *, seqs_per_slot: float = 1.5, **fields: Any) -> WorkerState:
    """It has reported nothing. `fields` of its description."""
    return WorkerState(worker_id, described(worker_id, **fields), seqs_per_slot, set())


def worker(
    worker_id: str,
    *,
    num_seqs: int = 0,
    num_free_blocks: int = 1000,
    model: StepModel | None = MODEL,
    queue_s: float = 0.0,
    num_waiting_tokens: int = 0,
    transfer_token_s: float = 0.0,
    num_pull_tokens: int = 0,
    **fields: Any,
) -> WorkerState:
    """It has reported these numbers. `fields` of its description."""
    state = attached(worker_id, **fields)
    state.report(
        pb.Load(
            num_running=num_seqs,
            num_free_blocks=num_free_blocks,
            queue_us=round(queue_s * 1e6),
            num_waiting_tokens=num_waiting_tokens,
            transfer_token_s=transfer_token_s,
            num_pull_tokens=num_pull_tokens,
            model=None if model is None else model_to_pb(model),
        )
    )
    return state


def view(*workers: WorkerState) -> WorkerTable:
    table = WorkerTable()
    for slot, state in enumerate(workers):
        table.add(state, slot)
    table.refresh()
    return table


def choose(
    policy: RoutingPolicy, facts: RequestFacts, hits: dict[str, int], table: WorkerTable, turn: int = 0
) -> RoutingDecision | None:
    table.turn = turn
    by_slot = np.zeros(len(table.prefill) + len(table.decode), np.float64)
    for pool in (table.prefill, table.decode):
        for position in range(len(pool)):
            by_slot[pool.rows[position]] = hits.get(pool.worker_id(position), 0)
    return policy.choose(facts, by_slot, table)


def facts(num_tokens: int = 1000, **changes) -> RequestFacts:
    return RequestFacts(**{"num_tokens": num_tokens, "max_new_tokens": 100, **changes})


@dataclass(eq=False)
class Prompt:
    facts_: RequestFacts
    hashes_: Sequence[int] = ()
    reusable: bool = True

    def facts(self) -> RequestFacts:
        return self.facts_

    def hashes(self, _block_size: int) -> Hashes:
        return np.array(self.hashes_, np.uint64)


@dataclass
class Cluster:
    """`p..` prefill and `d..` decode workers that report what a test says."""

    ids: Sequence[str]
    config: PlacementConfig = field(default_factory=PlacementConfig)
    policy: PrefixAware = field(default_factory=lambda: PrefixAware(local_prefill_max_tokens=64))
    num_seqs: int = 256

    def __post_init__(self) -> None:
        self.clock = FakeClock(0.0)
        self.placement: Placement[Prompt] = Placement(self.policy, self.config, self.clock)
        self.states: dict[str, WorkerState] = {}
        self.handle = 0
        for worker_id in self.ids:
            self.attach(worker_id)
            self.report(worker_id)

    def attach(self, worker_id: str, hashes: Sequence[int] = ()) -> None:
        description = described(worker_id, num_blocks=10_000, max_num_seqs=self.num_seqs)
        self.states[worker_id] = self.placement.attach(worker_id, description, hashes)

    def report(self, worker_id: str, *, num_running: int = 0, queue_s: float = 0.0, draining: bool = False) -> None:
        self.states[worker_id].report(
            pb.Load(
                num_running=num_running,
                num_free_blocks=10_000 - 20 * num_running,
                queue_us=round(queue_s * 1e6),
                model=model_to_pb(FAST_MODEL),
                draining=draining,
            )
        )

    def add(self, num_tokens: int = 1600, hashes: Sequence[int] = (), **facts) -> Prompt:
        prompt = Prompt(RequestFacts(num_tokens, 200, arrived=self.clock.now, **facts), hashes)
        self.placement.add(prompt)
        return prompt

    def pump(self) -> list[Placed[Prompt] | Refused[Prompt]]:
        outcomes = []
        for outcome in self.placement.pump():
            outcomes.append(outcome)
            if isinstance(outcome, Placed):
                self.handle += 1
                if outcome.prefill is not None:
                    outcome.prefill.reserve(self.handle, outcome.on_prefill)
                outcome.decode.reserve(self.handle, outcome.on_decode)
        return outcomes

    def place(self, *args, **facts) -> Placed[Prompt]:
        prompt = self.add(*args, **facts)
        (placed,) = self.pump()
        assert isinstance(placed, Placed)
        assert placed.candidate is prompt
        return placed
