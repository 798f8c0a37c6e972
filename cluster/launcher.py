"""A whole cluster as processes of this machine: one per router and worker, each started by its command line.

Life: prepare the run directory, start all processes, wait until the router has attached every worker, supervise, stop.
What the processes read is the spec in effect, written to the run directory.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import httpx
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cluster.addresses import free_port, loopback_host
from cluster.checkpoint import model_config, resolve_model
from cluster.credentials import check_secrets, read_api_keys
from cluster.devices import GPU_MEMORY_FRACTION, visible_gpus, workers_per_gpu
from cluster.process import Command, ending, last_lines
from cluster.registry.file_store import clear_leases
from cluster.registry.open import lease_directory, open_registry
from cluster.run_dir import locked, prepare_run_dir, with_run_dir
from cluster.spec import ROLES, ClusterSpec, Role, threads_per_worker, worker_id
from cluster.spec_errors import SpecError
from cluster.spec_file import save_spec
from cluster.supervisor import GRACE_S, ClusterFailed, Ended, Supervisor
from router.membership import Joined

START_TIMEOUT_S = 1800.0  # loading a large checkpoint from a slow disk
READY_INTERVAL_S = 0.1
ATTACH_S = 10.0  # for the router to attach all workers, once all have joined
SPEC_NAME = "spec-in-effect.yaml"
PROGRAM = (sys.executable, "-m", "baton")
# glibc's malloc then asks for huge pages: to a prefix index of 10 M blocks they are worth a tenth of its time.
ROUTER_ENVIRON = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def on_this_machine(spec: ClusterSpec, environ: Mapping[str, str]) -> ClusterSpec:
    """The spec in effect: what it leaves open for one machine is decided. Raises SpecError."""
    check_secrets(spec)
    for role in ROLES:
        pool = spec.pool(role)
        if pool.port and pool.replicas > 1:
            raise SpecError(
                [f"{role}.port: {pool.port} is not allowed with {pool.replicas} workers on one machine; allowed: 0"]
            )
    if spec.router.port == 0:
        router = spec.router.model_copy(update={"port": free_port(spec.router.host)})
        spec = spec.model_copy(update={"router": router})
    # Before any process starts, so that a hub id is downloaded once and a wrong one is refused at once.
    model = {"model": str(resolve_model(spec.model, spec.load)), "served_model_name": spec.public_model_name}
    spec = spec.model_copy(update=model)
    if spec.engine == "torch":
        positions = model_config(spec.model, spec.load).max_position_embeddings
        if (spec.max_model_len or 0) > positions:
            raise SpecError(
                [f"max_model_len: {spec.max_model_len} is not allowed with this model; allowed: at most {positions}"]
            )
    return with_run_dir(_with_gpus_shared(spec, visible_gpus(environ)), environ)


def _with_gpus_shared(spec: ClusterSpec, gpus: Sequence[str]) -> ClusterSpec:
    """The spec with each worker's share of its GPU, which a worker cannot know by itself. Raises SpecError."""
    names = _gpu_workers(spec)
    if not names:
        return spec
    fraction = spec.gpu_memory_fraction or round(GPU_MEMORY_FRACTION / workers_per_gpu(len(names), gpus), 4)
    spec = spec.model_copy(update={"gpu_memory_fraction": fraction})
    taken: dict[str, float] = {}
    for name, gpu in gpu_of_worker(spec, gpus).items():
        taken[gpu] = taken.get(gpu, 0.0) + (spec.pool(names[name]).gpu_memory_fraction or fraction)
    for gpu, share in taken.items():
        if share > 1:
            raise SpecError([f"gpu_memory_fraction: {share:.2f} in all for the workers on GPU {gpu}; allowed: up to 1"])
    return spec


def _gpu_workers(spec: ClusterSpec) -> dict[str, Role]:
    """Names of the workers that compute on GPUs where there are some, with their roles."""
    return {
        worker_id(role, index): role
        for role in ROLES
        if "cuda" in spec.possible_devices(role)
        for index in range(spec.pool(role).replicas)
    }


def gpu_of_worker(spec: ClusterSpec, gpus: Sequence[str]) -> dict[str, str]:
    """Worker k gets GPU k modulo their number; nobody gets one where none is known."""
    return {name: gpus[k % len(gpus)] for k, name in enumerate(_gpu_workers(spec)) if gpus}


