"""The role of a simulated prefill worker, as prefill_workers.worker.PrefillRole."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from cluster.simulation.engine import SimulatedEngine, Step
from cluster.simulation.events import Events
from cluster.simulation.handoff import Handoff, SimulatedPull
from cluster.simulation.sequence import SimulatedRequest, SimulatedSequence
from cluster.simulation.transfer import Link
from cluster.simulation.worker import Client, SimulatedWorker
from engine.kv.layout import BlockId
from kv_transfer.lease import LeaseState, LeaseTable
from protos import worker_pb2 as pb


@dataclass(slots=True)
class _Prompt:
    client: Client
    sequence: SimulatedSequence
    handoff: Handoff | None = None


class SimulatedPrefill:
    """Implements cluster.simulation.worker.Role."""

    def __init__(
        self, worker: SimulatedWorker[Handoff], leases: LeaseTable, lease_s: float, network_s: float, events: Events
    ) -> None:
        self.link = Link()
        self._worker = worker
        self._engine: SimulatedEngine = worker.engine
        self._leases = leases
        self._lease_s = lease_s
        self._network_s = network_s
        self._events = events
        self._prompts: dict[str, _Prompt] = {}  # being computed, by request id
        self._held: dict[str, list[BlockId]] = {}  # by lease, until they are back
        self._offered: dict[str, Handoff] = {}

    @property
    def leased_blocks(self) -> Iterable[BlockId]:
        return (block for blocks in self._held.values() for block in blocks)

    def submit(self, client: Client, request: SimulatedRequest) -> None:
        self._worker.submitted(client)
        sequence = self._engine.submit(request, decodes=False)
        self._prompts[request.id] = _Prompt(client, sequence)

    def open(self, handoff: Handoff, pull: SimulatedPull) -> bool:
        """A sink begins to pull; False when the lease has ended."""
        now, lease_id = self._events.now, handoff.lease_id
        if not (self._leases.open(lease_id, now) and self._leases.begin_read(lease_id, now)):
            return False
        handoff.pull = pull
        pull.proceed(now, now)
        return True

    def pulled(self, handoff: Handoff) -> None:
        """Every byte is in place at the sink: its ack comes back."""
        self._events.after(self._network_s, self._end_lease, handoff)

    def before_schedule(self) -> None:
        pass

    def before_run(self, step: Step) -> None:
        assert not step.preempted, "a prompt has all its blocks from the start"
        for sequence in step.started:
            prompt = self._prompts[sequence.request.id]
            self._worker.say(prompt.client).cached_tokens = sequence.num_computed_tokens
            request = sequence.request
            if request.num_total_tokens > len(request.token_ids) + 1:
                self._offer(prompt, request)

    def computed(self, step: Step, began: float, now: float) -> None:
        for sequence, _ in step.work:
            prompt = self._prompts[sequence.request.id]
            if prompt.handoff is not None:
                size = self._engine.kv.block_size
                num_tokens = min(sequence.num_computed_tokens, len(sequence.request.token_ids))
                whole = num_tokens == len(sequence.request.token_ids)
                prompt.handoff.announce(num_tokens if whole else num_tokens // size * size, began, now)

    def token(self, sequence: SimulatedSequence) -> None:
        prompt = self._prompts.pop(sequence.request.id)
        said = self._worker.say(prompt.client)
        said.first_token = True
        said.finished = sequence.num_tokens >= sequence.request.num_total_tokens
        self._engine.leave(sequence)

    def add_load(self, load: pb.Load) -> None:
        load.num_handoffs = len(self._offered)

    def _offer(self, prompt: _Prompt, request: SimulatedRequest) -> None:
        sequence, now = prompt.sequence, self._events.now
        lease_id = f"{request.id}#{prompt.client.handle}"
        if not self._leases.add(lease_id, sequence.block_ids, now):
            self._fail(prompt)
            return
        self._engine.kv.retain(sequence.block_ids)
        self._held[lease_id] = list(sequence.block_ids)
        num_final = sequence.num_computed_tokens
        prompt.handoff = self._offered[lease_id] = Handoff(self, lease_id, request, num_final)
        self._worker.say(prompt.client).offer = prompt.handoff
        self._events.after(self._lease_s / 2, self._look_after, prompt.handoff)

    def _look_after(self, handoff: Handoff) -> None:
        """What the sink's heartbeats renew lives on, the rest expires."""
        now, state = self._events.now, self._leases.state(handoff.lease_id)
        if state is None:
            return
        if state is LeaseState.OPENED and self._leases.renew(handoff.lease_id, now):
            self._events.after(self._lease_s / 2, self._look_after, handoff)
        elif handoff.lease_id in self._leases.expire(now):
            self._give_back()
        else:
            self._events.after(self._lease_s / 2, self._look_after, handoff)

    def _end_lease(self, handoff: Handoff) -> None:
        self._leases.end_read(handoff.lease_id)
        self._leases.end(handoff.lease_id, self._events.now)
        self._give_back()

    def _give_back(self) -> None:
        for lease_id, block_ids in self._leases.take_released():
            self._worker.post(partial(self._released, lease_id, block_ids))

    def _released(self, lease_id: str, block_ids: list[BlockId]) -> None:
        self._engine.kv.release(block_ids)
        del self._held[lease_id]
        handoff = self._offered.pop(lease_id)
        prompt = self._prompts.get(handoff.request.id)
        if prompt is not None and prompt.handoff is handoff:  # it ended under a prompt still being computed
            self._fail(prompt)

    def _fail(self, prompt: _Prompt) -> None:
        del self._prompts[prompt.sequence.request.id]
        self._engine.leave(prompt.sequence)
        self._worker.say(prompt.client).failed = True
