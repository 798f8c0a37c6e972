"""The loop of a worker's engine thread, the same in both roles: receive, schedule, start, collect, publish.

With an executor that allows two steps in flight, the next one is planned and started while the device computes the
one before it, whose tokens are then collected and published while the next one runs. Not behind a step of LONG_STEP_S:
what comes meanwhile would wait for both, and beside such a step the time that a device waits for a plan is little.

What differs between prefill and decode comes in as a `Role`. The loop owns the order of things, deadlines, load and
progress; the engine, the clients and the role are touched by its thread only. Other threads post to the inbox, ask
for `current_load`, and call `stop`.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import Generic, Protocol, TypeVar

from engine.backlog import REPORT_S
from engine.clients import Client, Clients
from engine.engine import Engine, Scheduled, TokenOutput
from engine.errors import InvalidRequest
from engine.inbox import Inbox
from engine.request import RequestId
from engine.session import Attached, Cancelled, Ended, SessionCommand, Submitted
from engine.step_model import Calibration, StepModel, StepWork, chunks_work
from engine.wire import load_to_pb
from protos import worker_pb2 as pb

IDLE_WAIT_S = REPORT_S  # how late a deadline of a waiting request may be noticed, and a router hear of the last step
CALIBRATION_S = 0.25  # between two fits of the step model
LONG_STEP_S = 0.1  # by the worker's own model of its steps


@dataclass(frozen=True, slots=True)
class Drain:
    """Wakes a loop that is to leave."""


C_contra = TypeVar("C_contra", contravariant=True)
C = TypeVar("C")


class Role(Protocol[C_contra]):
    """What a role does at each point of the loop. `C` are the commands that only it knows."""

    def submit(self, client: Client, message: pb.Submit) -> None:
        """Take a request. Raises InvalidRequest, with nothing changed."""
        ...

    def receive(self, command: C_contra) -> None: ...

    def abort(self, request_id: RequestId) -> None:
        """Let go of a request in any state. Idempotent; the loop tells the client."""
        ...

    def before_schedule(self) -> None: ...

    def before_run(self, scheduled: Scheduled, now: float) -> None: ...

    def group_done(self, scheduled: Scheduled, group: int) -> None:
        """The KV of a layer group is in place for every chunk of the step."""
        ...

    def token(self, token: TokenOutput, now: float) -> None:
        """A sampled token, which the client has been told; a finished request has left the engine."""
        ...

    def add_load(self, load: pb.Load) -> None:
        """Add what the role holds to the engine's load."""
        ...


