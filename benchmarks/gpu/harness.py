"""What the GPU benchmarks share: the model's shape, an engine over random weights, floors, and how results are shown.

Every figure stands beside a floor measured in the same run: what the card's memory copies and what its matrix
products reach. The shape is Llama-3-8B's; `--config tiny` is a dry run that a CPU does in seconds.
"""

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from baton.device import find_device
from cluster.devices import kv_bytes, step_limits
from engine.engine import Engine
from engine.executors.torch_executor import TorchConfig, TorchExecutor
from engine.request import Request, RequestId, SamplingParams
from engine.scheduler import SchedulerConfig

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        **BASE,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 163840,
        "torch_dtype": "bfloat16",
    },
    "tiny": {
        **BASE,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 256,
        "vocab_size": 1024,
        "max_position_embeddings": 4096,
        "torch_dtype": "float32",
    },
}
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes that floors are computed from. Parameters of the layers and of the head are what a step reads."""

    layer_parameters: int  # of all layers; the embedding table is looked up, not read
    head_parameters: int
    num_layers: int
    heads_width: int  # query heads x head_dim
    vocab_size: int
    dtype: str

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Shape":
        hidden, ffn, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
        queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
        layer = hidden * (queries + 2 * keys) + queries * hidden + 3 * hidden * ffn + 2 * hidden
        return cls(
            layer_parameters=config["num_hidden_layers"] * layer,
            head_parameters=config["vocab_size"] * hidden,
            num_layers=config["num_hidden_layers"],
            heads_width=queries,
            vocab_size=config["vocab_size"],
            dtype=config["torch_dtype"],
        )

    def weight_bytes(self, quantization: str | None) -> int:
        """Read by one decode step. Quantized are the layers' matrices, not the head."""
        size = WEIGHT_BYTES[self.dtype]
        return self.layer_parameters * (1 if quantization else size) + self.head_parameters * size

    def prefill_flop(self, num_tokens: int, num_sequences: int = 1) -> float:
        """2 x parameters of the layers x tokens, plus causal attention. The head is for one token of each sequence."""
        attention = 2 * self.heads_width * self.num_layers * float(num_tokens) ** 2  # half of 4 x tokens^2
        return num_sequences * (2.0 * self.layer_parameters * num_tokens + attention + 2.0 * self.head_parameters)


@dataclass(frozen=True, slots=True)
class Floors:
    """Measured here and now. `copy_bytes_per_s` counts what a copy reads and what it writes."""

    device: str
    copy_bytes_per_s: float
    matmul_flop_per_s: float


def parser(description: str | None) -> argparse.ArgumentParser:
    """With the options that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--config", default="llama-3-8b", help=f"shape: {', '.join(CONFIGS)} (default: %(default)s)")
    made.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    made.add_argument("--quantization", choices=["fp8"], help="weights in fp8")
    made.add_argument("--kv-cache-dtype", choices=["auto", "fp8"], default="auto")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the results here, too")
    return made


@contextmanager
def model_directory(name: str) -> Iterator[Path]:
    """A directory that holds nothing but the config.json of a shape."""
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIGS[name]))
        yield Path(folder)


@contextmanager
def engine_for(
    args: argparse.Namespace,
    *,
    max_batch_tokens: int | None = None,
    max_num_seqs: int | None = None,
    memory_fraction: float = 0.9,
) -> Iterator[Engine]:
    """An engine over random weights of the shape, with the limits that a worker on this device has by default."""
    device = find_device(args.device)
    limits = SchedulerConfig(*step_limits(device, max_batch_tokens, max_num_seqs))
    config = TorchConfig(
        device=device,
        load="dummy",
        quantization=args.quantization,
        kv_memory=kv_bytes(device, None),
        kv_dtype=args.kv_cache_dtype,
        gpu_memory_fraction=memory_fraction,
        max_batch_tokens=limits.max_batch_tokens,
        max_num_seqs=limits.max_num_seqs,
    )
    with model_directory(args.config) as path:
        executor = TorchExecutor(path, config)
    try:
        yield Engine(executor, limits, secret="benchmark", model="benchmark")
    finally:
        executor.close()


def random_request(name: str, num_tokens: int, num_output: int, vocab_size: int, *, seed: int) -> Request:
    """Greedy, and of exactly `num_output` tokens. The name salts its hashes, so nothing of it is cached."""
    token_ids = tuple(random.Random(seed).choices(range(vocab_size), k=num_tokens))
    params = SamplingParams(max_tokens=num_output, temperature=0.0, ignore_eos=True)
    return Request(RequestId(name), token_ids, num_tokens, params, seed=0, cache_salt=name)


@dataclass(frozen=True, slots=True)
class Step:
    """A step whose tokens have been collected, at `time` (perf_counter)."""

    time: float
    num_tokens: int  # sampled


def drive(engine: Engine) -> Iterator[Step]:
    """Run everything that was submitted, the way a worker's loop does: the next step starts before one is collected."""
    while engine.has_work:
        scheduled = engine.schedule()
        if scheduled is not None:
            engine.start(scheduled)
        if engine.num_in_flight and (scheduled is None or not engine.can_start):
            tokens = engine.collect()
            yield Step(time.perf_counter(), len(tokens))


def measure_floors(args: argparse.Namespace) -> Floors:
    """Copy bandwidth and matrix products of the device: about a second, before the engine takes the memory."""
    where = torch.device(find_device(args.device))
    cuda = where.type == "cuda"
    num_bytes, width, dtype = (2 << 30, 8192, torch.bfloat16) if cuda else (64 << 20, 512, torch.float32)
    source = torch.ones(num_bytes, dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    copy_s = best_seconds(partial(target.copy_, source), where, 10)
    left, right = (torch.randn(width, width, device=where).to(dtype) for _ in range(2))
    matmul_s = best_seconds(partial(torch.mm, left, right), where, 20)
    del source, target, left, right
    if cuda:
        torch.cuda.empty_cache()
    name = torch.cuda.get_device_name(where) if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads"
    return Floors(name, 2 * num_bytes / copy_s, 2.0 * width**3 / matmul_s)


def best_seconds(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """The shortest of `rounds`, after one that warms up; on a GPU by its own clock."""
    work()
    if device.type != "cuda":
        return min(_cpu_seconds(work) for _ in range(rounds))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize(device)
    return min(a.elapsed_time(b) for a, b in pairwise(events)) / 1e3


def _cpu_seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank; nan for nothing."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))] if ranked else float("nan")


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")


def show(args: argparse.Namespace, floors: Floors | None, columns: dict[str, str], rows: list[dict[str, Any]]) -> None:
    """Print one table and write `--json`. `columns`: name in a row -> format such as `>8.2f`; names are the heads."""
    given = {name: str(value) for name, value in vars(args).items() if name != "json" and value is not None}
    print("  ".join(f"{name}={value}" for name, value in given.items()))
    if floors is not None:
        copied, products = floors.copy_bytes_per_s / 1e12, floors.matmul_flop_per_s / 1e12
        print(f"{floors.device}: copy {copied:.2f} TB/s (read + write), matrix product {products:.1f} TFLOP/s")
    widths = {
        name: max(len(name), *(len(_cell(row.get(name), form)) for row in rows)) for name, form in columns.items()
    }
    print("  ".join(name.rjust(widths[name]) for name in columns))
    for row in rows:
        print("  ".join(_cell(row.get(name), form).rjust(widths[name]) for name, form in columns.items()))
    if args.json is not None:
        floors_given = asdict(floors) if floors is not None else None
        args.json.write_text(json.dumps({"options": given, "floors": floors_given, "rows": rows}, indent=2) + "\n")


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)
