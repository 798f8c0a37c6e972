"""What each process is composed of: from a spec to running objects, each given only what it needs.

The only place that sees the spec, the registry, the executors, the transports and the roles at once.
"""

import asyncio
import logging
import os
import random
import signal
import time
from pathlib import Path

from cluster.checkpoint import resolve_model
from cluster.credentials import read_api_key, read_token
from cluster.registry.base import WorkerRecord
from cluster.registry.open import open_registry
from cluster.spec import ClusterSpec, PoolSettings, Role, threads_per_worker, worker_id
from engine.executors.base import Executor
from engine.scheduler import SchedulerConfig
from engine.server import WorkerIdentity

log = logging.getLogger(__name__)

DRAIN_GRACE_S = 25.0  # below the 30 s that orchestrators give a process between SIGTERM and SIGKILL


def make_executor(spec: ClusterSpec, pool: PoolSettings) -> Executor:
    """Loads the model: seconds to minutes, and most of the process's memory."""
    if pool.engine == "simulated":
        from engine.executors.simulated import SimulatedConfig, SimulatedExecutor

        return SimulatedExecutor(
            SimulatedConfig(
                **spec.simulated.model_dump(exclude={"max_model_len"}),
                max_model_len=spec.max_model_len or spec.simulated.max_model_len,
                block_size=pool.block_size,
                num_blocks=pool.kv_cache.num_blocks or pool.kv_cache.memory // 4096,
            ),
            time.sleep,
        )
    from engine.executors.torch_executor import TorchConfig, TorchExecutor

    return TorchExecutor(
        resolve_model(spec.model),
        TorchConfig(
            dtype=spec.dtype,
            block_size=pool.block_size,
            num_blocks=pool.kv_cache.num_blocks,
            kv_memory=pool.kv_cache.memory,
            max_model_len=spec.max_model_len,
            num_threads=threads_per_worker(spec, pool.role, os.cpu_count() or 1),
        ),
    )


def scheduler_config(pool: PoolSettings) -> SchedulerConfig:
    return SchedulerConfig(max_batch_tokens=pool.scheduler.max_batch_tokens, max_num_seqs=pool.scheduler.max_num_seqs)
