"""A simulation: the cluster of a setup, the requests of a trace, and what became of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from time import perf_counter

from cluster.simulation.decode import SimulatedDecode
from cluster.simulation.engine import SimulatedEngine, StepSeconds
from cluster.simulation.events import Events
from cluster.simulation.handoff import Handoff
from cluster.simulation.prefill import SimulatedPrefill
from cluster.simulation.router import Cluster, Outcome, SimulatedFlight, SimulatedRouter
from cluster.simulation.trace import Trace, arrivals
from cluster.simulation.transfer import TransferSpeed
from cluster.simulation.worker import Frame, PoolModel, SimulatedWorker
from engine.scheduler import SchedulerConfig
from kv_transfer.lease import LeaseTable
from protos import worker_pb2 as pb
from router.cluster_view import DECODE, PREFILL
from router.placement import Placement, PlacementConfig
from router.policies import RoutingPolicy

NUM_SAMPLES = 240  # of the load, over the time of the arrivals
MIN_SAMPLE_S = 0.05
MAX_LEASES = 1024
MAX_LEASE_S = 600.0


@dataclass(frozen=True, slots=True)
class PoolSetup:
    """`role` is prefill or decode; `seconds` is the measured time of a step; `gpus` of each worker. `max_model_len`
    None: what its blocks hold."""

    role: str
    num_workers: int
    num_blocks: int
    block_size: int
    scheduler: SchedulerConfig
    seconds: StepSeconds
    gpus: int = 1
    max_model_len: int | None = None

    @property
    def max_len(self) -> int:
        """Of a prompt with its answer, in tokens."""
        in_blocks = self.num_blocks * self.block_size
        return min(in_blocks, self.max_model_len or in_blocks)


@dataclass(frozen=True, slots=True)
class Setup:
    """`network_s` is the delay of each message between a router and a worker. `policy` makes one for each router.

    `ttft_s` and `tpot_s` are limits that routers know of: they refuse what they expect to miss them. None: they refuse
    nothing for that.
    """

    pools: Sequence[PoolSetup]
    policy: Callable[[], RoutingPolicy]
    speed: TransferSpeed
    kv_bytes_per_token: int
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    ttft_s: float | None = None
    tpot_s: float | None = None
    num_routers: int = 1
    network_s: float = 0.0005
    lease_s: float = 30.0

    @property
    def max_len(self) -> int:
        """Of a prompt with its answer, in tokens: longer ones are refused, as the router's front does."""
        return min(pool.max_len for pool in self.pools if pool.num_workers)


@dataclass(frozen=True, slots=True)
class Sample:
    """The load at one time."""

    seconds: float
    num_waiting: int  # in the routers
    num_prefilling: int  # in prefill workers, waiting or running
    num_decoding: int  # in decode workers, likewise


@dataclass(frozen=True, slots=True)
class Result:
    outcomes: Sequence[Outcome]
    samples: Sequence[Sample]
    decision_s: Sequence[float]  # of real time
    busy_s: dict[str, float]  # by role, of all workers together
    num_steps: dict[str, int]
    seconds: float  # of the simulation, until the last request was over
    wall_s: float
    setup: Setup


