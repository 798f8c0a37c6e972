"""What each process is composed of: from a spec to running objects, each given only what it needs.

The only place that sees the spec, the registry, the executors, the transports and the roles at once.
"""

import asyncio
import gc
import logging
import os
import sys
import time
from pathlib import Path

import uvloop

from baton.descriptors import allow_descriptors
from baton.device import find_device
from baton.signals import DRAIN_GRACE_S, stop_signals
from baton.step_profiles import load_profile
from baton.tokenizer import checkpoint_tokenizer
from baton.transports import server_transports, sink_transports
from cluster.addresses import reachable_host
from cluster.checkpoint import model_config, resolve_model, spec_errors
from cluster.credentials import read_api_keys, read_token
from cluster.devices import GPU_MEMORY_FRACTION, HOST_KV_BYTES, FoundDevice, profiled_device, visible_gpus
from cluster.registry.base import WorkerRecord
from cluster.registry.open import open_registry
from cluster.routing import make_policy, placement_config
from cluster.spec import ClusterSpec, PoolSettings, Role, check_device, threads_per_worker, worker_id
from cluster.spec_errors import SpecError
from decode_workers.server import DecodeServer
from engine.executors.base import Executor
from engine.scheduler import SchedulerConfig
from engine.server import WorkerIdentity
from kv_transfer.fingerprint import fingerprint
from kv_transfer.sink import SinkConfig
from kv_transfer.source import SourceConfig
from kv_transfer.transports.shared_memory import host_boot_id
from prefill_workers.server import PrefillServer
from router.dispatcher import Dispatcher, DispatcherConfig
from router.flight import Slo
from router.generation import ModelCard
from router.http import Front, FrontConfig
from router.metrics import Metrics
from router.server import ServerConfig, serve
from router.shared_metrics import SharedMetrics

log = logging.getLogger(__name__)


def found_pool(spec: ClusterSpec, role: Role) -> PoolSettings:
    """The pool on the device that this process has, or that its profile is of. Raises SpecError for what that device
    cannot do."""
    auto: FoundDevice = "cpu"
    if "cuda" in (devices := spec.possible_devices(role)):
        auto = find_device("auto" if "cpu" in devices else "cuda")
        if auto == "cpu" and (gpus := visible_gpus(os.environ)):
            log.warning("%s computes on the CPU: PyTorch sees none of the GPUs %s", role, ", ".join(gpus))
    elif spec.simulated.profile is not None and spec.pool(role).engine == "simulated":
        auto = profiled_device(load_profile(spec.simulated.profile).measured.device)
    pool = spec.pool(role, auto)
    if problems := list(check_device(spec, pool)):
        raise SpecError(problems)
    return pool


def make_executor(spec: ClusterSpec, pool: PoolSettings) -> Executor:
    """Loads the model: seconds to minutes, and most of the process's memory."""
    if pool.engine == "simulated":
        from engine.executors.simulated import SimulatedConfig, SimulatedExecutor

        simulated = spec.simulated
        profile = load_profile(simulated.profile) if simulated.profile else None
        num_tokens = profile.kv_tokens(pool.kv_memory) if profile else None
        num_blocks = num_tokens // pool.block_size if num_tokens else (pool.kv_memory or HOST_KV_BYTES) // 4096
        return SimulatedExecutor(
            SimulatedConfig(
                **simulated.model_dump(exclude={"max_model_len", "profile"}),
                profile=profile,
                max_model_len=spec.max_model_len or simulated.max_model_len,
                block_size=pool.block_size,
                num_blocks=pool.num_blocks or num_blocks,
            ),
            time.sleep,
            time.monotonic if simulated.profile else None,
        )
    from baton.segments import segment_loader
    from engine.executors.torch_executor import TorchConfig, TorchExecutor

    num_threads = threads_per_worker(spec, pool.role, os.cpu_count() or 1)
    load_segments = segment_loader(spec, pool, num_threads)
    config = TorchConfig(
        device=pool.device,
        load=spec.load,
        dtype=spec.dtype,
        quantization=spec.quantization,
        block_size=pool.block_size,
        num_blocks=pool.num_blocks,
        kv_memory=pool.kv_memory,
        kv_dtype=pool.kv_dtype,
        gpu_memory_fraction=pool.gpu_memory_fraction or GPU_MEMORY_FRACTION,
        max_model_len=spec.max_model_len,
        max_batch_tokens=pool.max_batch_tokens,
        max_num_seqs=pool.max_num_seqs,
        num_threads=num_threads,
        max_call_tokens=spec.tensorrt.max_tokens,
    )
    with spec_errors():
        return TorchExecutor(resolve_model(spec.model, spec.load), config, load_segments=load_segments)


def scheduler_config(pool: PoolSettings) -> SchedulerConfig:
    return SchedulerConfig(max_batch_tokens=pool.max_batch_tokens, max_num_seqs=pool.max_num_seqs)


