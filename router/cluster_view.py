"""What the router knows of the workers: mutable per-worker state, and the immutable view a policy gets.

A session owns one WorkerState while it is attached. Besides the worker's own load report the state counts what
this router has decided to send there and the report cannot show yet; without that, every request that arrives
between two reports would go to the same worker.
"""

from dataclasses import dataclass

from engine.step_model import StepModel
from engine.wire import model_from_pb
from protos import worker_pb2 as pb

PREFILL = "prefill"
DECODE = "decode"

# The report that follows a submit may have been written before the worker took it; the one after was not.
_REPORTS_UNTIL_COUNTED = 2


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker as a policy sees it. The numbers include what this router sent and the worker has not reported."""

    id: str
    role: str
    fingerprint: str
    block_size: int
    num_blocks: int
    max_num_seqs: int
    seq_limit: int  # sequences it may hold, running or on their way, before more wait in the router
    num_seqs: int
    num_free_blocks: int
    model: StepModel | None  # how long its steps take; None: it has not run enough of them
    queue_s: float  # to compute the prompts it has told of
    num_waiting_tokens: int  # of prompts to compute that `queue_s` does not count
    num_pending: int  # requests counted above that the worker has not reported


@dataclass(frozen=True, slots=True)
class ClusterView:
    """The workers that may get a request now."""

    prefill: tuple[WorkerView, ...]
    decode: tuple[WorkerView, ...]


@dataclass(slots=True)
class _Pending:
    tokens: int
    blocks: int
    reports_seen: int = -1  # since it was sent; -1: not sent yet


class WorkerState:
    """Load and reservations of one attached worker. Not shared between sessions."""

    def __init__(self, worker_id: str, description: pb.Description, seqs_per_slot: float) -> None:
        self.worker_id = worker_id
        self.description = description
        self.load = pb.Load()
        self._seq_limit = max(1, int(description.max_num_seqs * seqs_per_slot))
        self._pending: dict[int, _Pending] = {}
        self._view: WorkerView | None = None
        self._model: StepModel | None = None

    def reserve(self, handle: int, tokens: int, blocks: int) -> None:
        """Count a request from the decision on: `tokens` of prefill work, `blocks` of KV."""
        self._pending[handle] = _Pending(tokens, blocks)
        self._view = None

    def sent(self, handle: int) -> None:
        self._pending[handle].reports_seen = 0

    def counted(self, handle: int) -> None:
        """The worker's own report covers this request, or it is over."""
        if self._pending and self._pending.pop(handle, None) is not None:
            self._view = None

    def report(self, load: pb.Load) -> None:
        """Heartbeats of one long step say the same again and count no request that came meanwhile."""
        new_turn = load.turn != self.load.turn
        self.load = load
        if load.HasField("model"):
            self._model = model_from_pb(load.model)
        self._view = None
        if self._pending and new_turn:
            for handle, pending in list(self._pending.items()):
                if pending.reports_seen >= 0:
                    pending.reports_seen += 1
                    if pending.reports_seen >= _REPORTS_UNTIL_COUNTED:
                        del self._pending[handle]

    def view(self) -> WorkerView:
        if self._view is None:
            load, described, pending = self.load, self.description, self._pending.values()
            # A decode worker's pulls will run there; a prefill worker's leases are over for its engine.
            num_pulling = load.num_handoffs if described.role == DECODE else 0
            uncounted = 0 if load.HasField("model") else load.num_waiting_tokens
            self._view = WorkerView(
                id=self.worker_id,
                role=described.role,
                fingerprint=described.fingerprint,
                block_size=described.block_size,
                num_blocks=described.num_blocks,
                max_num_seqs=described.max_num_seqs,
                seq_limit=self._seq_limit,
                num_seqs=load.num_running + load.num_waiting + num_pulling + len(pending),
                num_free_blocks=load.num_free_blocks - sum(each.blocks for each in pending),
                model=self._model,
                queue_s=load.queue_us / 1e6,
                num_waiting_tokens=uncounted + sum(each.tokens for each in pending),
                num_pending=len(pending),
            )
        return self._view
