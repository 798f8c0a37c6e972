"""The router's middle: members become sessions, requests become flights, and the placement brings them together.

Owns the sessions, the flights and the placement, which decides; the HTTP front calls `start`. Everything here runs on
one asyncio loop and, apart from `run` and `close`, nothing waits: sessions call in with what workers say, flights
call in when they need a worker or are over.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.errors import InvalidRequest
from engine.kv.block_hash import chain_seed
from engine.request import Request
from protos import worker_pb2 as pb
from router.cluster_view import DECODE, WorkerState
from router.flight import Flight, RetryConfig, Slo
from router.generation import NO_HINTS, GenerationFailed, Overloaded, RouteHints
from router.lanes import Lanes
from router.membership import Joined, Left, Membership
from router.metrics import SECONDS, Histogram
from router.placement import Placed, Placement, PlacementConfig
from router.policies import RoutingPolicy
from router.session import SessionConfig, WorkerSession
from router.stream import TokenStream

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DispatcherConfig:
    session: SessionConfig = field(default_factory=SessionConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    retry: RetryConfig = field(default_factory=RetryConfig)
    slo: Slo = field(default_factory=Slo)
    no_worker_wait_s: float = 10.0  # how long a request waits while no decode worker is there at all


@dataclass(slots=True)
class Counters:
    """Totals since the start."""

    requests: int = 0
    refused: int = 0
    attempts: int = 0
    sessions_lost: int = 0
    predicted_hit_tokens: int = 0
    actual_hit_tokens: int = 0  # with the line above: how true the index is


class Dispatcher:
    """Implements router.generation.Generator. `clock` is monotonic seconds, as are all deadlines."""

    def __init__(
        self,
        membership: Membership,
        policy: RoutingPolicy,
        config: DispatcherConfig,
        *,
        model: str,
        token: str,
        secret: str,
        router_id: str,
        clock: Callable[[], float],
    ) -> None:
        self.counters = Counters()
        self.index_lag = Histogram(
            "index_lag_seconds", "Time from a block's change on a worker to its change in this router's index.", SECONDS
        )
        self._membership = membership
        self._config = config
        self._model = model
        self._token = token
        self._secret = secret
        self._router_id = router_id
        self._clock = clock
        self._lanes = Lanes()
        self._placement: Placement[Flight] = Placement(policy, config.placement, clock)
        self._pumping = False
        self._will_pump = False
        self._flights: set[Flight] = set()
        self._sessions: dict[str, WorkerSession] = {}
        self._decoders: dict[str, WorkerSession] = {}  # of those, the decode workers'
        self._tasks: dict[str, asyncio.Task[None]] = {}  # the latest session's, by worker id
        self._absence_timer: asyncio.TimerHandle | None = None
        self._runner: asyncio.Task[Any] | None = None
        self._closed = False

    async def run(self) -> None:
        """Follow the membership and keep a session to every member, until closed or cancelled."""
        self._runner = asyncio.current_task()
        try:
            async with asyncio.TaskGroup() as sessions:
                async for change in self._membership.watch():
                    if isinstance(change, Joined):
                        self._join(change, sessions)
                    else:
                        self._leave(change)
        except asyncio.CancelledError:
            if not self._closed:
                raise
        finally:
            self._closed = True
            self._end_flights()

    async def close(self) -> None:
        """End every request and session, and `run`. Idempotent."""
        self._closed = True
        self._end_flights()  # before the sessions that they run on: nothing has failed
        if self._runner is not None and not self._runner.done():
            self._runner.cancel()
            await asyncio.wait({self._runner})

    @property
    def ready(self) -> bool:
        """One decode worker is enough: it can prefill too."""
        return any(session.usable for session in self._decoders.values())

    def start(self, request: Request, deadline: float, hints: RouteHints = NO_HINTS) -> TokenStream:
        """See Generator.start. The stream must be iterated to its end or closed."""
        if self._closed:
            raise _shutting_down()
        self.counters.requests += 1
        seed = chain_seed(self._secret, self._model, request.adapter, request.cache_salt)
        flight = Flight(
            request,
            deadline,
            self,
            self._config.retry,
            hints=hints,
            slo=self._config.slo,
            chain_seed=seed,
            clock=self._clock,
        )
        self._flights.add(flight)
        self._placement.add(flight)
        refusals = self._pump()
        error = refusals.pop(flight, None)
        if error is not None:
            try:
                raise error
            finally:
                del error, flight, refusals  # this frame is in its traceback: they would be a cycle
        self._watch_absence()
        return flight.stream

    def status(self) -> dict[str, Any]:
        """What the operator sees: JSON values only."""
        return {
            "ready": self.ready,
            "workers": [self._worker_status(session) for session in self._sessions.values()],
            "index": {
                "blocks": self._placement.num_hashes,
                "predicted_hit_tokens": self.counters.predicted_hit_tokens,
                "actual_hit_tokens": self.counters.actual_hit_tokens,
            },
            "queue": {"waiting": self._placement.num_waiting, "running": self._placement.num_running},
            "counters": {
                "requests": self.counters.requests,
                "refused": self.counters.refused,
                "attempts": self.counters.attempts,
                "sessions_lost": self.counters.sessions_lost,
            },
        }

    def session_attached(self, session: WorkerSession, frame: pb.Frame) -> WorkerState:
        worker_id, described, hashes = session.member.worker_id, frame.description, frame.kv_snapshot.hashes
        log.info("attached %s worker %s with %d cached blocks", described.role, worker_id, len(hashes))
        for other in self._sessions.values():
            if (
                other.state is not None
                and other.member.role != described.role
                and other.state.description.fingerprint != described.fingerprint
            ):
                log.warning(
                    "workers %s and %s are never paired: their fingerprints are %s and %s",
                    worker_id,
                    other.member.worker_id,
                    described.fingerprint,
                    other.state.description.fingerprint,
                )
        return self._placement.attach(worker_id, described, hashes)

    def session_events(self, session: WorkerSession, frame: pb.Frame) -> None:
        for event in frame.kv_events:
            self._placement.apply(session.member.worker_id, event)
        self.index_lag.observe(session.index_lag.applied(frame.kv_events_us / 1e6, self._clock()))

    def session_expects(self, session: WorkerSession, hashes: Sequence[int]) -> None:
        self._placement.expect(session.member.worker_id, hashes)

    def index_lags(self) -> Iterator[tuple[str, float, int]]:
        """Of each attached worker: lag of its last events, blocks that it holds beyond those in the index."""
        for worker_id, session in self._sessions.items():
            if session.state is not None:
                indexed = self._placement.num_blocks(worker_id)
                yield worker_id, session.index_lag.last_s, session.state.load.num_cached_blocks - indexed

    def session_reported(self, session: WorkerSession) -> None:
        # Once for all the frames that have come together: a decision takes longer than most frames.
        if self._placement.reported() and session.member.role == DECODE and not self._will_pump:
            self._will_pump = True
            asyncio.get_running_loop().call_soon(self._pump_for_reports)

    def session_lost(self, session: WorkerSession, reason: str) -> None:
        if self._sessions.get(session.member.worker_id) is session:  # else a successor may be attached already
            self._placement.detach(session.member.worker_id)
        if self._closed or session.retired:
            return
        self.counters.sessions_lost += 1
        log.warning("lost worker %s: %s", session.member.worker_id, reason)
        self._watch_absence()

    def flight_waits(self, flight: Flight) -> None:
        self._placement.put_back(flight)
        self._pump()
        self._watch_absence()

    def flight_over(self, flight: Flight) -> None:
        self._flights.discard(flight)
        stream = flight.stream
        self._placement.release(flight, len(stream.token_ids) or None)
        timeline, decisions = stream.timeline, stream.decisions
        if len(decisions) == 1 and stream.token_ids:
            self.counters.predicted_hit_tokens += decisions[0].hit_tokens
            self.counters.actual_hit_tokens += timeline.cached_tokens
        if self._placement.num_waiting:
            self._pump()

    def _end_flights(self) -> None:
        self._cancel_absence_timer()
        for flight in list(self._flights):
            flight.give_up(_shutting_down())

    def _join(self, member: Joined, sessions: asyncio.TaskGroup) -> None:
        known = self._sessions.get(member.worker_id)
        if known is not None and known.member == member:
            known.revive()
            return
        if known is not None:  # another life of the worker: what the old one ran is lost
            self._tasks[member.worker_id].cancel()
            self._placement.detach(member.worker_id)
        session = WorkerSession(
            member,
            self,
            self._config.session,
            model=self._model,
            token=self._token,
            router_id=self._router_id,
            lanes=self._lanes,
            clock=self._clock,
        )
        self._sessions[member.worker_id] = session
        self._decoders.pop(member.worker_id, None)  # another life may have another role
        if member.role == DECODE:
            self._decoders[member.worker_id] = session
        task = sessions.create_task(self._serve(session), name=f"session {member.worker_id}")
        self._tasks[member.worker_id] = task

    def _leave(self, change: Left) -> None:
        session = self._sessions.get(change.worker_id)
        if session is not None:
            session.retire()
            self._watch_absence()

    async def _serve(self, session: WorkerSession) -> None:
        worker_id = session.member.worker_id
        try:
            await session.run()
        finally:
            if self._sessions.get(worker_id) is session:
                del self._sessions[worker_id], self._tasks[worker_id]
                self._decoders.pop(worker_id, None)
                self._placement.detach(worker_id)
            log.info("forgot worker %s at %s", worker_id, session.member.address)

    def _pump_for_reports(self) -> None:
        self._will_pump = False
        self._pump()
        self._watch_absence()

    def _pump(self) -> dict[Flight, Exception]:
        """Start what can be placed; the flights that were refused instead, with their errors."""
        refusals: dict[Flight, Exception] = {}
        if self._pumping or self._closed:  # what ends or waits meanwhile is seen by the loop below
            return refusals
        self._pumping = True
        try:
            for outcome in self._placement.pump():
                flight = outcome.candidate
                if isinstance(outcome, Placed):
                    self._launch(outcome)
                elif outcome.retry_after is None:
                    error = InvalidRequest(outcome.reason, param="prompt", code="context_length_exceeded")
                    refusals[flight] = error
                    flight.attempt_refused(error)
                else:
                    self.counters.refused += 1
                    refusals[flight] = Overloaded(outcome.reason, retry_after=outcome.retry_after)
                    flight.give_up(refusals[flight])
        finally:
            self._pumping = False
        return refusals

    def _launch(self, placed: Placed[Flight]) -> None:
        self.counters.attempts += 1
        decision = placed.decision
        prefill = self._sessions[decision.prefill] if decision.prefill is not None else None
        placed.candidate.launch(placed, prefill, self._sessions[decision.decode])

    def _watch_absence(self) -> None:
        """While there is no decode worker, waiting requests have a time after which they are told so."""
        if self.ready or self._closed:
            self._cancel_absence_timer()
        elif self._absence_timer is None and self._placement.num_waiting:
            self._arm_absence_timer(self._config.no_worker_wait_s)

    def _arm_absence_timer(self, delay: float) -> None:
        self._absence_timer = asyncio.get_running_loop().call_later(delay, self._give_up_waiting)

    def _cancel_absence_timer(self) -> None:
        if self._absence_timer is not None:
            self._absence_timer.cancel()
            self._absence_timer = None

    def _give_up_waiting(self) -> None:
        self._absence_timer = None
        wait_s, now = self._config.no_worker_wait_s, self._clock()
        if self.ready:
            return
        deadlines = {flight: flight.waiting_since + wait_s for flight in self._placement.waiting()}
        for flight, deadline in deadlines.items():
            if deadline <= now:
                flight.give_up(_unavailable(flight))
        left = [deadline - now for deadline in deadlines.values() if deadline > now]
        if left:
            self._arm_absence_timer(min(left))

    def _worker_status(self, session: WorkerSession) -> dict[str, Any]:
        member, state = session.member, session.state
        known: dict[str, Any] = {
            "id": member.worker_id,
            "role": member.role,
            "attached": state is not None,
            "usable": session.usable,
            "requests": session.num_open,
        }
        if state is not None:
            load, described = state.load, state.description
            known |= {
                "fingerprint": described.fingerprint,
                "block_size": described.block_size,
                "num_blocks": described.num_blocks,
                "num_free_blocks": load.num_free_blocks,
                "num_running": load.num_running,
                "num_waiting": load.num_waiting,
                "num_waiting_tokens": load.num_waiting_tokens,
                "num_handoffs": load.num_handoffs,
                "queue_s": round(load.queue_us / 1e6, 6),
                "transfer_token_s": state.transfer_token_s,
                "draining": load.draining,
                "indexed_blocks": self._placement.num_blocks(member.worker_id),
                "index_lag_s": round(session.index_lag.last_s, 6),
            }
        return known


def _shutting_down() -> Exception:
    return Overloaded("the router is shutting down", retry_after=1.0, unavailable=True)


def _unavailable(flight: Flight) -> Exception:
    if flight.has_tokens:
        return GenerationFailed("no decode worker is available")
    return Overloaded("no decode worker is available", retry_after=5.0, unavailable=True)
