"""The simulated router alone: a test says what workers tell it, and sees what it asks of them."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from cluster.simulation.events import Events
from cluster.simulation.router import MAX_FRUITLESS, Cluster, Outcome, SimulatedFlight, SimulatedRouter
from cluster.simulation.trace import Hints
from cluster.simulation.worker import Frame, Said
from engine.wire import model_to_pb
from protos import worker_pb2 as pb
from router.placement import Placement, PlacementConfig
from router.policies import PrefixAware
from tests.cluster.simulation.small import BLOCK, MODEL, NETWORK_S, request
from tests.router.dispatch.workers import described


class Worker:
    """As a SimulatedWorker and its role. What it is asked for happens at once; it reports always the same."""

    def __init__(self, worker_id: str, **load: int) -> None:
        self.worker_id = worker_id
        self.engine = SimpleNamespace(kv=SimpleNamespace(block_size=BLOCK))
        self.clients: list[Any] = []
        self.cancelled: list[str] = []
        self._load = pb.Load(num_free_blocks=64, model=model_to_pb(MODEL), **load)

    def post(self, command: Callable[[], None]) -> None:
        command()

    def submit(self, client: Any, *_: object) -> None:
        self.clients.append(client)

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def load(self) -> pb.Load:
        return self._load


class Router:
    """With the first worker of each kind idle and the second one busy, and one request."""

    def __init__(self, **limits: float) -> None:
        self.events = Events()
        busy = {"prefill": {"queue_us": 10_000}, "decode": {"num_running": 2}}
        self.workers = {
            f"{role}-{index}": Worker(f"{role}-{index}", **(load if index else {}))
            for role, load in busy.items()
            for index in range(2)
        }
        sizes = {"block_size": BLOCK, "num_blocks": 64, "max_num_seqs": 8, "max_batch_tokens": 1024}
        descriptions = [described(worker_id, **sizes) for worker_id in self.workers]
        workers: Any = self.workers
        placement: Placement[SimulatedFlight] = Placement(
            PrefixAware(local_prefill_max_tokens=0), PlacementConfig(), self.events.clock
        )
        self.over: list[SimulatedFlight] = []
        self.router = SimulatedRouter(
            0,
            placement,
            Cluster(workers, workers, workers),
            descriptions,
            self.events,
            NETWORK_S,
            self.over.append,
        )
        self.outcome = Outcome(0, 1000, 50, 0.0)
        self.flight = SimulatedFlight(request(0, 0.0, 1000, 50), self.outcome, 50, **limits)
        self.router.arrive(self.flight)
        self.settle()

    @property
    def placed_on(self) -> tuple[str | None, str]:
        return self.outcome.prefill_worker, self.outcome.decode_worker

    def settle(self) -> None:
        while self.events.step():
            pass

    def hear(self, **said: Any) -> None:
        """From the prefill worker of this attempt."""
        worker = self.workers[self.outcome.prefill_worker or ""]
        self.router.receive(Frame(worker.worker_id, worker.load(), 0, None, [Said(worker.clients[-1], **said)], []))
        self.settle()


def test_a_failed_prefill_is_taken_from_the_decode_worker_and_tried_on_others() -> None:
    it = Router()
    assert it.placed_on == ("prefill-0", "decode-0")
    it.hear(failed=True)
    assert [worker.cancelled for worker in it.workers.values()] == [[], [], ["0.1"], []]
    assert it.placed_on == ("prefill-1", "decode-1")
    it.hear(failed=True)
    assert it.placed_on == ("prefill-0", "decode-0")  # only those of the last attempt are left out


def test_attempts_that_add_no_token_are_counted_from_the_last_one_that_did() -> None:
    it = Router()
    for _ in range(MAX_FRUITLESS - 1):
        it.hear(failed=True)
    it.hear(first_token=True)
    for _ in range(MAX_FRUITLESS):
        assert it.outcome.refused == ""
        it.hear(failed=True)
    assert it.outcome.refused == ""
    it.hear(failed=True)
    assert (it.outcome.refused, it.outcome.num_attempts) == ("attempts failed", 2 * MAX_FRUITLESS)
    assert it.over == [it.flight]


def test_a_request_that_has_begun_is_tried_again_even_if_it_is_late() -> None:
    it = Router(ttft_s=0.5, tpot_s=1.0)
    it.events.now = 1.0
    it.hear(failed=True)
    assert (it.outcome.num_attempts, it.outcome.refused) == (2, "")
    assert (it.flight.facts().ttft_s, it.flight.facts().tpot_s) == (None, None)


def test_cached_tokens_are_those_of_the_first_attempt() -> None:
    it = Router()
    it.hear(cached_tokens=128)
    it.hear(failed=True)
    it.hear(cached_tokens=512)
    assert it.outcome.cached_tokens == 128


def test_a_placement_hears_what_the_client_said() -> None:
    trace = replace(request(0, 0.0, 1000, 50), hints=Hints("s", "t", -3))
    facts = SimulatedFlight(trace, Outcome(0, 1000, 50, 0.0), 50).facts()
    assert (facts.session, facts.tenant, facts.priority) == ("s", "t", -3)
