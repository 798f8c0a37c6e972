"""A simulated router: the real Placement, fed with frames, and the life of each request between its workers.

As router.dispatcher, router.flight and router.attempt together, without clients that leave and workers that die.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from time import perf_counter

from cluster.simulation.decode import SimulatedDecode
from cluster.simulation.events import Events
from cluster.simulation.handoff import Handoff
from cluster.simulation.prefill import SimulatedPrefill
from cluster.simulation.sequence import SimulatedRequest, simulated_request
from cluster.simulation.trace import NO_HINTS, Hints, TraceRequest
from cluster.simulation.worker import Client, Frame, Said, SimulatedWorker
from protos import worker_pb2 as pb
from router.block_table import Hashes
from router.cluster_view import DECODE, WorkerState
from router.placement import Placed, Placement, Refused
from router.policies import RequestFacts

MAX_FRUITLESS = 8  # attempts without a new token, as router.flight.RetryConfig


@dataclass(slots=True)
class Outcome:
    """What became of a request. Times in seconds of the simulation; None: it did not come to that."""

    number: int
    num_prompt_tokens: int
    num_output_tokens: int
    arrived: float
    placed: float | None = None
    first_token: float | None = None
    finished: float | None = None
    cached_tokens: int = 0  # of the prompt, where it was prefilled
    transferred_bytes: int = 0
    prefill_worker: str | None = None
    decode_worker: str = ""
    num_attempts: int = 0
    refused: str = ""  # why
    hints: Hints = NO_HINTS

    @property
    def ttft(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.arrived

    @property
    def tpot(self) -> float | None:
        if self.finished is None or self.first_token is None:
            return None
        return (self.finished - self.first_token) / max(1, self.num_output_tokens - 1)


@dataclass(eq=False, slots=True)
class SimulatedFlight:
    """Implements router.placement.Candidate."""

    trace: TraceRequest
    outcome: Outcome
    max_new_tokens: int  # as the client asked; the answer may end before
    ttft_s: float | None = None  # limits to refuse it by
    tpot_s: float | None = None
    all_hashes: dict[int, Hashes] = field(default_factory=dict)  # by block size, of prompt and answer
    num_received: int = 0  # tokens of the answer known to the router
    num_fruitless: int = 0
    excluded: frozenset[str] = frozenset()
    prefill: "SimulatedWorker[Handoff] | None" = None
    decode: "SimulatedWorker[Handoff] | None" = None
    prefill_client: Client | None = None
    decode_client: Client | None = None
    handoff_done: bool = False
    request: SimulatedRequest | None = None  # of this attempt

    @property
    def reusable(self) -> bool:
        return True

    @property
    def num_tokens(self) -> int:
        return self.trace.num_prompt_tokens + self.num_received

    def facts(self) -> RequestFacts:
        fresh, hints = self.outcome.placed is None, self.trace.hints  # one that has begun is not refused
        return RequestFacts(
            self.num_tokens,
            self.max_new_tokens - self.num_received,
            arrived=self.outcome.arrived,
            priority=hints.priority,
            tenant=hints.tenant,
            session=hints.session_id,
            ttft_s=self.ttft_s if fresh else None,
            tpot_s=self.tpot_s if fresh else None,
            excluded=self.excluded,
        )

    def hashes(self, block_size: int) -> Hashes:
        return self.whole(block_size)[: self.num_tokens // block_size]

    def whole(self, block_size: int) -> Hashes:
        if block_size not in self.all_hashes:
            self.all_hashes[block_size] = self.trace.hashes(block_size)
        return self.all_hashes[block_size]


@dataclass(frozen=True, slots=True)
class Cluster:
    """The workers, as routers reach them."""

    workers: dict[str, SimulatedWorker[Handoff]]
    prefill: dict[str, SimulatedPrefill]
    decode: dict[str, SimulatedDecode]


class SimulatedRouter:
    def __init__(
        self,
        number: int,
        placement: "Placement[SimulatedFlight]",
        cluster: Cluster,
        descriptions: Sequence[pb.Description],
        events: Events,
        network_s: float,
        done: Callable[[SimulatedFlight], None],
    ) -> None:
        self.decision_s: list[float] = []  # of real time, for each placement
        self._number = number
        self._placement = placement
        self._cluster = cluster
        self._events = events
        self._network_s = network_s
        self._done = done
        self._handles = count(1)
        self._states: dict[str, WorkerState] = {
            each.worker_id: placement.attach(each.worker_id, each, ()) for each in descriptions
        }
        for worker_id, state in self._states.items():
            state.report(cluster.workers[worker_id].load())
        self._flights: dict[int, SimulatedFlight] = {}  # by handle, of either worker

    @property
    def num_waiting(self) -> int:
        return self._placement.num_waiting

    def arrive(self, flight: SimulatedFlight) -> None:
        self._placement.add(flight)
        self._pump()

    def receive(self, frame: Frame[Handoff]) -> None:
        worker_id = frame.worker_id
        state = self._states[worker_id]
        state.report(frame.load, frame.num_submits)
        if frame.kv_event is not None:
            self._placement.apply(worker_id, frame.kv_event)
        if frame.coming:
            self._placement.expect(worker_id, frame.coming)
        for said in frame.said:
            if said.client.handle in self._flights:
                state.counted(said.client.handle)
                self._hear(self._flights[said.client.handle], said)
        if self._placement.reported() and state.description.role == DECODE:
            self._pump()

    def _pump(self) -> None:
        began = perf_counter()
        for outcome in self._placement.pump():
            self.decision_s.append(perf_counter() - began)
            if isinstance(outcome, Placed):
                self._launch(outcome)
            else:
                self._refuse(outcome)
            began = perf_counter()

    def _refuse(self, refused: Refused[SimulatedFlight]) -> None:
        refused.candidate.outcome.refused = refused.reason
        self._done(refused.candidate)

    def _launch(self, placed: Placed[SimulatedFlight]) -> None:
        flight, outcome, trace = placed.candidate, placed.candidate.outcome, placed.candidate.trace
        outcome.num_attempts += 1
        if outcome.placed is None:
            outcome.placed = self._events.now
        outcome.prefill_worker, outcome.decode_worker = placed.decision.prefill, placed.decision.decode
        flight.handoff_done = False
        worker = flight.decode = self._cluster.workers[placed.decision.decode]
        client = flight.decode_client = self._client(flight)
        placed.decode.reserve(client.handle, placed.on_decode)
        if placed.prefill is not None:
            worker = flight.prefill = self._cluster.workers[placed.prefill.worker_id]
            client = flight.prefill_client = self._client(flight)
            placed.prefill.reserve(client.handle, placed.on_prefill)
        request = flight.request = simulated_request(
            f"{trace.number}.{outcome.num_attempts}",
            flight.num_tokens,
            trace.num_prompt_tokens,
            trace.num_tokens,
            flight.whole(worker.engine.kv.block_size).tolist(),
            trace.hints,
        )
        if flight.prefill is not None:
            self._send(worker, client, lambda: self._cluster.prefill[worker.worker_id].submit(client, request))
        else:
            self._send(worker, client, lambda: self._cluster.decode[worker.worker_id].submit(client, request, None))

    def _client(self, flight: SimulatedFlight) -> Client:
        handle = next(self._handles)
        self._flights[handle] = flight
        return Client(self._number, handle)

    def _send(self, worker: SimulatedWorker[Handoff], client: Client, command: Callable[[], None]) -> None:
        self._states[worker.worker_id].sent(client.handle)
        self._events.after(self._network_s, worker.post, command)

    def _hear(self, flight: SimulatedFlight, said: Said[Handoff]) -> None:
        now, outcome = self._events.now, flight.outcome
        if said.cached_tokens is not None and outcome.num_attempts == 1:
            outcome.cached_tokens = said.cached_tokens
        outcome.transferred_bytes += said.num_bytes
        if said.failed:
            self._failed(flight, said.client)
            return
        if said.first_token:
            flight.num_received += 1
            if outcome.first_token is None:
                outcome.first_token = now
        if said.finished:
            outcome.finished = now
            self._close(flight)
            self._over(flight, outcome.num_output_tokens)
            return
        if said.offer is not None:
            self._hand_over(flight, said.offer)
        flight.handoff_done |= said.handoff_done
        if flight.handoff_done and flight.prefill_client is not None:
            self._close_leg(flight.prefill, flight.prefill_client)
            flight.prefill = flight.prefill_client = None

    def _hand_over(self, flight: SimulatedFlight, offer: Handoff) -> None:
        worker, client, request = flight.decode, flight.decode_client, offer.request
        assert worker is not None, flight
        assert client is not None, flight
        decode = self._cluster.decode[worker.worker_id]
        size = worker.engine.kv.block_size
        if flight.prefill is not None and flight.prefill.engine.kv.block_size != size:
            request = simulated_request(
                request.id,
                len(request.token_ids),
                request.num_prompt_tokens,
                request.num_total_tokens,
                flight.whole(size).tolist(),
                flight.trace.hints,
            )
        self._send(worker, client, lambda: decode.submit(client, request, offer))

    def _failed(self, flight: SimulatedFlight, client: Client) -> None:
        """Another attempt, without the workers of this one."""
        if client == flight.prefill_client and flight.decode is not None and flight.request is not None:
            decode, request_id = self._cluster.decode[flight.decode.worker_id], flight.request.id
            self._events.after(self._network_s, flight.decode.post, lambda: decode.cancel(request_id))
        assert flight.request is not None, flight
        progressed = flight.num_tokens > len(flight.request.token_ids)
        flight.num_fruitless = 0 if progressed else flight.num_fruitless + 1
        flight.excluded = frozenset(each.worker_id for each in (flight.prefill, flight.decode) if each is not None)
        self._close(flight)
        if flight.num_fruitless >= MAX_FRUITLESS:
            flight.outcome.refused = "attempts failed"
            self._over(flight)
            return
        self._placement.put_back(flight)
        self._pump()

    def _over(self, flight: SimulatedFlight, num_output_tokens: int | None = None) -> None:
        self._placement.release(flight, num_output_tokens)
        self._done(flight)
        if self._placement.num_waiting:  # also where a prefill worker ended it: its place on a decode worker is free
            self._pump()

    def _close(self, flight: SimulatedFlight) -> None:
        self._close_leg(flight.prefill, flight.prefill_client)
        self._close_leg(flight.decode, flight.decode_client)
        flight.prefill = flight.decode = flight.prefill_client = flight.decode_client = None

    def _close_leg(self, worker: SimulatedWorker[Handoff] | None, client: Client | None) -> None:
        if worker is not None and client is not None:
            self._flights.pop(client.handle, None)
            self._states[worker.worker_id].counted(client.handle)
