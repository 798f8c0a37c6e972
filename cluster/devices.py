"""What a worker's device decides: sizes that a spec leaves open, and which GPU of this machine a process gets.

No torch here: what `auto` is, the worker's process finds out and tells `ClusterSpec.pool`.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
FoundDevice = Literal["cpu", "cuda"]

MAX_BATCH_TOKENS: Mapping[FoundDevice, int] = {"cpu": 512, "cuda": 8192}
# Of workers whose clients read along: a token may be as late as a step is long. 1024 keep a GPU as busy as 8192 do.
MAX_STREAMING_TOKENS = 1024
MAX_NUM_SEQS: Mapping[FoundDevice, int] = {"cpu": 64, "cuda": 256}
HOST_KV_BYTES = 1 << 30
GPU_MEMORY_FRACTION = 0.9  # of a GPU, for all workers on it: the rest is other processes', and what fragments
GPU_FILE = re.compile(r"nvidia\d+")


def step_limits(
    device: FoundDevice, max_batch_tokens: int | None, max_num_seqs: int | None, *, streams: bool = False
) -> tuple[int, int]:
    """Both limits. What is None gets the device's default, moved to where the other one allows it. `streams`: of a
    decode worker."""
    default = min(MAX_BATCH_TOKENS[device], MAX_STREAMING_TOKENS) if streams else MAX_BATCH_TOKENS[device]
    tokens = max_batch_tokens or max(default, max_num_seqs or 0)
    return tokens, max_num_seqs or min(MAX_NUM_SEQS[device], tokens)


def profiled_device(name: str) -> FoundDevice:
    """Of a step profile, by what it calls its device."""
    return "cpu" if "cpu" in name.lower() else "cuda"


def kv_bytes(device: FoundDevice, asked: int | None) -> int | None:
    """Bytes of the KV pool; None: what is free on the GPU after a peak forward."""
    return HOST_KV_BYTES if asked is None and device == "cpu" else asked


def visible_gpus(environ: Mapping[str, str], files: Path = Path("/dev")) -> list[str]:
    """Names of the GPUs that processes with this environment may use, as CUDA_VISIBLE_DEVICES has them."""
    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(index) for index in range(sum(1 for file in files.glob("*") if GPU_FILE.fullmatch(file.name)))]
    gpus: list[str] = []
    for name in map(str.strip, named.split(",")):
        if not name or name.startswith("-"):  # as for CUDA, what follows does not count
            break
        gpus.append(name)
    return gpus


def workers_per_gpu(num_workers: int, gpus: Sequence[str]) -> int:
    """On the GPU with the most of them, when worker k gets GPU k modulo their number; no GPU known: all share one."""
    return max(1, -(-num_workers // max(1, len(gpus))))
