"""The role of a simulated decode worker, as decode_workers.worker.DecodeRole, with the real Intake."""

from collections.abc import Iterable
from itertools import chain
from typing import cast

import msgspec

from cluster.simulation.engine import SimulatedEngine, Step
from cluster.simulation.events import Events
from cluster.simulation.handoff import Handoff, SimulatedPull
from cluster.simulation.sequence import SimulatedRequest, SimulatedSequence
from cluster.simulation.transfer import Link, TransferSpeed
from cluster.simulation.worker import Client, SimulatedWorker
from decode_workers.intake import Entry, Intake
from engine.kv.layout import BlockId
from engine.request import RequestId
from protos import worker_pb2 as pb


class SimulatedDecode:
    """Implements cluster.simulation.worker.Role."""

    def __init__(
        self,
        worker: SimulatedWorker[Handoff],
        max_pulls: int,
        speed: TransferSpeed,
        kv_bytes_per_token: int,
        events: Events,
    ) -> None:
        self._worker = worker
        self._engine: SimulatedEngine = worker.engine
        self._intake = Intake(worker.engine, self._start_pull, max_pulls)
        self._speed = speed
        self._kv_bytes_per_token = kv_bytes_per_token
        self._events = events
        self._link = Link()
        self._offers: dict[str, Handoff] = {}  # taken and not pulled, by request id
        self._entries: dict[str, Entry] = {}  # pulling
        self._clients: dict[str, Client] = {}
        self._fresh: set[str] = set()  # prompts to prefill here that have no token yet

    @property
    def pulled_blocks(self) -> Iterable[BlockId]:
        return chain.from_iterable(entry.block_ids for entry in self._entries.values())

    def submit(self, client: Client, request: SimulatedRequest, offer: Handoff | None) -> None:
        self._clients[request.id] = client
        self._worker.submitted(client)
        if offer is None:
            self._fresh.add(request.id)
            self._engine.submit(request, decodes=True)
        else:
            self._offers[request.id] = offer
            self._intake.add(request, b"", 0.0)

    def cancel(self, request_id: str) -> None:
        """Its prompt will not be computed. What is pulled already goes on: its lease lives."""
        if self._offers.pop(request_id, None) is not None:
            self._intake.cancel(RequestId(request_id))
            del self._clients[request_id]

    def before_schedule(self) -> None:
        self._intake.start()

    def before_run(self, step: Step) -> None:
        for sequence in step.started:
            request_id = sequence.request.id
            if request_id in self._fresh and not sequence.num_preemptions:
                self._worker.say(self._clients[request_id]).cached_tokens = sequence.num_computed_tokens

    def computed(self, step: Step, began: float, now: float) -> None:
        pass

    def token(self, sequence: SimulatedSequence) -> None:
        request_id = sequence.request.id
        if request_id in self._fresh:
            self._fresh.remove(request_id)
            self._worker.say(self._clients[request_id]).first_token = True
        if sequence.finished:
            self._worker.say(self._clients.pop(request_id)).finished = True
            self._engine.leave(sequence)

    def add_load(self, load: pb.Load) -> None:
        self._intake.add_load(load, self._events.now)

    def _start_pull(self, entry: Entry) -> SimulatedPull:
        handoff = self._offers.pop(entry.request.id)
        self._entries[entry.request.id] = entry
        pull = SimulatedPull(
            handoff, self._link, entry.num_held_tokens, self._speed, self._kv_bytes_per_token, self._pull_ends
        )
        if not handoff.source.open(handoff, pull):
            pull.fail()
        return pull

    def _pull_ends(self, pull: SimulatedPull, done_at: float | None) -> None:
        if done_at is None:
            self._worker.post(lambda: self._failed(pull))
            return
        self._events.at(done_at, self._pulled, pull)

    def _pulled(self, pull: SimulatedPull) -> None:
        pull.handoff.source.pulled(pull.handoff)
        self._worker.post(lambda: self._resume(pull))

    def _resume(self, pull: SimulatedPull) -> None:
        entry = self._leave_intake(pull)
        request = cast("SimulatedRequest", entry.request)
        said = self._worker.say(self._clients[request.id])
        said.handoff_done, said.num_bytes = True, pull.num_bytes
        self._intake.moved(pull.num_tokens, self._link.take_busy(), self._events.now)
        tokens = cast("tuple[int, ...]", range(len(request.token_ids) + 1))  # with the first of the answer
        self._engine.resume(msgspec.structs.replace(request, token_ids=tokens), entry.block_ids)

    def _failed(self, pull: SimulatedPull) -> None:
        entry = self._leave_intake(pull)
        self._engine.kv.release(entry.block_ids)
        self._worker.say(self._clients.pop(entry.request.id)).failed = True

    def _leave_intake(self, pull: SimulatedPull) -> Entry:
        request_id = pull.handoff.request.id
        del self._entries[request_id]
        return self._intake.end(request_id)
