"""A request inside a simulated worker: what the scheduler and the KV cache ask of one, and no tokens."""

from collections.abc import Sequence
from typing import cast

from cluster.simulation.trace import Hints
from engine.kv.layout import BlockId
from engine.request import Request, RequestId, SamplingParams

_PARAMS = SamplingParams()


class SimulatedRequest(Request, frozen=True):
    """`hashes` are of the full blocks of prompt and answer; `num_total_tokens` is the length of both.

    `token_ids` has the length of the tokens that it stands for, and they are never looked at.
    """

    hashes: Sequence[int] = ()
    num_total_tokens: int = 0


def simulated_request(
    request_id: str,
    num_tokens: int,
    num_prompt_tokens: int,
    num_total_tokens: int,
    hashes: Sequence[int],
    hints: Hints,
) -> SimulatedRequest:
    """`num_tokens` are known; the answer ends at `num_total_tokens`."""
    return SimulatedRequest(
        RequestId(request_id),
        cast("tuple[int, ...]", range(num_tokens)),
        num_prompt_tokens,
        _PARAMS,
        seed=0,
        priority=hints.priority,
        tenant=hints.tenant,
        hashes=hashes,
        num_total_tokens=num_total_tokens,
    )


class SimulatedSequence:
    """Implements engine.scheduler.Schedulable. No token is ever pending: a step is over when the next is planned."""

    __slots__ = (
        "block_ids",
        "hashes",
        "key",
        "max_planned_tokens",
        "num_computed_tokens",
        "num_likely_tokens",
        "num_preemptions",
        "request",
        "running",
        "token_ids",
    )

    num_pending = 0
    must_know_tokens = False
    wants_prompt_logprobs = False

    def __init__(
        self, request: SimulatedRequest, turn: int, arrival: int, num_tokens: int, max_planned_tokens: int
    ) -> None:
        self.request = request
        self.key = (request.priority, turn, arrival)
        self.token_ids = range(num_tokens)
        self.hashes = list(request.hashes)
        self.block_ids: list[BlockId] = []
        self.max_planned_tokens = max_planned_tokens
        self.num_computed_tokens = 0
        self.num_likely_tokens = 0
        self.num_preemptions = 0
        self.running = False

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def finished(self) -> bool:
        return len(self.token_ids) >= self.max_planned_tokens

    def append(self, num_tokens: int) -> None:
        self.token_ids = range(len(self.token_ids) + num_tokens)

    def forget_computed(self) -> list[BlockId]:
        block_ids, self.block_ids = self.block_ids, []
        self.num_computed_tokens = 0
        return block_ids
