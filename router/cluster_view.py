"""What the router knows of one worker: its own load report, and what the report cannot show yet.

Placement makes a WorkerState when a worker attaches; a session feeds it. Besides the worker's report the state counts
what this router has decided to send there and no report shows; without that, every request that arrives between two
reports would go to the same worker. A change only marks the state as dirty: its row is worked out when a decision
needs it, for reports come far more often than decisions.
"""

import math
from collections import deque
from typing import NamedTuple

import msgspec

from engine.step_model import StepModel, num_pairs
from engine.wire import model_from_pb
from protos import worker_pb2 as pb

PREFILL = "prefill"
DECODE = "decode"


class WorkerRow(NamedTuple):
    """One worker as policies see it. The numbers include what this router sent and the worker has not reported."""

    block_size: int
    num_blocks: int
    max_num_seqs: int
    seq_limit: int  # sequences it may hold, running or on their way, before more wait in the router
    num_seqs: int
    num_running: int  # of those, in its steps by its last report
    num_free_blocks: int
    queue_s: float  # to compute the prompts it has told of
    num_waiting_tokens: int  # of prompts to compute that `queue_s` does not count
    num_waiting_pairs: int  # (query, key) pairs of those
    num_pull_tokens: int  # of KV that has yet to come
    num_pending: int  # requests counted above that the worker has not reported


class Reservation(msgspec.Struct, frozen=True, gc=False):
    """What a request will take of one worker."""

    prefill_tokens: int = 0  # to compute
    prefill_past: int = 0  # cached tokens before those
    blocks: int = 0
    pull_tokens: int = 0  # of KV, to come from a prefill worker


class _Pending(msgspec.Struct, gc=False):
    tokens: int
    pairs: int
    blocks: int
    pull_tokens: int


class WorkerState:
    """Load and reservations of one attached worker. `dirty` collects the states whose row has changed."""

    def __init__(
        self, worker_id: str, description: pb.Description, seqs_per_slot: float, dirty: set["WorkerState"]
    ) -> None:
        self.worker_id = worker_id
        self.description = description
        self.prefills = description.role == PREFILL
        self.load = pb.Load()
        # Of the description, read for each row: a message's fields take their time.
        self._block_size, self._num_blocks = description.block_size, description.num_blocks
        self._max_num_seqs = description.max_num_seqs
        self._seq_limit = max(1, int(description.max_num_seqs * seqs_per_slot))
        self._pending: dict[int, _Pending] = {}
        self._sent: deque[int] = deque()  # handles of submits that no report counts
        self._num_counted = 0  # submits before those
        self._closed = False
        self._model: StepModel | None = None
        self._modelled: pb.Load | None = None  # the report that `_model` has been taken from
        self._said_model: pb.StepModel | None = None
        self._dirty = dirty

    @property
    def closed(self) -> bool:
        """It takes no new requests, whatever it reports. Set by its session."""
        return self._closed

    @closed.setter
    def closed(self, closed: bool) -> None:
        if closed != self._closed:
            self._closed = closed
            self._dirty.add(self)

    @property
    def model(self) -> StepModel | None:
        """How long its steps take, which it says in every report once it knows; None: it has not run enough of them."""
        load = self.load
        if load is not self._modelled:
            self._modelled = load
            if load.HasField("model") and load.model != self._said_model:
                self._said_model = load.model
                model = model_from_pb(load.model)
                self._model = model if _can_be(model) else self._model
        return self._model

    @property
    def usable(self) -> bool:
        """Whether new requests may go here."""
        return not (self._closed or self.load.draining)

    @property
    def transfer_token_s(self) -> float:
        """Of its link, for each token of KV that it pulls; 0: unknown."""
        seconds = self.load.transfer_token_s
        return seconds if 0.0 < seconds < math.inf else 0.0

    @property
    def has_pending(self) -> bool:
        """Whether it counts any request beside the worker's report."""
        return bool(self._pending)

    def reserve(self, handle: int, part: Reservation) -> None:
        """Count a request from the decision on."""
        pairs = num_pairs(part.prefill_tokens, part.prefill_past)
        self._pending[handle] = _Pending(part.prefill_tokens, pairs, part.blocks, part.pull_tokens)
        self._dirty.add(self)

    def sent(self, handle: int) -> None:
        """In the order of the session's submits."""
        self._sent.append(handle)

    def counted(self, handle: int) -> None:
        """The worker's own report covers this request, or it is over."""
        if self._pending and self._pending.pop(handle, None) is not None:
            self._dirty.add(self)

    def report(self, load: pb.Load, num_submits: int = 0) -> None:
        """`num_submits`: of its session, that `load` counts."""
        self.load = load
        self._dirty.add(self)
        while self._num_counted < num_submits and self._sent:
            self._pending.pop(self._sent.popleft(), None)
            self._num_counted += 1

    def row(self) -> WorkerRow:
        load, pending = self.load, self._pending.values()
        # A decode worker's pulls will run there; a prefill worker's leases are over for its engine.
        num_pulling = 0 if self.prefills else load.num_handoffs
        num_running, num_free_blocks = load.num_running, load.num_free_blocks
        waiting_tokens = waiting_pairs = 0
        pull_tokens = load.num_pull_tokens
        if not load.HasField("model"):
            waiting_tokens = load.num_waiting_tokens
        for each in pending:
            waiting_tokens += each.tokens
            waiting_pairs += each.pairs
            num_free_blocks -= each.blocks
            pull_tokens += each.pull_tokens
        return WorkerRow(
            self._block_size,
            self._num_blocks,
            self._max_num_seqs,
            self._seq_limit,
            num_running + load.num_waiting + num_pulling + len(pending),
            num_running,
            num_free_blocks,
            load.queue_us / 1e6,
            waiting_tokens,
            waiting_pairs,
            pull_tokens,
            len(pending),
        )


def _can_be(model: StepModel) -> bool:
    """One coefficient that is no number would make every cost of the pool none."""
    coefficients = (model.base_s, model.prefill_token_s, model.pair_s, model.decode_s, model.kv_token_s)
    return min(coefficients) >= 0.0 and math.isfinite(sum(coefficients))