def router_url(spec: ClusterSpec) -> str:
    """Where a client on this machine reaches the router."""
    host = loopback_host(spec.router.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{spec.router.port}"


def commands(
    spec: ClusterSpec, spec_path: Path, environ: Mapping[str, str], program: Sequence[str] = PROGRAM
) -> list[Command]:
    """The processes of a cluster, router first."""
    num_cores = len(os.sched_getaffinity(0))
    gpus = gpu_of_worker(spec, visible_gpus(environ))

    def command(name: str, role: str, index: int, threads: int) -> Command:
        argv = (*program, role, "--spec", str(spec_path), "--index", str(index))
        # The libraries below torch read this once, when they are loaded.
        settings = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        if name in gpus:
            settings["CUDA_VISIBLE_DEVICES"] = gpus[name]
        defaults = ROUTER_ENVIRON if role == "router" else {}
        return Command(name, argv, {**defaults, **environ, **settings}, spec_path.parent / "logs" / f"{name}.log")

    workers = [
        command(worker_id(role, index), role, index, threads_per_worker(spec, role, num_cores))
        for role in ROLES
        for index in range(spec.pool(role).replicas)
    ]
    return [command("router", "router", 0, 1), *workers]


class LocalCluster:
    """`async with LocalCluster(spec) as cluster` gives a cluster that serves at `cluster.url`.

    Entering raises SpecError for a spec that cannot be used here and ClusterFailed when a process ends or `timeout_s`
    passes before everything is ready. `report` is told of processes that end later; they are started again.
    """

    def __init__(
        self,
        spec: ClusterSpec,
        *,
        progress: bool = False,
        report: Callable[[Ended], None] = lambda ended: print(ended, file=sys.stderr),
        environ: Mapping[str, str] = os.environ,  # what children inherit, and where the run directory may be named
        program: Sequence[str] = PROGRAM,
        timeout_s: float = START_TIMEOUT_S,
        grace_s: float = GRACE_S,
    ) -> None:
        self.spec = on_this_machine(spec, environ)
        self.url = router_url(self.spec)
        self.run_dir = Path(self.spec.run_dir or "")
        self._progress = progress
        self._report = report
        self._commands = commands(self.spec, self.run_dir / SPEC_NAME, environ, program)
        self._timeout_s = timeout_s
        self._grace_s = grace_s
        self._exits = AsyncExitStack()
        self._ended_early: asyncio.Future[Ended] | None = None
        self._supervisor: Supervisor | None = None

    @property
    def pids(self) -> dict[str, int]:
        """Of the processes that run now, by name: router, prefill-0, decode-0 and so on."""
        return dict(self._supervisor.pids) if self._supervisor else {}

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as exits:
            prepare_run_dir(self.run_dir)
            exits.enter_context(locked(self.run_dir))
            self._ended_early = asyncio.get_running_loop().create_future()
            self._write_run_dir()
            # The router first: what it has taken needs the workers until it ends.
            stages = (self._commands[:1], self._commands[1:])
            self._supervisor = Supervisor(stages, self._ended, grace_s=self._grace_s)
            await exits.enter_async_context(self._supervisor)
            await self._until_ready(self._ended_early)
            self._ended_early = None
            self._exits = exits.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._exits.aclose()

    async def wait(self) -> None:
        """Return when the user (SIGINT) or the system (SIGTERM) asks this process to stop."""
        asked, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, asked.set)
        try:
            await asked.wait()
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _write_run_dir(self) -> None:
        """Write the spec in effect, and remove the logs and leases of an earlier cluster; other files stay."""
        (self.run_dir / "logs").mkdir(mode=0o700, exist_ok=True)
        for command in self._commands:
            if command.log is not None:
                command.log.unlink(missing_ok=True)
        if self.spec.registry == "file":
            clear_leases(lease_directory(self.spec))
        save_spec(self.spec, self.run_dir / SPEC_NAME)

    def _ended(self, ended: Ended) -> None:
        if self._ended_early is None:
            self._report(ended)
        elif not self._ended_early.done():
            self._ended_early.set_result(ended)

    async def _until_ready(self, ended_early: asyncio.Future[Ended]) -> None:
        """Raises ClusterFailed as soon as a process ends."""
        with _display(self._progress, [command.name for command in self._commands]) as done:
            ready = asyncio.create_task(self._ready(done))
            try:
                first: set[asyncio.Future[Any]] = {ready, ended_early}
                await asyncio.wait(first, timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not ready.done():
                    ready.cancel()
                    await asyncio.gather(ready, return_exceptions=True)
        if ended_early.done():
            ended = ended_early.result()
            raise ClusterFailed(
                f"{ended.command.name} {ending(ended.status)} while starting. "
                f"The end of its log, {ended.command.log}:\n{last_lines(ended.command.log)}"
            )
        if ready.cancelled():
            raise ClusterFailed(
                f"the cluster was not ready after {self._timeout_s:.0f} s; logs: {self.run_dir / 'logs'}"
            )
        ready.result()

    async def _ready(self, done: Callable[[str], None]) -> None:
        workers = {str(worker_id(role, index)) for role in ROLES for index in range(self.spec.pool(role).replicas)}
        missing = set(workers)
        registry = open_registry(self.spec)
        try:
            async with contextlib.aclosing(registry.watch()) as events:
                async for event in events:
                    if isinstance(event, Joined) and event.worker_id in missing:
                        missing.remove(event.worker_id)
                        done(event.worker_id)
                    if not missing:
                        break
        finally:
            await registry.aclose()
        api_keys, loop = read_api_keys(self.spec), asyncio.get_running_loop()
        headers, late_at = {"Authorization": f"Bearer {api_keys[0]}"} if api_keys else {}, loop.time() + ATTACH_S
        async with httpx.AsyncClient(timeout=5, trust_env=False, headers=headers) as client:
            while True:
                ready, num_usable = await _router_status(client, f"{self.url}/status")
                # One that cannot be attached (its log says why) keeps nobody else from serving.
                if ready and (num_usable == len(workers) or loop.time() > late_at):
                    break
                await asyncio.sleep(READY_INTERVAL_S)  # nothing would tell when, and it is only at start
        done("router")


async def _router_status(client: httpx.AsyncClient, url: str) -> tuple[bool, int]:
    """Whether it is ready, and how many workers it may use."""
    try:
        status = (await client.get(url)).raise_for_status().json()
    except (httpx.HTTPError, ValueError):
        return False, 0
    return status["ready"], sum(worker["usable"] for worker in status["workers"])


@contextmanager
def _display(shown: bool, names: Sequence[str]) -> Iterator[Callable[[str], None]]:
    """Show how far each process is; the function given marks one as ready."""
    columns = (SpinnerColumn(finished_text="[green]✓"), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        tasks = {name: progress.add_task(f"{name} is starting", total=1) for name in names}

        def done(name: str) -> None:
            progress.update(tasks[name], completed=1, description=f"{name} is ready")

        yield done