class WorkerLoop(Generic[C]):
    def __init__(
        self,
        engine: Engine,
        clients: Clients,
        inbox: Inbox[SessionCommand | Drain | C],
        role: Role[C],
        clock: Callable[[], float],
    ) -> None:
        self.engine = engine
        self.clients = clients
        self._inbox = inbox
        self._role = role
        self._clock = clock
        self._stopping = Event()
        self._draining = False
        self._progress = 0
        self._step_began = 0.0
        self._works: deque[StepWork] = deque()  # of the steps in flight
        self._calibration = Calibration()
        self._model: StepModel | None = None
        self._next_fit = 0.0
        self._events_since: float | None = None  # when the cache's undrained events began
        self._load = pb.Load(num_free_blocks=engine.kv.num_free)

    def current_load(self) -> pb.Load:
        """The latest load with the progress of this moment, for heartbeats. Any thread."""
        load = pb.Load()
        load.CopyFrom(self._load)
        load.progress = self._progress
        load.draining = self._draining
        return load

    def drain(self) -> None:
        """Leave the loop when the last request is over. Any thread."""
        self._draining = True
        self._inbox.post(Drain())

    def stop(self) -> None:
        """Leave the loop after the step in hand. Any thread."""
        self._stopping.set()
        self._inbox.post(Drain())

    def run(self) -> None:
        wait = 0.0
        while not self._stopping.is_set() and not (self._draining and not self.clients):
            commands = self._inbox.take(wait)
            for command in commands:
                self._receive(command)
            self._progress += 1
            expired = self.clients.expired()
            for request_id in expired:
                self._abort(request_id, "the request's deadline passed")
            changed = bool(commands or expired)
            self._role.before_schedule()
            scheduled = None if self._runs_long else self.engine.schedule()
            self._note_events()
            if scheduled is not None:
                self._start(scheduled, changed=changed or bool(scheduled.started or scheduled.preempted))
                changed = False  # that has been told
            is_busy = self.engine.num_in_flight > 0  # what is collected may let others run
            if scheduled is None or not self.engine.can_start:
                changed |= self._collect()
            is_idle = scheduled is None and not is_busy
            self._publish(changed=changed, step_ends=self._reports_until(is_idle=is_idle))
            wait = IDLE_WAIT_S if is_idle else 0.0

    def _reports_until(self, *, is_idle: bool) -> float | None:
        """For `Clients.flush`, at the end of a turn. Behind a long step none begins; else the next turn reports."""
        if is_idle:
            return self._clock()
        if self._runs_long and self._model is not None:
            return self._clock() + self._model.seconds(self._works[-1])
        return None

    @property
    def _runs_long(self) -> bool:
        """Whether the last step started is long, and in flight."""
        if not self._works or self._model is None:
            return False
        return self._model.seconds(self._works[-1]) >= LONG_STEP_S

    def _receive(self, command: SessionCommand | Drain | C) -> None:
        match command:
            case Attached(session):
                self.clients.attach(session)
            case Submitted(session, message):
                client = self.clients.admit(session, message)
                if client is not None:
                    self._submit(client, message)
            case Cancelled(session, handle):
                request_id = self.clients.find(session, handle)
                if request_id is not None:
                    self._abort(request_id, "cancelled")
            case Ended(session):
                for request_id in self.clients.end(session):
                    self._abort(request_id, "its router is gone")
            case Drain():
                pass  # it woke the loop
            case _:
                self._role.receive(command)

    def _submit(self, client: Client, message: pb.Submit) -> None:
        try:
            self._role.submit(client, message)
        except InvalidRequest as error:
            self.clients.refuse(client.request.id, error)

    def _abort(self, request_id: RequestId, reason: str) -> None:
        self._role.abort(request_id)
        self.clients.fail(request_id, reason, retryable=True)

    def _start(self, scheduled: Scheduled, *, changed: bool) -> None:
        now = self._clock()
        if not self.engine.num_in_flight:
            self._step_began = now
        self._role.before_run(scheduled, now)
        chunks = scheduled.batch.chunks
        work = chunks_work((chunk.start, len(chunk.token_ids)) for chunk in chunks)
        # Offers leave now, so that the first chunk's KV moves while it is computed. Heartbeats tell what the step runs.
        self._publish(changed=changed, step_ends=now + self._seconds(work))

        def group_done(group: int) -> None:
            self._progress += 1
            self._role.group_done(scheduled, group)

        num_in_flight = self.engine.num_in_flight
        self.engine.start(scheduled, group_done)
        if self.engine.num_in_flight > num_in_flight:
            self._works.append(work)

    def _collect(self) -> bool:
        """Whether there was a step to collect."""
        if not self.engine.num_in_flight:
            return False
        tokens = self.engine.collect()
        now = self._clock()
        self._note_events()
        for token in tokens:
            self.clients.say_token(token)
            self._role.token(token, now)
        step_s = now - self._step_began
        self._step_began = now
        self._calibration.observe(self._works.popleft(), step_s)
        if now >= self._next_fit:
            self._model, self._next_fit = self._calibration.fit(), now + CALIBRATION_S
        return True

    def _seconds(self, work: StepWork) -> float:
        """Until a step that begins now has been computed, with those in flight; unknown: for ever."""
        if self._model is None:
            return math.inf
        return sum(map(self._model.seconds, self._works), self._model.seconds(work))

    def _publish(self, *, changed: bool, step_ends: float | None) -> None:
        self._note_events()
        self._load = self._measure()
        self.clients.flush(self._load, self.engine.kv, self._events_since or 0.0, changed=changed, step_ends=step_ends)
        self._events_since = None

    def _note_events(self) -> None:
        if self._events_since is None and self.engine.kv.has_events:
            self._events_since = self._clock()

    def _measure(self) -> pb.Load:
        load = load_to_pb(self.engine.load(), self._model)
        load.progress = self._progress
        load.draining = self._draining
        load.num_cached_blocks = self.engine.kv.num_cached
        self._role.add_load(load)
        return load
