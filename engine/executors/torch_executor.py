"""The executor that runs a Hugging Face checkpoint in PyTorch, on the CPU or on one GPU.

Owns the model, the KV memory and what computes the layers of one worker: PyTorch, or segments outside it that a
loader makes. A worker loop makes all calls from one thread; nothing about a request is kept between steps except its KV
and the tokens sampled last. On the CPU a step is over when `submit` returns. On CUDA it is queued there and `result`
waits for it, so that two steps can be in flight, and nothing in between waits for the device. Decode steps and small
others replay CUDA graphs, large ones are queued operation by operation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.attention.base import Span
from engine.attention.paged import PagedAttention
from engine.executors.base import Batch, Chunk, FinishedStep, PendingStep, TokenLogprobs
from engine.executors.cuda_setup import (
    LayerMaker,
    StepLimits,
    bytes_outside_pytorch,
    capture_graphs,
    make_attention,
    make_pool,
    measure_peak,
    num_blocks_that_fit,
    warm_up,
)
from engine.executors.host_pool import available_memory, check_memory
from engine.executors.model_loading import Loaded, choose_dtype, load, load_model
from engine.executors.queued_step import GroupMarks, QueuedStep, step_result
from engine.executors.step_forward import StepForward, TorchForward
from engine.executors.tensorrt.forward import PrefillForward
from engine.executors.tensorrt.limits import call_limits, pairs_worth_a_call
from engine.executors.tensorrt.segment import SegmentLoader
from engine.kv.layout import ITEM_SIZES, KvLayout
from engine.kv.memory import HostMemory, KvMemory
from engine.model_config import ModelConfig, load_model_config, with_quantization
from engine.sampler import Choice, part_rows, prompt_logprobs, sample
from engine.tensors import to_device
from engine.weights import Progress, num_parameters

__all__ = ["TorchConfig", "TorchExecutor", "load_model"]

HOST_KV_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class TorchConfig:
    """`device` "cuda" is the process's first GPU. `load` "dummy" asks for a config.json only and makes random weights.
    `dtype` "auto" is the checkpoint's, except that a CPU computes a float16 checkpoint in float32, which holds every
    float16 exactly and is many times faster there. `quantization` "fp8" quantizes the weights of a checkpoint that is
    not quantized yet.

    `num_blocks` None is what fits into `kv_memory` bytes; `kv_memory` None is 1 GiB on the CPU, and on CUDA what is
    free beside the largest step (`max_batch_tokens`, `max_num_seqs`) within `gpu_memory_fraction` of the GPU.
    `max_model_len` None is the most that the model and the blocks allow. `layers_per_group` None is about a quarter of
    the layers. `num_threads` None leaves PyTorch's setting, which belongs to the whole process, as it is.
    `max_call_tokens`: what a segment outside PyTorch computes in one call; None: a default.
    """

    device: str = "cpu"
    load: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    num_blocks: int | None = None
    kv_memory: int | None = None
    kv_dtype: str = "auto"  # the model's, or "fp8"
    gpu_memory_fraction: float = 0.9
    block_size: int = 16
    max_model_len: int | None = None
    max_batch_tokens: int = 8192
    max_num_seqs: int = 256
    cuda_graphs: bool = True
    layers_per_group: int | None = None
    num_threads: int | None = None
    max_call_tokens: int | None = None


class TorchExecutor:
    """Implements `engine.executors.base.Executor`. Raises ValueError when checkpoint, config and device do not fit."""

    memory: KvMemory
    max_model_len: int

    def __init__(
        self,
        path: Path,
        config: TorchConfig,
        progress: Progress | None = None,
        load_segments: SegmentLoader | None = None,
    ) -> None:
        """`load_segments` gives what computes the layers in PyTorch's place."""
        if config.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, not {config.device!r}")
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda: PyTorch finds no GPU (see nvidia-smi, and torch.version.cuda for its build)")
        if not 0 < config.gpu_memory_fraction <= 1:
            raise ValueError(f"gpu_memory_fraction must be above 0 and at most 1, not {config.gpu_memory_fraction}")
        if config.block_size < 1 or config.block_size.bit_count() != 1:
            raise ValueError(f"block_size must be a power of two, not {config.block_size}")
        self._device = torch.device("cuda:0" if config.device == "cuda" else "cpu")
        model_config = with_quantization(load_model_config(path), config.quantization)
        dtype = choose_dtype(config.dtype, model_config, self._device)
        self.layout = make_layout(config, model_config, dtype)
        self.layer_groups = layer_group_ends(model_config.num_layers, config.layers_per_group)
        self.vocab_size = model_config.vocab_size
        self.eos_token_ids = model_config.eos_token_ids
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        is_dummy, num_blocks = config.load == "dummy", num_blocks_asked(config, self.layout)
        if num_blocks is not None:
            self.max_model_len = choose_max_model_len(config, model_config, num_blocks)
            if config.device == "cpu":
                weight_bytes = 0 if is_dummy else num_parameters(path) * ITEM_SIZES[dtype]
                check_memory(self.layout, num_blocks, available_memory() - weight_bytes)
        loaded = load(path, model_config, dtype, self._device, dummy=is_dummy, progress=progress)
        self._model, self.model_hash = loaded.model, loaded.model_hash
        self._layers: StepForward
        if num_blocks is not None and config.device == "cpu":
            self._use_host(num_blocks, config, loaded, load_segments)
        else:
            self._use_gpu(num_blocks, config, loaded, load_segments)
        # By each chunk of the step submitted last; of those that sample nothing, anything.
        self._sampled = torch.empty(0, dtype=torch.int64, device=self._device)

    def _use_host(
        self, num_blocks: int, config: TorchConfig, loaded: Loaded, load_segments: SegmentLoader | None
    ) -> None:
        self.max_in_flight = 1
        limits = StepLimits(config.max_batch_tokens, config.max_num_seqs, self.max_model_len, max_graph_rows=0)
        make_layers = self._layer_maker(loaded, limits, config.max_call_tokens, load_segments)
        self.memory = memory = HostMemory(self.layout, num_blocks)
        kv = torch.frombuffer(memory.buffer, dtype=getattr(torch, self.layout.dtype))
        self._layers = make_layers(kv.view(self.layout.shape(num_blocks)), limits)

    def _use_gpu(
        self, num_blocks: int | None, config: TorchConfig, loaded: Loaded, load_segments: SegmentLoader | None
    ) -> None:
        self.max_in_flight = 2
        model, device = loaded.model, self._device
        limits = StepLimits(
            max_batch_tokens=config.max_batch_tokens,
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len or model.config.max_position_embeddings,
            max_graph_rows=config.max_num_seqs if config.cuda_graphs else 0,
        )
        before = bytes_outside_pytorch(device)
        make_layers = self._layer_maker(loaded, limits, config.max_call_tokens, load_segments)
        peak = measure_peak(model, make_layers, self.layout, limits, device, bytes_outside_pytorch(device) - before)
        if num_blocks is None:
            num_blocks = num_blocks_that_fit(self.layout, peak, device, config.gpu_memory_fraction)
            self.max_model_len = choose_max_model_len(config, model.config, num_blocks)
        else:  # that many even beyond the fraction, but not more than the GPU holds beside a step
            num_blocks_that_fit(self.layout, peak, device, 1.0, num_blocks)
        self.memory = memory = make_pool(self.layout, num_blocks, device)
        limits = replace(limits, max_model_len=self.max_model_len)
        kv = memory.kv(getattr(torch, self.layout.dtype))
        try:
            self._layers = layers = make_layers(kv, limits)
            warm_up(model, layers, memory, min(limits.max_batch_tokens, limits.max_model_len))
            if isinstance(layers, TorchForward):
                capture_graphs(model, layers, limits, spare_block=num_blocks)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"no memory for attention and CUDA graphs beside {memory.size / 2**30:.1f} GiB of KV: lower "
                f"kv_cache.memory, kv_cache.num_blocks or gpu_memory_fraction, or free memory on the GPU ({error})"
            ) from error

    def _layer_maker(
        self, loaded: Loaded, limits: StepLimits, max_call_tokens: int | None, load_segments: SegmentLoader | None
    ) -> LayerMaker:
        model = loaded.model
        if load_segments is not None:
            if getattr(torch, self.layout.dtype) != model.rotary.dtype:
                raise ValueError(f"kv_cache.dtype {self.layout.dtype} is for engine torch")
            sizes = call_limits(
                self.layout, self._device.type, limits.max_batch_tokens, limits.max_model_len, max_call_tokens
            )
            calls = replace(sizes, max_wasted_pairs=pairs_worth_a_call(model.config))
            segments = load_segments(loaded, self.layer_groups, calls)
            if segments is not None:
                return lambda kv, limits: PrefillForward(model, kv, segments, calls, limits.max_batch_tokens)
        if self._device.type == "cpu":
            return lambda kv, _limits: TorchForward(model, PagedAttention(kv))
        return lambda kv, limits: TorchForward(model, make_attention(kv, model, limits, loaded.kv_scales))

    @torch.inference_mode()
    def submit(self, batch: Batch, on_group_done: Callable[[int], None] | None = None) -> PendingStep:
        chunks = batch.chunks
        marks = GroupMarks(self.layer_groups, on_group_done, self._device)
        num_rows = rows_needed(chunks)
        hidden = self._forward(chunks, num_rows, marks)
        row_ends = np.cumsum(num_rows)
        choice = self._sample(chunks, hidden, row_ends)
        prompt_logprobs = self._prompt_logprobs(chunks, hidden, row_ends)
        sampling = [chunk.sample is not None for chunk in chunks]
        if self._device.type == "cpu":
            return FinishedStep(step_result(sampling, choice, prompt_logprobs))
        return QueuedStep(sampling, choice, prompt_logprobs, marks)

    def close(self) -> None:
        """Give weights and KV memory back; nothing else may be called afterwards."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for name in ("_layers", "_model", "_sampled"):
            self.__dict__.pop(name, None)
        self.memory.close()

    def _forward(self, chunks: Sequence[Chunk], num_rows: Sequence[int], marks: GroupMarks) -> Tensor:
        """Hidden states before the final norm of the last `num_rows` tokens of each chunk [rows, hidden_size]."""
        spans = [Span(chunk.start, len(chunk.token_ids), chunk.block_ids) for chunk in chunks]
        token_ids = self._token_ids(chunks)
        rows = last_rows([span.num_tokens for span in spans], num_rows)
        return self._layers.run(token_ids, spans, rows, marks.on_layer_written)

    def _token_ids(self, chunks: Sequence[Chunk]) -> Tensor:
        """[num_tokens]; those that the step before samples are taken from where it puts them."""
        sources = [-1 if chunk.follows is None else chunk.follows for chunk in chunks]
        if sources == list(range(len(self._sampled))):
            return self._sampled
        known = np.fromiter(chain.from_iterable(chunk.token_ids for chunk in chunks), np.int64)
        token_ids = to_device(known, self._device)
        if max(sources) >= 0:
            ends = np.cumsum([len(chunk.token_ids) for chunk in chunks])
            following = np.flatnonzero(np.array(sources) >= 0)
            places = to_device(ends[following] - 1, self._device)
            token_ids[places] = self._sampled[to_device(np.array(sources)[following], self._device)]
        return token_ids

    def _sample(self, chunks: Sequence[Chunk], hidden: Tensor, row_ends: NDArray[np.int64]) -> Choice | None:
        """hidden: rows of each chunk up to its place in `row_ends`, of which the last is sampled from."""
        sampling = [i for i, chunk in enumerate(chunks) if chunk.sample is not None]
        if not sampling:
            return None
        if len(sampling) < hidden.shape[0]:
            hidden = hidden[to_device(row_ends[sampling] - 1, self._device)]
        specs = [chunk.sample for chunk in chunks if chunk.sample is not None]
        choice = sample(self._model.logits(hidden), specs, [chunks[i].end for i in sampling])
        if len(sampling) == len(chunks):
            self._sampled = choice.token_ids
        else:
            self._sampled = choice.token_ids.new_zeros(len(chunks))
            self._sampled[to_device(sampling, self._device)] = choice.token_ids
        return choice

    def _prompt_logprobs(
        self, chunks: Sequence[Chunk], hidden: Tensor, row_ends: NDArray[np.int64]
    ) -> list[list[TokenLogprobs] | None]:
        found: list[list[TokenLogprobs] | None] = []
        for chunk, end in zip(chunks, row_ends.tolist(), strict=True):
            of_chunk: list[TokenLogprobs] | None = None
            if chunk.prompt_logprobs is not None:
                num_rows = part_rows(self.vocab_size)
                first = end - len(chunk.token_ids)
                of_chunk = []
                for start in range(0, len(chunk.next_token_ids), num_rows):
                    following = chunk.next_token_ids[start : start + num_rows]
                    logits = self._model.logits(hidden[first + start : first + start + len(following)])
                    of_chunk += prompt_logprobs(logits, following, chunk.prompt_logprobs)
            found.append(of_chunk)
        return found


def rows_needed(chunks: Sequence[Chunk]) -> list[int]:
    """How many of the last tokens of each chunk: all whose logits are asked for, and one of every chunk."""
    return [1 if chunk.prompt_logprobs is None else len(chunk.token_ids) for chunk in chunks]


def last_rows(lengths: Sequence[int], num_rows: Sequence[int]) -> NDArray[np.int64] | None:
    """Places of the last `num_rows` of each chunk, in chunks of `lengths` one after the other; None: all."""
    if list(lengths) == list(num_rows):
        return None
    ends = np.cumsum(lengths).tolist()
    return np.concatenate([np.arange(end - num, end) for end, num in zip(ends, num_rows, strict=True)])


def make_layout(config: TorchConfig, model_config: ModelConfig, dtype: str) -> KvLayout:
    if config.kv_dtype not in ("auto", "fp8"):
        raise ValueError(f"kv_cache.dtype must be auto or fp8, not {config.kv_dtype!r}")
    if config.kv_dtype == "fp8" and config.device == "cpu":
        raise ValueError("kv_cache.dtype fp8 is for device cuda")
    return KvLayout(
        num_layers=model_config.num_layers,
        num_kv_heads=model_config.num_kv_heads,
        head_dim=model_config.head_dim,
        block_size=config.block_size,
        dtype="float8_e4m3fn" if config.kv_dtype == "fp8" else dtype,
    )


def num_blocks_asked(config: TorchConfig, layout: KvLayout) -> int | None:
    """None: as many as fit on the GPU. Raises ValueError when there is not a single one."""
    if config.num_blocks is not None:
        if config.num_blocks < 1:
            raise ValueError(f"kv_cache.num_blocks must be at least 1, not {config.num_blocks}")
        return config.num_blocks
    if config.kv_memory is None and config.device != "cpu":
        return None
    kv_memory = HOST_KV_BYTES if config.kv_memory is None else config.kv_memory
    if kv_memory < layout.block_bytes:
        raise ValueError(
            f"kv_cache.memory must be at least the {layout.block_bytes} bytes of one KV block of {layout.block_size} "
            f"tokens, not {kv_memory}"
        )
    return kv_memory // layout.block_bytes


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
    """Exclusive ends of groups of `layers_per_group` layers; the last group may be smaller.

    By default quarters, and the last sixteenth of the layers for itself: no computing hides its transfer.
    """
    if layers_per_group is None:
        size, last = max(1, num_layers // 4), max(1, num_layers // 16)
        return tuple(sorted({*range(size, num_layers, size), num_layers - last, num_layers} - {0}))
    size = layers_per_group
    if size < 1:
        raise ValueError(f"layers_per_group must be at least 1, not {size}")
    return (*range(size, num_layers, size), num_layers)