class Simulation:
    """`run` once."""

    def __init__(
        self,
        setup: Setup,
        trace: Trace,
        *,
        seed: int = 0,
        rate_scale: float = 1.0,
        watch: Callable[[Outcome], bool] | None = None,
    ) -> None:
        """`watch` hears of each request that is over; False ends the simulation early."""
        self._setup = setup
        self._trace = trace
        self._times = arrivals(trace, seed, rate_scale)
        self._max_output_tokens = trace.max_output_tokens
        self._random = Random(f"routers {seed}")
        self._watch = watch
        self._stopped = False
        self._events = Events()
        self._models: dict[int, PoolModel] = {}
        self._outcomes: list[Outcome] = []
        self._samples: list[Sample] = []
        self._num_over = 0
        self._finished_at = 0.0
        self.cluster = Cluster({}, {}, {})
        descriptions = [self._add_worker(pool, index) for pool in setup.pools for index in range(pool.num_workers)]
        self._routers = [
            SimulatedRouter(
                number,
                Placement(setup.policy(), setup.placement, self._events.clock),
                self.cluster,
                descriptions,
                self._events,
                setup.network_s,
                self._over,
            )
            for number in range(setup.num_routers)
        ]

    def run(self) -> Result:
        began, events = perf_counter(), self._events
        self._arrive(0)
        self._sample(max(MIN_SAMPLE_S, max(self._times, default=0.0) / NUM_SAMPLES))
        while self._num_over < len(self._times) and not self._stopped and events.step():
            pass
        assert self._stopped or self._num_over == len(self._times), "requests are left and nothing happens any more"
        self._finished_at = events.now
        while not self._stopped and events.step():  # acks on their way, leases given back
            pass
        return self._result(perf_counter() - began)

    def check_invariants(self) -> None:
        """Assert that every block is where it should be, and that at the end nobody holds any."""
        for worker_id, worker in self.cluster.workers.items():
            prefill, decode = self.cluster.prefill.get(worker_id), self.cluster.decode.get(worker_id)
            worker.engine.check_invariants(prefill.leased_blocks if prefill else decode.pulled_blocks if decode else ())

    def _arrive(self, number: int) -> None:
        if number >= len(self._times):
            return
        request = self._trace.requests[number]
        now = self._times[number]

        def arrive() -> None:
            sizes = (request.num_prompt_tokens, request.num_output_tokens)
            outcome = Outcome(number, *sizes, now, hints=request.hints)
            self._outcomes.append(outcome)
            setup = self._setup
            max_new_tokens = min(self._max_output_tokens, setup.max_len - request.num_prompt_tokens)
            limits = (
                _stricter(setup.ttft_s, request.hints.slo_ttft_ms),
                _stricter(setup.tpot_s, request.hints.slo_tpot_ms),
            )
            flight = SimulatedFlight(request, outcome, max_new_tokens, *limits)
            router = self._routers[self._random.randrange(len(self._routers))]
            if request.num_tokens <= setup.max_len:
                router.arrive(flight)
            else:
                outcome.refused = f"prompt and answer are longer than {setup.max_len:,} tokens"
                self._over(flight)
            self._arrive(number + 1)

        self._events.at(now, arrive)

    def _over(self, flight: SimulatedFlight) -> None:
        flight.all_hashes.clear()
        self._num_over += 1
        if self._watch is not None and not self._watch(flight.outcome):
            self._stopped = True

    def _sample(self, interval: float) -> None:
        workers = self.cluster.workers.values()
        self._samples.append(
            Sample(
                self._events.now,
                sum(router.num_waiting for router in self._routers),
                sum(each.engine.num_sequences for each in workers if each.role == PREFILL),
                sum(each.engine.num_sequences for each in workers if each.role == DECODE),
            )
        )
        if self._num_over < len(self._times) and not self._events.idle:
            self._events.after(interval, self._sample, interval)

    def _add_worker(self, pool: PoolSetup, index: int) -> pb.Description:
        setup, events, worker_id = self._setup, self._events, f"{pool.role}-{index}"
        engine = SimulatedEngine(pool.num_blocks, pool.block_size, pool.max_len, pool.scheduler)
        model = self._models.setdefault(id(pool), PoolModel())
        worker: SimulatedWorker[Handoff] = SimulatedWorker(
            worker_id, pool.role, engine, pool.seconds, model, events, setup.num_routers, self._deliver
        )
        self.cluster.workers[worker_id] = worker
        if pool.role == PREFILL:
            leases = LeaseTable(lease_s=setup.lease_s, max_lease_s=MAX_LEASE_S, max_leases=MAX_LEASES)
            prefill = SimulatedPrefill(worker, leases, setup.lease_s, setup.network_s, events)
            self.cluster.prefill[worker_id] = prefill
            worker.behave(prefill)
        else:
            decode = SimulatedDecode(worker, pool.scheduler.max_num_seqs, setup.speed, setup.kv_bytes_per_token, events)
            self.cluster.decode[worker_id] = decode
            worker.behave(decode)
        return pb.Description(
            worker_id=worker_id,
            role=pool.role,
            fingerprint="simulated",
            block_size=pool.block_size,
            num_blocks=pool.num_blocks,
            max_model_len=pool.max_len,
            max_num_seqs=pool.scheduler.max_num_seqs,
            max_batch_tokens=pool.scheduler.max_batch_tokens,
        )

    def _deliver(self, router: int, frame: Frame[Handoff]) -> None:
        self._events.after(self._setup.network_s, self._receive, router, frame)

    def _receive(self, router: int, frame: Frame[Handoff]) -> None:
        self._routers[router].receive(frame)

    def _result(self, wall_s: float) -> Result:
        busy_s, num_steps = {PREFILL: 0.0, DECODE: 0.0}, {PREFILL: 0, DECODE: 0}
        for worker in self.cluster.workers.values():
            busy_s[worker.role] += worker.busy_s
            num_steps[worker.role] += worker.num_steps
        decision_s = [seconds for router in self._routers for seconds in router.decision_s]
        return Result(
            self._outcomes, self._samples, decision_s, busy_s, num_steps, self._finished_at, wall_s, self._setup
        )


def _stricter(limit_s: float | None, own_ms: float | None) -> float | None:
    """In seconds."""
    own_s = None if own_ms is None else own_ms / 1e3
    return min((each for each in (limit_s, own_s) if each is not None), default=None)
