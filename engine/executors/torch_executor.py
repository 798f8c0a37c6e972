"""The executor that runs a Hugging Face checkpoint in PyTorch.

Owns the model, the KV memory and the attention backend of one worker. A worker loop calls `step` from one
thread; nothing about a request is kept between steps except its KV.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.attention.base import AttentionBackend, Span
from engine.attention.paged import PagedAttention
from engine.executors.base import Batch, Chunk, Sampled, StepResult, TokenLogprobs
from engine.kv.layout import ITEM_SIZES, KvLayout
from engine.kv.memory import HostMemory
from engine.model_config import DTYPES, ModelConfig, load_model_config
from engine.models.decoder import CausalLM
from engine.models.registry import MAKERS
from engine.sampler import prompt_logprobs, sample
from engine.weights import Progress, load_weights, model_hash, num_parameters

LOGITS_BYTES = 64 << 20  # of prompt log probabilities computed at a time


@dataclass(frozen=True, slots=True)
class TorchConfig:
    """`num_blocks` None is what fits into `kv_memory` bytes. `dtype` "auto" is the checkpoint's, except that a CPU
    computes a float16 checkpoint in float32, which holds every float16 exactly and is many times faster there.
    `max_model_len` None is the most that the model and the blocks allow. `layers_per_group` None is a quarter of the
    layers. `num_threads` None leaves PyTorch's setting, which belongs to the whole process, as it is.
    """

    num_blocks: int | None = None
    kv_memory: int = 1 << 30
    dtype: str = "auto"
    device: str = "cpu"
    block_size: int = 16
    max_model_len: int | None = None
    layers_per_group: int | None = None
    num_threads: int | None = None


class TorchExecutor:
    """Implements `engine.executors.base.Executor`. Raises ValueError when checkpoint and config do not fit."""

    def __init__(self, path: Path, config: TorchConfig, progress: Progress | None = None) -> None:
        model_config = load_model_config(path)
        dtype = choose_dtype(config, model_config)
        self.layout = KvLayout(
            num_layers=model_config.num_layers,
            num_kv_heads=model_config.num_kv_heads,
            head_dim=model_config.head_dim,
            block_size=config.block_size,
            dtype=dtype,
        )
        num_blocks = config.num_blocks
        if num_blocks is None:
            num_blocks = config.kv_memory // self.layout.block_bytes
        if config.device != "cpu":
            raise ValueError(f"device must be cpu, where the KV memory is, not {config.device!r}")
        weight_bytes = num_parameters(path) * ITEM_SIZES[dtype]
        check_memory(self.layout, num_blocks, available_memory() - weight_bytes)
        self.max_model_len = choose_max_model_len(config, model_config, num_blocks)
        self.layer_groups = layer_group_ends(model_config.num_layers, config.layers_per_group)
        self.vocab_size = model_config.vocab_size
        self.eos_token_ids = model_config.eos_token_ids
        self.model_hash = model_hash(path)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self._device = torch.device(config.device)
        self._model = load_model(path, model_config, getattr(torch, dtype), self._device, progress)
        self.memory = HostMemory(self.layout, num_blocks)
        kv = torch.frombuffer(self.memory.buffer, dtype=getattr(torch, dtype)).view(self.layout.shape(num_blocks))
        self._attention: AttentionBackend = PagedAttention(kv)

    @torch.inference_mode()
    def step(self, batch: Batch, on_group_done: Callable[[int], None] | None = None) -> StepResult:
        chunks = batch.chunks
        spans = [Span(chunk.start, len(chunk.token_ids), chunk.block_ids) for chunk in chunks]
        attention = self._attention.begin_step(spans, self._group_caller(on_group_done))
        token_ids = torch.tensor([token for chunk in chunks for token in chunk.token_ids], device=self._device)
        positions = [position for span in spans for position in range(span.start, span.start + span.num_tokens)]
        positions_tensor = torch.tensor(positions, dtype=torch.float32, device=self._device)
        hidden = self._model(token_ids, positions_tensor, attention)
        return StepResult(self._sample(chunks, hidden), self._prompt_logprobs(chunks, hidden))

    def close(self) -> None:
        """Give weights and KV memory back; nothing else may be called afterwards."""
        self.__dict__.pop("_model", None)
        self.__dict__.pop("_attention", None)
        self.memory.close()

    def _group_caller(self, on_group_done: Callable[[int], None] | None) -> Callable[[int], None] | None:
        if on_group_done is None:
            return None
        last_layers = {end - 1: group for group, end in enumerate(self.layer_groups)}

        def on_layer_written(layer: int) -> None:
            if layer in last_layers:
                on_group_done(last_layers[layer])

        return on_layer_written

    def _sample(self, chunks: Sequence[Chunk], hidden: Tensor) -> list[Sampled | None]:
        rows, specs, end = [], [], 0
        for chunk in chunks:
            end += len(chunk.token_ids)
            if chunk.sample is not None:
                rows.append(end - 1)
                specs.append(chunk.sample)
        if not rows:
            return [None] * len(chunks)
        if len(rows) < hidden.shape[0]:
            hidden = hidden[rows]
        sampled = iter(sample(self._model.logits(hidden), specs))
        return [None if chunk.sample is None else next(sampled) for chunk in chunks]

    def _prompt_logprobs(self, chunks: Sequence[Chunk], hidden: Tensor) -> list[list[TokenLogprobs] | None]:
        found: list[list[TokenLogprobs] | None] = []
        first = 0
        for chunk in chunks:
            of_chunk: list[TokenLogprobs] | None = None
            if chunk.prompt_logprobs is not None:
                num_rows = max(1, LOGITS_BYTES // (4 * self.vocab_size))
                of_chunk = []
                for start in range(0, len(chunk.next_token_ids), num_rows):
                    following = chunk.next_token_ids[start : start + num_rows]
                    logits = self._model.logits(hidden[first + start : first + start + len(following)])
                    of_chunk += prompt_logprobs(logits, following, chunk.prompt_logprobs)
            found.append(of_chunk)
            first += len(chunk.token_ids)
        return found


def load_model(
    path: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, progress: Progress | None
) -> CausalLM:
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = MAKERS[config.architecture](config, dtype)
    finally:
        torch.set_default_dtype(default_dtype)
    load_weights(model, path, progress)
    return model


def choose_dtype(config: TorchConfig, model_config: ModelConfig) -> str:
    if config.dtype == "auto":
        return "float32" if config.device == "cpu" and model_config.dtype == "float16" else model_config.dtype
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype must be auto or one of {', '.join(DTYPES)}, not {config.dtype!r}")
    return config.dtype


def choose_max_model_len(config: TorchConfig, model_config: ModelConfig, num_blocks: int) -> int:
    in_blocks, in_model = num_blocks * config.block_size, model_config.max_position_embeddings
    asked = config.max_model_len
    if asked is None:
        return min(in_blocks, in_model)
    if not 1 <= asked <= in_model:
        raise ValueError(f"max_model_len must be between 1 and the model's {in_model} positions, not {asked}")
    if asked > in_blocks:
        raise ValueError(
            f"max_model_len {asked} needs {-(-asked // config.block_size)} blocks of {config.block_size} tokens, "
            f"and the pool has {num_blocks}"
        )
    return asked


def layer_group_ends(num_layers: int, layers_per_group: int | None) -> tuple[int, ...]:
    """Exclusive ends of groups of `layers_per_group` layers; the last group may be smaller."""
    size = max(1, num_layers // 4) if layers_per_group is None else layers_per_group
    if size < 1:
        raise ValueError(f"layers_per_group must be at least 1, not {size}")
    return (*range(size, num_layers, size), num_layers)


def check_memory(layout: KvLayout, num_blocks: int, available: int) -> None:
    """The pool is touched page by page, so what does not fit would kill the process later, in mid-request."""
    if num_blocks < 1:
        raise ValueError(f"num_blocks must be at least 1, not {num_blocks}")
    needed = num_blocks * layout.block_bytes
    if needed > available:
        raise ValueError(
            f"{num_blocks} KV blocks of {layout.block_bytes} bytes need {needed / 2**30:.1f} GiB, and "
            f"{available / 2**30:.1f} GiB are available beside the weights; "
            f"at most {max(0, available) // layout.block_bytes} fit"
        )


def available_memory() -> int:
    """Bytes that can be had without swapping, by the kernel's estimate."""
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
