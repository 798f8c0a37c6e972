"""The loop of a simulated worker, the same in both roles: receive, schedule, compute, publish, in virtual time.

As engine.loop.WorkerLoop with engine.clients.Clients. Many steps that only decode become one stretch of at most
REPORT_S, which ends with the step under way when something comes from outside. What a router hears of its tokens
between the first and the last is left out.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from cluster.simulation.engine import SimulatedEngine, Step, StepSeconds, step_work
from cluster.simulation.events import Events
from cluster.simulation.sequence import SimulatedSequence
from engine.backlog import REPORT_S, Backlog
from engine.kv.events import KvEvent
from engine.step_model import Calibration, StepModel, StepWork
from engine.wire import load_to_pb
from protos import worker_pb2 as pb

FIT_S = 1.0  # between two fits of a pool's step model

H = TypeVar("H")


@dataclass(frozen=True, slots=True)
class Client:
    """Who waits for a request: a router, and its name for the request on this worker."""

    router: int
    handle: int


@dataclass(slots=True)
class Said(Generic[H]):
    """What a frame says of one request, as pb.Output."""

    client: Client
    offer: H | None = None
    first_token: bool = False
    finished: bool = False
    handoff_done: bool = False
    failed: bool = False
    cached_tokens: int | None = None
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Frame(Generic[H]):
    worker_id: str
    load: pb.Load
    num_submits: int
    kv_event: KvEvent | None
    said: list[Said[H]]
    coming: list[int]


class Role(Protocol):
    def before_schedule(self) -> None: ...
    def before_run(self, step: Step) -> None: ...
    def computed(self, step: Step, began: float, now: float) -> None:
        """The KV of the step is in place, its tokens are not taken yet."""
        ...

    def token(self, sequence: SimulatedSequence) -> None: ...
    def add_load(self, load: pb.Load) -> None: ...


@dataclass(slots=True)
class PoolModel:
    """What the workers of a pool learn of their steps. They are alike, so they share one calibration, which is fitted
    seldom: a fit costs as much as a hundred simulated steps."""

    calibration: Calibration = field(default_factory=Calibration)
    model: StepModel | None = None
    next_fit: float = 0.0

    def observe(self, work: StepWork, seconds: float, now: float) -> None:
        self.calibration.observe(work, seconds)
        if now >= self.next_fit:
            self.model, self.next_fit = self.calibration.fit(), now + FIT_S


@dataclass(slots=True)
class _Stretch:
    """Steps alike, one after the other."""

    step: Step
    work: StepWork
    began: float
    seconds: float  # of each
    num_steps: int


class SimulatedWorker(Generic[H]):
    """`deliver` gets the number of a router and each frame to it when that is written."""

    def __init__(
        self,
        worker_id: str,
        role: str,
        engine: SimulatedEngine,
        seconds: StepSeconds,
        model: PoolModel,
        events: Events,
        num_routers: int,
        deliver: Callable[[int, Frame[H]], None],
    ) -> None:
        self.worker_id = worker_id
        self.role = role
        self.engine = engine
        self.busy_s = 0.0
        self.num_steps = 0
        self._seconds = seconds
        self._model = model
        self._events = events
        self._deliver = deliver
        self._behaviour: Role
        self._inbox: list[Callable[[], None]] = []
        self._stretch: _Stretch | None = None
        self._woken = False
        self._said: list[dict[int, Said[H]]] = [{} for _ in range(num_routers)]  # of each router, by handle
        self._num_submits = [0] * num_routers
        self._backlogs = [Backlog() for _ in range(num_routers)]
        self._will_look = False

    def behave(self, role: Role) -> None:
        self._behaviour = role

    def post(self, command: Callable[[], None]) -> None:
        """Let the loop run it between two steps."""
        self._inbox.append(command)
        stretch, now = self._stretch, self._events.now
        if stretch is None:
            if not self._woken:  # what comes at the same moment is taken together
                self._woken = True
                self._events.at(now, self._wake)
        elif stretch.num_steps > 1:
            num_done = min(stretch.num_steps, max(1, -int(-(now - stretch.began) // stretch.seconds)))
            if num_done < stretch.num_steps:
                shorter = self._stretch = _Stretch(stretch.step, stretch.work, stretch.began, stretch.seconds, num_done)
                self._events.at(max(now, stretch.began + num_done * stretch.seconds), self._end, shorter)

    def submitted(self, client: Client) -> None:
        self._num_submits[client.router] += 1

    def say(self, client: Client) -> Said[H]:
        """The draft of what the next frame says of a request."""
        drafts = self._said[client.router]
        said = drafts.get(client.handle)
        if said is None:
            said = drafts[client.handle] = Said(client)
        return said

    def _wake(self) -> None:
        self._woken = False
        if self._stretch is None:
            self._run()

    def _run(self) -> None:
        had_commands = bool(self._inbox)
        while self._inbox:
            commands, self._inbox = self._inbox, []
            for command in commands:
                command()
        self._behaviour.before_schedule()
        step = self.engine.plan()
        if step.work:
            self._start(step, alone=had_commands or bool(self._inbox))
        else:
            self._publish(self._events.now, changed=had_commands)
            if not self._will_look and any(backlog.changed for backlog in self._backlogs):
                self._will_look = True
                self._events.after(REPORT_S, self._look)

    def _look(self) -> None:
        """As an idle worker does now and then."""
        self._will_look = False
        if self._stretch is None:
            self._run()

    def _start(self, step: Step, *, alone: bool) -> None:
        """`alone`: report after one step what has come."""
        now = self._events.now
        self._behaviour.before_run(step)
        work = step_work(step, 1)
        seconds = self._seconds(work)
        self._publish(now + seconds, changed=alone)
        num_steps = 1 if alone or not seconds else self.engine.num_alike(step, max(1, int(REPORT_S / seconds)))
        if num_steps > 1:
            work = step_work(step, num_steps)
            seconds = self._seconds(work)
        stretch = self._stretch = _Stretch(step, work, now, seconds, num_steps)
        self._events.at(now + num_steps * seconds, self._end, stretch)

    def _end(self, stretch: _Stretch) -> None:
        if stretch is not self._stretch:
            return  # it was cut short
        self._stretch = None
        now, role = self._events.now, self._behaviour
        self.busy_s += stretch.seconds * stretch.num_steps
        self.num_steps += stretch.num_steps
        self._model.observe(stretch.work, stretch.seconds, now)
        sampled = self.engine.advance(stretch.step, stretch.num_steps)
        role.computed(stretch.step, stretch.began, now)
        for sequence in sampled:
            role.token(sequence)
        self._publish(None)
        self._run()

    def _publish(self, step_ends: float | None, *, changed: bool = True) -> None:
        """As Clients.flush."""
        kv, now = self.engine.kv, self._events.now
        events, coming = kv.drain_events(), kv.drain_coming()
        if len(self._backlogs) == 1:  # it knows what it has sent
            coming.clear()
        load: pb.Load | None = None
        for router, backlog in enumerate(self._backlogs):
            if changed or events or coming:
                backlog.add(events, now, coming)
            said = self._said[router]
            if said or (step_ends is not None and backlog.is_due(step_ends)):
                load = load or self.load()
                self._said[router] = {}
                coming_there, event = backlog.coming, backlog.told(now, reports=step_ends is not None)
                num_submits, words = self._num_submits[router], list(said.values())
                self._deliver(router, Frame(self.worker_id, load, num_submits, event, words, coming_there))

    def load(self) -> pb.Load:
        """As a frame reports it."""
        load = load_to_pb(self.engine.load(), self._model.model)
        self._behaviour.add_load(load)
        return load
