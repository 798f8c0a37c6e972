"""A dispatcher over real sessions to fake workers, all in the test's event loop."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from engine.request import Request, RequestId, SamplingParams
from router.admission import AdmissionConfig
from router.dispatcher import Dispatcher, DispatcherConfig
from router.flight import RetryConfig, Slo
from router.generation import NO_HINTS, RouteHints
from router.membership import Joined, Left
from router.placement import PlacementConfig
from router.policies import PrefixAware, RoutingPolicy
from router.session import SessionConfig
from router.stream import TokenStream
from tests.router.dispatch.fake_worker import FakeError, FakeWorker, Job, Signal, expected_tokens, serving

PROMPT = tuple(range(100, 180))
EXPECTED = expected_tokens(PROMPT, 12)


class Gate:
    """A hook that reports arrival and holds every job until opened."""

    def __init__(self, index: int | None = None) -> None:
        self.reached, self.opened, self._index = asyncio.Event(), asyncio.Event(), index

    async def __call__(self, job: Job) -> None:
        if self._index is None or job.index == self._index:
            self.reached.set()
            await self.opened.wait()


def fail_once(error: FakeError):
    errors = [error]

    async def hook(_job: Job) -> None:
        if errors:
            raise errors.pop()

    return hook


class QueueMembership:
    """Says what the test puts into it."""

    def __init__(self) -> None:
        self.changes: asyncio.Queue[Joined | Left] = asyncio.Queue()

    async def watch(self) -> AsyncIterator[Joined | Left]:
        while True:
            yield await self.changes.get()


class ObservedDispatcher(Dispatcher):
    """Notifies after everything it hears."""

    signal: Signal

    def session_reported(self, session) -> None:
        super().session_reported(session)
        self.signal.notify()

    def session_lost(self, session, reason) -> None:
        super().session_lost(session, reason)
        self.signal.notify()

    def flight_over(self, flight) -> None:
        super().flight_over(flight)
        self.signal.notify()


class Cluster:
    def __init__(self, dispatcher: ObservedDispatcher, membership: QueueMembership, signal: Signal) -> None:
        self.dispatcher, self.membership, self.signal = dispatcher, membership, signal
        self.workers: dict[str, FakeWorker] = {}

    def __getitem__(self, worker_id: str) -> FakeWorker:
        return self.workers[worker_id]

    def known(self, worker_id: str) -> dict | None:
        """What the dispatcher says of a worker."""
        return next((each for each in self.dispatcher.status()["workers"] if each["id"] == worker_id), None)

    def usable(self, worker_id: str) -> bool:
        known = self.known(worker_id)
        return known is not None and known["usable"]

    async def until_usable(self, *worker_ids: str) -> None:
        await self.signal.until(lambda: all(map(self.usable, worker_ids)))

    async def until_quiet(self) -> None:
        """No worker that is alive and running has anything left to do."""
        await self.signal.until(lambda: not any(worker.jobs for worker in self.workers.values()))
        assert [violation for worker in self.workers.values() for violation in worker.violations] == []
        queue = self.dispatcher.status()["queue"]
        assert (queue["waiting"], queue["running"]) == (0, 0)
        assert all(worker["requests"] == 0 for worker in self.dispatcher.status()["workers"])

    def start(
        self,
        *,
        prompt: tuple[int, ...] = PROMPT,
        timeout: float = 20.0,
        priority: int = 0,
        hints: RouteHints = NO_HINTS,
        **params,
    ) -> TokenStream:
        request = Request(
            id=RequestId("request"),
            token_ids=prompt,
            num_prompt_tokens=len(prompt),
            params=SamplingParams(**{"max_tokens": 12, **params}),
            seed=7,
            priority=priority,
        )
        return self.dispatcher.start(request, time.monotonic() + timeout, hints)


async def collect(stream: TokenStream) -> list[int]:
    return [token_id async for delta in stream for token_id in delta.token_ids]


@contextlib.asynccontextmanager
async def cluster(
    prefill: int = 2,
    decode: int = 2,
    *,
    policy: RoutingPolicy | None = None,
    silence_s: float = 1.0,
    stall_s: float = 10.0,
    admission: AdmissionConfig | None = None,
    no_worker_wait_s: float = 10.0,
    max_fruitless: int = 8,
    slo: Slo = Slo(),  # noqa: B008 - frozen
    worker_options: dict | None = None,
):
    """Workers p0.. and d0.., attached, and a dispatcher that disagrees with no default but the times."""
    signal, membership = Signal(), QueueMembership()
    ids = [f"p{i}" for i in range(prefill)] + [f"d{i}" for i in range(decode)]
    roles = {"p": "prefill", "d": "decode"}
    workers = [FakeWorker(each, roles[each[0]], signal, token="secret", **(worker_options or {})) for each in ids]
    config = DispatcherConfig(
        session=SessionConfig(silence_s=silence_s, stall_s=stall_s, min_backoff_s=0.02, max_backoff_s=0.1),
        placement=PlacementConfig(admission or AdmissionConfig()),
        retry=RetryConfig(max_fruitless=max_fruitless, backoff_s=0.01),
        slo=slo,
        no_worker_wait_s=no_worker_wait_s,
    )
    dispatcher = ObservedDispatcher(
        membership,
        policy or PrefixAware(local_prefill_max_tokens=64),
        config,
        model="model",
        token="secret",
        secret="",
        router_id="router",
        clock=time.monotonic,
    )
    dispatcher.signal = signal
    running = asyncio.create_task(dispatcher.run())
    result = Cluster(dispatcher, membership, signal)
    result.workers = {worker.id: worker for worker in workers}
    async with serving(*workers) as members:
        for member in members:
            membership.changes.put_nowait(member)
        try:
            await result.until_usable(*ids)
            yield result
        finally:
            await dispatcher.close()
            await running
