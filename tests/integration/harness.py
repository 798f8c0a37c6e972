"""A whole cluster inside one process: real engines, real streams, real transports, no HTTP and no registry.

What the integration tests compare token by token is what the processes of a deployment run; only the process
borders are missing (tests/integration/test_processes.py has those).
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from decode_workers.server import DecodeServer
from engine.executors.base import Executor
from engine.request import Request, RequestId, SamplingParams
from engine.scheduler import SchedulerConfig
from engine.server import WorkerIdentity
from kv_transfer.fingerprint import fingerprint
from kv_transfer.sink import SinkConfig
from kv_transfer.source import SourceConfig
from kv_transfer.transports.shared_memory import SharedMemoryServer, SharedMemorySink, host_boot_id
from kv_transfer.transports.tcp import TcpSink
from kv_transfer.transports.tcp_server import TcpServer
from prefill_workers.server import PrefillServer
from router.dispatcher import Dispatcher, DispatcherConfig
from router.generation import GenerationStream
from router.membership import Joined, Left
from router.policies import PrefixAware

MODEL = "model"
TIMEOUT_S = 60.0


@dataclass
class StaticMembership:
    """Everyone given at the start, then what `say` adds."""

    members: list[Joined]
    changes: "asyncio.Queue[Joined | Left]" = field(default_factory=asyncio.Queue)

    async def watch(self) -> AsyncIterator[Joined | Left]:
        for member in self.members:
            yield member
        while True:
            yield await self.changes.get()


@dataclass
class Cluster:
    prefill: list[PrefillServer]
    decode: list[DecodeServer]
    dispatcher: Dispatcher
    _ids: "itertools.count[int]" = field(default_factory=itertools.count)

    def start(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        seed: int = 0,
        cache_salt: str = "",
        tenant: str = "",
        timeout_s: float = TIMEOUT_S,
    ) -> GenerationStream:
        request = Request(
            id=RequestId(f"test-{next(self._ids)}"),
            token_ids=tuple(prompt),
            num_prompt_tokens=len(prompt),
            params=params,
            seed=seed,
            cache_salt=cache_salt,
            tenant=tenant,
        )
        return self.dispatcher.start(request, time.monotonic() + timeout_s)

    async def generate(self, prompt: Sequence[int], params: SamplingParams, **options: object) -> list[int]:
        stream = self.start(prompt, params, **options)  # type: ignore[arg-type]
        return [token_id for delta in [d async for d in stream] for token_id in delta.token_ids]

    async def quiesce(self) -> None:
        """Wait until no worker holds anything for a request, then prove that every block is accounted for."""
        async with asyncio.timeout(10):
            for server in (*self.prefill, *self.decode):
                while not is_idle(server):  # noqa: ASYNC110, a test that looks in from outside
                    await asyncio.sleep(0.01)
        for server in (*self.prefill, *self.decode):
            server.loop.engine.check_invariants()
            assert server.loop.engine.kv.num_free == server.loop.engine.kv.num_blocks


def is_idle(server: PrefillServer | DecodeServer) -> bool:
    load = server.loop.current_load()
    kv = server.loop.engine.kv
    return (
        not len(server.loop.clients)
        and load.num_running + load.num_waiting + load.num_handoffs == 0
        and kv.num_free == kv.num_blocks
    )


@asynccontextmanager
async def running_cluster(
    make_executor: Callable[[str], Executor],
    *,
    num_prefill: int = 1,
    num_decode: int = 1,
    transport: str = "shared_memory",
    prefill_tokens: int = 512,
    local_prefill_max_tokens: int = 0,
    scheduler: SchedulerConfig | None = None,
    source: SourceConfig | None = None,
    sink: SinkConfig | None = None,
    dispatcher: DispatcherConfig | None = None,
) -> AsyncIterator[Cluster]:
    """`make_executor(role)`: one for each worker. `prefill_tokens`: the step budget of the prefill workers."""
    prefill: list[PrefillServer] = []
    decode: list[DecodeServer] = []
    members: list[Joined] = []
    router: Dispatcher | None = None
    running: asyncio.Task[None] | None = None
    try:
        for index in range(num_prefill):
            executor = make_executor("prefill")
            identity = WorkerIdentity(f"prefill-{index}", "1", MODEL)
            server = (
                SharedMemoryServer(executor.memory)
                if transport == "shared_memory"
                else TcpServer(executor.memory, host="127.0.0.1", token="")
            )
            prefill.append(
                PrefillServer(
                    identity,
                    executor,
                    SchedulerConfig(max_batch_tokens=prefill_tokens, max_num_seqs=min(32, prefill_tokens)),
                    [server],
                    source or SourceConfig(),
                    fingerprint(executor.model_hash, [executor.layout], b""),
                    hash_secret="",
                )
            )
        for index in range(num_decode):
            executor = make_executor("decode")
            identity = WorkerIdentity(f"decode-{index}", "1", MODEL)
            decode.append(
                DecodeServer(
                    identity,
                    executor,
                    scheduler or SchedulerConfig(max_batch_tokens=512, max_num_seqs=32),
                    [SharedMemorySink(), TcpSink("")],
                    sink or SinkConfig(),
                    fingerprint(executor.model_hash, [executor.layout], b""),
                    boot_id=host_boot_id(),
                    hash_secret="",
                )
            )
        for role, servers in (("prefill", prefill), ("decode", decode)):
            for index, each in enumerate(servers):
                await each.start()
                members.append(Joined(f"{role}-{index}", role, each.address, 1))
        router = Dispatcher(
            StaticMembership(members),
            PrefixAware(local_prefill_max_tokens=local_prefill_max_tokens),
            dispatcher or DispatcherConfig(),
            token="",
            secret="",
            model=MODEL,
            router_id="test",
            clock=time.monotonic,
        )
        running = asyncio.create_task(router.run())
        async with asyncio.timeout(10):
            while sum(worker["usable"] for worker in router.status()["workers"]) < len(members):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        yield Cluster(prefill, decode, router)
    finally:
        if router is not None and running is not None:
            await router.close()
            await running
        for each in (*decode, *prefill):
            await each.stop()