async def run_router(
    spec: ClusterSpec, *, index: int = 0, process: int | None = None, metrics_dir: Path | None = None
) -> None:
    """Serve HTTP until SIGTERM or SIGINT, then let running requests finish.

    `process` numbers the processes that share the router's port, and their metrics in `metrics_dir`; None: this one
    has it alone.
    """
    with spec_errors():
        tokenizer = checkpoint_tokenizer(resolve_model(spec.model, spec.load), spec.load)
    token, api_keys = read_token(spec), read_api_keys(spec)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # texts come one at a time: threads only cost
    registry = open_registry(spec)
    dispatcher = Dispatcher(
        registry,
        make_policy(spec.router),
        DispatcherConfig(
            placement=placement_config(spec.router),
            slo=Slo(spec.router.slo.ttft_s, spec.router.slo.tpot_s),
        ),
        model=spec.public_model_name,
        token=token,
        secret=token,
        router_id=f"router-{index}" if process is None else f"router-{index}.{process}",
        clock=time.monotonic,
    )
    metrics = Metrics(spec.public_model_name, dispatcher)
    shared = SharedMetrics(metrics, metrics_dir, process) if process is not None and metrics_dir is not None else None
    front = Front(
        dispatcher,
        model_card(spec),
        tokenizer,
        metrics,
        FrontConfig(
            max_body_bytes=spec.router.max_body_bytes,
            request_timeout_s=spec.router.request_timeout_s,
            stream_interval=spec.router.stream_interval,
            api_keys=api_keys,
        ),
        status=dispatcher.status,
        scrape=None if shared is None else shared.snapshot,
    )
    running = asyncio.create_task(dispatcher.run())
    writing = asyncio.create_task(shared.keep_writing()) if shared is not None else None
    try:
        with stop_signals() as stop:
            running.add_done_callback(lambda _task: stop.set())  # a router without its dispatcher is no use
            limits = ServerConfig(
                drain_s=DRAIN_GRACE_S, max_descriptors=allow_descriptors(), share_port=process is not None
            )
            _settle_memory()
            _settle_threads()
            await serve(front, spec.router.host, spec.router.port, stop=stop, give_up=dispatcher.close, config=limits)
    finally:
        if writing is not None:
            writing.cancel()
        await dispatcher.close()
        front.close()
        await registry.aclose()
    running.result()


def _settle_threads() -> None:
    """A thread that works gives the interpreter to the loop, which has streams to write, after a millisecond."""
    sys.setswitchinterval(0.001)


def _settle_memory() -> None:
    """What is loaded by now stays, and what requests allocate is free of cycles: collections need not look at the one,
    nor come after every few requests for the other. They would hold up every stream, for 0.1 s with PyTorch loaded."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def model_card(spec: ClusterSpec) -> ModelCard:
    """What the HTTP front says and checks of the model; the workers have the last word."""
    if spec.engine == "simulated":
        simulated = spec.simulated
        max_model_len = spec.max_model_len or simulated.max_model_len
        return ModelCard(spec.public_model_name, simulated.vocab_size, max_model_len, ())
    config = model_config(spec.model, spec.load)
    max_model_len = spec.max_model_len or config.max_position_embeddings
    return ModelCard(spec.public_model_name, config.vocab_size, max_model_len, config.eos_token_ids)


def run_worker(spec: ClusterSpec, role: Role, *, index: int) -> None:
    """Serve one worker until SIGTERM or SIGINT, then drain. Raises RuntimeError when its engine ends by itself."""
    allow_descriptors()
    pool = found_pool(spec, role)
    executor = make_executor(spec, pool)  # before the loop, for it blocks for as long as loading takes
    uvloop.run(_serve_worker(spec, pool, executor, index))


async def _serve_worker(spec: ClusterSpec, pool: PoolSettings, executor: Executor, index: int) -> None:
    role = pool.role
    identity = WorkerIdentity(
        worker_id=worker_id(role, index),
        epoch=str(time.time_ns()),
        model=spec.public_model_name,
        bind_host=pool.host,
        advertise_host=reachable_host(pool.host),
        port=pool.port,
        token=read_token(spec),
    )
    make_server = _prefill_server if role == "prefill" else _decode_server
    server = make_server(spec, pool, identity, executor)
    registry = open_registry(spec)
    record = WorkerRecord(worker_id(role, index), role, server.address, int(identity.epoch), spec.public_model_name)
    try:
        await server.start()
        _settle_memory()
        with stop_signals() as stop:
            async with registry.register(record):
                log.info("%s serves %s at %s", record.worker_id, record.model, record.address)
                ended = asyncio.create_task(server.thread.wait())
                asked = asyncio.create_task(stop.wait())
                await asyncio.wait({ended, asked}, return_when=asyncio.FIRST_COMPLETED)
                asked.cancel()
                if ended.done():
                    raise RuntimeError("the engine's loop has ended; its error is above")
                ended.cancel()
                await server.thread.drain(DRAIN_GRACE_S)
    finally:
        await server.stop()
        await registry.aclose()


def _prefill_server(
    spec: ClusterSpec, pool: PoolSettings, identity: WorkerIdentity, executor: Executor
) -> PrefillServer:
    return PrefillServer(
        identity,
        executor,
        scheduler_config(pool),
        server_transports(spec, pool, identity, executor),
        SourceConfig(lease_s=spec.transfer.lease_s),
        _fingerprint(executor, identity),
        hash_secret=identity.token,
    )


def _decode_server(spec: ClusterSpec, pool: PoolSettings, identity: WorkerIdentity, executor: Executor) -> DecodeServer:
    return DecodeServer(
        identity,
        executor,
        scheduler_config(pool),
        sink_transports(spec, pool, identity, executor),
        SinkConfig(silence_s=spec.transfer.silence_s),
        _fingerprint(executor, identity),
        boot_id=host_boot_id(),
        hash_secret=identity.token,
    )


def _fingerprint(executor: Executor, identity: WorkerIdentity) -> str:
    return fingerprint(executor.model_hash, [executor.layout], identity.token.encode())
