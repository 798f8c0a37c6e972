"""Paged attention by FlashInfer's kernels: the backend for CUDA.

The pool is block-major, so a layer is a strided view of it, which the kernels read at full speed. Rows of decoding
sequences (spans of one token) and of prompts (longer spans) are groups, each attended to by one kernel:

* decode of short or even sequences: a kernel of our own, which reads each from end to end;
* other decode: "fa2" on tensor cores, with long sequences cut into pieces for several multiprocessors;
* prompts with nothing before them: "fa3" on the keys and values at hand, which need no gathering;
* other prompts: "fa3" over the blocks, or "fa2" where that has too few tiles for the GPU or the KV is in 8 bits.

The modules behind FlashInfer's wrapper classes are called, not the wrappers, whose `plan` walks lengths in Python
and copies each index tensor on its own. Here a step's index tensors travel in one asynchronous copy, and nothing
waits for the device. All of it runs on the stream that is current when a step begins.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from flashinfer.prefill import get_batch_prefill_module
from flashinfer.utils import MaskMode, TensorLayout
from torch import Tensor

from engine.attention.base import AttentionLayer, Span
from engine.attention.indices import (
    DeviceIndices,
    Int32s,
    Int64s,
    SpanIndices,
    index_spans,
    offsets,
    pack,
    stage,
    token_rows,
    unpack,
)
from engine.kernels.decode_attention import decode_attention
from engine.kernels.rope_kv import rotate_and_store
from engine.layers.rotary import Rotation

log = logging.getLogger(__name__)

FA3_TILE = 128  # rows, of one query head, that a thread block of "fa3" works on, one on each multiprocessor
FA2_TILE = 64  # rows, of all query heads of a kv head, that "fa2" rounds up to, or twice that
FA3_SPEEDUP = 2  # over "fa2" where all thread blocks are busy with whole tiles
SHORT = 512  # tokens that one thread block reads in the time that putting pieces together takes
BLOCKS_PER_SM = 2  # thread blocks of "fa2" that a multiprocessor holds, as FlashInfer's planner assumes
PLAN_BYTES = 16 << 20  # room for one plan; one of 128k prompt tokens and 32 heads takes 1 MB


def supports(dtype: torch.dtype, head_dim: int, kv_dtype: torch.dtype) -> bool:
    """Whether there are kernels for queries of `dtype` over KV of `kv_dtype`."""
    if dtype not in (torch.bfloat16, torch.float16) or head_dim not in (64, 128, 256):
        return False
    return kv_dtype in (dtype, torch.float8_e4m3fn)


@dataclass(frozen=True, slots=True)
class Kernel:
    """`source` of keys and values: the pool's "blocks", or the step's own heads."""

    backend: Literal["fa2", "fa3"]
    source: Literal["blocks", "heads"]
    is_decode: bool
    in_graph: bool = False  # with a grid that holds any number of pieces that KV may be cut into


CUT_DECODE = Kernel("fa2", "blocks", is_decode=True)
GRAPH_CUT_DECODE = Kernel("fa2", "blocks", is_decode=True, in_graph=True)
FRESH_PROMPTS = Kernel("fa3", "heads", is_decode=False)
PROMPTS = Kernel("fa3", "blocks", is_decode=False)
SMALL_PROMPTS = Kernel("fa2", "blocks", is_decode=False)


class PlanMemory:
    """Where FlashInfer keeps the plan of a group for one window: it fills `host` and copies that to `device`.

    The next plan overwrites `host` and so has to wait for `copied`. The copy is the first thing that a step does on
    the device, and at most one step is under way when the next is prepared, so the wait is short or none.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = torch.empty(PLAN_BYTES, dtype=torch.uint8, device=device)
        self.host = torch.empty(PLAN_BYTES, dtype=torch.uint8, pin_memory=True)
        self.copied: torch.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]


class FlashInferAttention:
    """Owns workspaces; `kv` [block, layer, k|v, kv_head, slot, head_dim] belongs to the executor.

    `dtype` is that of queries and outputs. Keys are stored divided by their layer's `k_scales`, values by its
    `v_scales`; None: by 1. Steps of up to `max_graph_rows` decode rows, over sequences of up to `max_model_len`
    tokens, can be captured. Raises ValueError for what FlashInfer has no kernel for.
    """

    def __init__(
        self,
        kv: Tensor,
        num_heads: int,
        dtype: torch.dtype,
        *,
        max_graph_rows: int = 0,
        max_model_len: int = 0,
        k_scales: Sequence[float] | None = None,
        v_scales: Sequence[float] | None = None,
    ) -> None:
        self.num_blocks, num_layers, _, self.num_kv_heads, self.block_size, self.head_dim = kv.shape
        if not supports(dtype, self.head_dim, kv.dtype):
            raise ValueError(f"no FlashInfer kernel for {dtype} over {kv.dtype} with head_dim {self.head_dim}")
        self.kv, self.dtype, self.num_heads, self.max_graph_rows = kv, dtype, num_heads, max_graph_rows
        self.keys_values = [(kv[:, layer, 0], kv[:, layer, 1]) for layer in range(num_layers)]
        self.k_scales = tuple(k_scales) if k_scales is not None else (1.0,) * num_layers
        self.v_scales = tuple(v_scales) if v_scales is not None else (1.0,) * num_layers
        properties = torch.cuda.get_device_properties(kv.device)
        self.num_sms, self.major = properties.multi_processor_count, properties.major
        # Where KV is cut, the planner asks for float32 [num_heads, row of a tile, head_dim + 1].
        group, largest_tile = num_heads // self.num_kv_heads, 128 if self.head_dim < 256 else 64
        self.at_once = BLOCKS_PER_SM * self.num_sms // self.num_kv_heads  # pieces of KV that the GPU works on
        self.decode_tile = 16 if group <= 16 else 64 if group <= 64 else largest_tile
        num_tiles = max_graph_rows + max(2 * self.at_once, -(-max_graph_rows * group // self.decode_tile))
        self.workspace_rows = max(num_tiles * self.decode_tile, self.at_once * largest_tile)
        num_bytes = 4 * num_heads * self.workspace_rows * (self.head_dim + 1) + 256
        self.workspace = torch.zeros(num_bytes, dtype=torch.uint8, device=kv.device)
        max_blocks = max_graph_rows * -(-max_model_len // self.block_size)
        self.graph_indices = torch.zeros(
            20 * max_graph_rows + 4 * max_blocks + 128, dtype=torch.uint8, device=kv.device
        )
        self._plan_memory: dict[tuple[bool, int | None], PlanMemory] = {}

    def begin_step(self, spans: Sequence[Span], on_layer_written: Callable[[int], None] | None) -> "FlashInferStep":
        return FlashInferStep(self, spans, on_layer_written)

    def load(self, layers: Sequence[AttentionLayer]) -> None:
        """Load the kernels that `layers` may need; those that no process on this machine ever used are compiled."""
        kernels = [CUT_DECODE]
        if self.major == 9:
            kernels += [FRESH_PROMPTS, PROMPTS] if self.kv.dtype == self.dtype else [FRESH_PROMPTS]
        keys = {self._module_key(kernel, layer) for kernel in kernels for layer in layers}
        log.info("loading %d attention kernels; those new to this machine are compiled, which takes minutes", len(keys))
        with ThreadPoolExecutor(len(keys)) as pool:
            list(pool.map(lambda key: get_batch_prefill_module(*key), keys))

    def rotate_and_store(
        self, layer: AttentionLayer, heads: Tensor, rotation: Rotation, slots: Tensor, out: Tensor | None = None
    ) -> None:
        """As the kernel of that name."""
        scales = self.k_scales[layer.index], self.v_scales[layer.index]
        pool, num_heads = self.kv[:, layer.index], (self.num_heads, self.num_kv_heads)
        rotate_and_store(heads, rotation.cos, rotation.sin, pool, slots, *num_heads, *scales, out)

    def module(self, kernel: Kernel, layer: AttentionLayer) -> Any:
        return get_batch_prefill_module(*self._module_key(kernel, layer))

    def decode_graph(self, num_rows: int, spare_block: int, *, cuts: bool = True) -> "DecodeGraphAttention":
        """For a captured step of `num_rows` rows, which is to be replayed when `self.cuts` says `cuts`."""
        return DecodeGraphAttention(self, num_rows, spare_block, cuts)

    def cuts(self, spans: Sequence[Span], num_rows: int) -> bool:
        """Whether a decode step of `spans` in `num_rows` rows is faster with its longest sequences cut.

        A captured step that may cut also runs a kernel that puts pieces together, 3 to 8 us a layer, so it pays
        only where the longest sequence takes a large part of the step, and when there is room to cut it.
        """
        lengths = np.array([span.start + 1 for span in spans])
        longest = lengths.max(initial=0)
        if longest <= max(SHORT, lengths.sum() / (2 * self.at_once)):
            return False
        return bool(num_rows + np.count_nonzero(lengths > longest * 2 / 3) <= self.max_decode_chunks(num_rows))

    def plan_memory(self, kernel: Kernel, window: int | None) -> PlanMemory:
        key = (kernel.is_decode, window)
        if key not in self._plan_memory:
            self._plan_memory[key] = PlanMemory(self.kv.device)
        return self._plan_memory[key]

    def prompt_kernel(self, spans: Sequence[Span]) -> Kernel:
        """By the rows that each kernel works on, tiles filled up; for "fa3" also the last wave of thread blocks."""
        num_tiles = sum(-(-span.num_tokens // FA3_TILE) for span in spans) * self.num_heads
        fa3_rows = -(-num_tiles // self.num_sms) * self.num_sms * FA3_TILE
        group = self.num_heads // self.num_kv_heads
        fa2_rows = sum(-(-span.num_tokens * group // FA2_TILE) * FA2_TILE for span in spans) * self.num_kv_heads
        if self.major != 9 or fa3_rows > FA3_SPEEDUP * fa2_rows:
            return SMALL_PROMPTS
        if all(span.start == 0 for span in spans):
            return FRESH_PROMPTS
        return PROMPTS if self.kv.dtype == self.dtype else SMALL_PROMPTS

    def max_decode_chunks(self, num_rows: int) -> int:
        """Into how many pieces the KV of `num_rows` sequences may be cut; each is a thread block for every kv head.

        FlashInfer's own bound is what the GPU holds at once, so it would cut nothing in a larger batch, which then
        lasted as long as one thread block needs for its longest sequence.
        """
        at_once = self.at_once
        wanted = at_once if num_rows <= at_once else at_once * (-(-num_rows // at_once) + 1)
        return min(wanted, self.workspace_rows // self.decode_tile)

    def _module_key(self, kernel: Kernel, layer: AttentionLayer) -> tuple[Any, ...]:
        kv_dtype = self.kv.dtype if kernel.source == "blocks" else self.dtype
        dtypes = (self.dtype, kv_dtype, self.dtype, torch.int32)
        no_position_encoding, reduces_in_half = 0, False
        variant = (no_position_encoding, layer.window is not None, layer.softcap is not None, reduces_in_half)
        return (kernel.backend, *dtypes, self.head_dim, self.head_dim, *variant)


class Group:
    """Rows that one kernel attends to. Planned once for each window, when a layer first asks for it."""

    def __init__(
        self, attention: FlashInferAttention, kernel: Kernel, indices: SpanIndices, tensors: DeviceIndices
    ) -> None:
        self.attention, self.kernel, self.indices, self.tensors = attention, kernel, indices, tensors
        self.num_tokens = int(indices.token_indptr[-1])
        self.plans: dict[int | None, tuple[Any, list[int]]] = {}

    def attend(self, layer: AttentionLayer, queries: Tensor, heads: Tensor, out: Tensor) -> None:
        """queries and out [num_tokens, num_heads, head_dim]; heads: as `rotate_and_store` left them."""
        attention, kernel, tensors = self.attention, self.kernel, self.tensors
        module, plan = self.plan_for(layer)
        start = (attention.workspace, attention.plan_memory(kernel, layer.window).device, plan, queries)
        mask = MaskMode.NON_CAUSAL if kernel.is_decode else MaskMode.CAUSAL
        window_left = -1 if layer.window is None else layer.window - 1
        softcap, overlaps = layer.softcap or 0.0, attention.major >= 9
        no_mask_nor_items = (None,) * 6
        if kernel.source == "heads":
            num_kv_heads = attention.num_kv_heads
            keys, values = heads[:, -2 * num_kv_heads : -num_kv_heads], heads[:, -num_kv_heads:]
            indptr = tensors.token_indptr
            common = (mask.value, TensorLayout.NHD.value, window_left, overlaps, *no_mask_nor_items)
            module.ragged_run(
                *start, keys, values, indptr, indptr, out, None, *common, softcap, layer.scale, 1.0, 1e4, 0
            )
            return
        keys, values = attention.keys_values[layer.index]
        k_scale, v_scale = attention.k_scales[layer.index], attention.v_scales[layer.index]
        index = (tensors.token_indptr, tensors.block_indptr, tensors.block_ids, tensors.last_block_lengths)
        common = (mask.value, TensorLayout.HND.value, window_left, overlaps, *no_mask_nor_items)
        no_scales = (None,) * 3
        module.paged_run(
            *start, keys, values, *index, out, None, *common, softcap, layer.scale * k_scale, *no_scales, 1.0, 1e4, 0, 0
        )
        if v_scale != 1.0:
            out *= v_scale

    def plan_for(self, layer: AttentionLayer) -> tuple[Any, list[int]]:
        """The module for `layer`, and the plan that its window shares with others."""
        module = self.attention.module(self.kernel, layer)
        if layer.window not in self.plans:
            self.plans[layer.window] = module, self.plan(module, layer.window)
        return module, self.plans[layer.window][1]

    def plan(self, module: Any, window: int | None) -> list[int]:
        """Fill the plan memory; returns the offsets in it, for the kernel."""
        attention, kernel, indices = self.attention, self.kernel, self.indices
        assert not torch.cuda.is_current_stream_capturing(), "plan before capture, by running once"
        memory = attention.plan_memory(kernel, window)
        memory.copied.synchronize()
        from_blocks = kernel.source == "blocks"
        num_rows = len(indices.lengths)
        arguments = [
            attention.workspace,
            memory.device,
            memory.host,
            torch.from_numpy(indices.token_indptr),
            torch.from_numpy(indices.block_indptr if from_blocks else indices.token_indptr),
            torch.from_numpy(indices.lengths),
            self.num_tokens,
            num_rows,
            attention.num_heads,
            attention.num_kv_heads,
            attention.block_size if from_blocks else 1,
            kernel.in_graph,
            attention.head_dim,
            attention.head_dim,
            not kernel.is_decode,
            -1 if window is None else window - 1,
        ]
        if kernel.backend == "fa2":
            chunk_size, reserved = -1, 0
            if kernel.is_decode:  # the planner's bound is (what the GPU holds - reserved) / num_kv_heads
                bound = attention.max_decode_chunks(num_rows) * attention.num_kv_heads
                reserved = BLOCKS_PER_SM * attention.num_sms - bound
            never_cuts = False
            arguments += [chunk_size, never_cuts, reserved]
        plan = list(module.plan(*arguments))
        memory.copied.record()
        return plan

    def replan(self, indices: SpanIndices) -> None:
        """For other spans in as many rows. What a captured kernel was launched with must not change."""
        self.indices = indices
        for window, (module, captured) in self.plans.items():
            plan = self.plan(module, window)
            assert plan == captured, (window, plan, captured)


class WholeDecodeGroup:
    """Decode rows whose sequences are read from end to end; there is nothing to plan."""

    def __init__(self, attention: FlashInferAttention, num_tokens: int, tensors: DeviceIndices) -> None:
        self.attention, self.num_tokens, self.tensors = attention, num_tokens, tensors

    def attend(self, layer: AttentionLayer, queries: Tensor, heads: Tensor, out: Tensor) -> None:  # noqa: ARG002
        attention, tensors = self.attention, self.tensors
        decode_attention(
            queries,
            attention.kv[:, layer.index],
            tensors.block_ids,
            tensors.block_indptr,
            tensors.last_block_lengths,
            layer.scale * attention.k_scales[layer.index],
            window=layer.window,
            softcap=layer.softcap,
            v_scale=attention.v_scales[layer.index],
            out=out,
        )

    def replan(self, indices: SpanIndices) -> None:
        pass


class FlashInferStep:
    """One step's index tensors. Where decode rows do not come first, tokens are brought into that order and back."""

    def __init__(
        self, attention: FlashInferAttention, spans: Sequence[Span], on_layer_written: Callable[[int], None] | None
    ) -> None:
        self.attention = attention
        self.on_layer_written = on_layer_written
        decodes = [i for i, span in enumerate(spans) if span.num_tokens == 1]
        prompts = [i for i, span in enumerate(spans) if span.num_tokens > 1]
        parts = [[spans[i] for i in members] for members in (decodes, prompts) if members]
        hosts = [index_spans(part, attention.block_size, attention.num_blocks) for part in parts]
        slots = np.concatenate([host.slots for host in hosts])
        arrays: list[Int64s | Int32s] = [slots, *(array for host in hosts for array in host.arrays)]
        if decodes and prompts and decodes[-1] > prompts[0]:
            rows = token_rows(spans, decodes + prompts)
            slots[rows] = slots.copy()
            arrays.append(rows)
        tensors = iter(stage(arrays, attention.kv.device))
        self.slots = next(tensors)
        self.groups = [
            self._group(part, host, DeviceIndices(*islice(tensors, len(host.arrays))))
            for part, host in zip(parts, hosts, strict=True)
        ]
        self.rows: Tensor | None = next(tensors, None)  # of the step's tokens, in the order of the groups

    def _group(self, spans: Sequence[Span], host: SpanIndices, tensors: DeviceIndices) -> Group | WholeDecodeGroup:
        if spans[0].num_tokens > 1:
            return Group(self.attention, self.attention.prompt_kernel(spans), host, tensors)
        if self.attention.cuts(spans, len(spans)):
            return Group(self.attention, CUT_DECODE, host, tensors)
        return WholeDecodeGroup(self.attention, len(spans), tensors)

    def rotate_and_store(self, layer: AttentionLayer, heads: Tensor, rotation: Rotation) -> None:
        self.attention.rotate_and_store(layer, heads, rotation, self.slots)
        self.heads = heads
        if self.on_layer_written is not None:
            self.on_layer_written(layer.index)

    def attend(self, layer: AttentionLayer, queries: Tensor) -> Tensor:
        out = queries.new_empty(queries.shape)
        self.attend_into(layer, self.heads, out)
        return out.flatten(1)

    def attend_into(self, layer: AttentionLayer, heads: Tensor, out: Tensor) -> None:
        """heads as `rotate_and_store` leaves them -> out [num_tokens, num_heads, head_dim]"""
        ordered = out
        if self.rows is not None:
            heads, ordered = heads[self.rows], torch.empty_like(out)
        queries = heads[:, : self.attention.num_heads]
        first = 0
        for group in self.groups:
            part = slice(first, first + group.num_tokens)
            group.attend(layer, queries[part], heads[part], ordered[part])
            first = part.stop
        if self.rows is not None:
            out.index_copy_(0, self.rows, ordered)


class DecodeGraphAttention:
    """Attention of a CUDA graph: at most `num_rows` decode rows, each of a sequence or of `spare_block`.

    Life: run once, capture, then `prepare` before every replay. Graphs of one `FlashInferAttention` share the
    tensors that `prepare` fills, so one that was prepared is replayed before the next is prepared.
    """

    def __init__(self, attention: FlashInferAttention, num_rows: int, spare_block: int, cuts: bool) -> None:
        assert 1 <= num_rows <= attention.max_graph_rows, (num_rows, attention.max_graph_rows)
        self.attention = attention
        self.num_rows = num_rows
        self.padding = Span(0, 1, (spare_block,))
        indices = self._indices([])
        arrays: list[Int64s | Int32s] = [indices.slots, *indices.arrays]
        self.slots, *tensors = unpack(attention.graph_indices, arrays)
        block_ids = attention.graph_indices[offsets(arrays)[-2] :]
        tensors[-1] = block_ids[: block_ids.numel() // 4 * 4].view(torch.int32)
        on_device = DeviceIndices(*tensors)
        self.group: Group | WholeDecodeGroup = WholeDecodeGroup(attention, num_rows, on_device)
        if cuts:
            self.group = Group(attention, GRAPH_CUT_DECODE, indices, on_device)
        self.prepare([])

    def prepare(self, spans: Sequence[Span]) -> None:
        """Have the next run attend for `spans` of one token each, in its first rows; does not wait for the device."""
        assert len(spans) <= self.num_rows, (len(spans), self.num_rows)
        indices = self._indices(spans)
        packed = pack([indices.slots, *indices.arrays], pinned=True)
        room = self.attention.graph_indices
        assert packed.numel() <= room.numel(), ("sequences longer than max_model_len", packed.numel(), room.numel())
        room[: packed.numel()].copy_(packed, non_blocking=True)
        self.group.replan(indices)

    def rotate_and_store(self, layer: AttentionLayer, heads: Tensor, rotation: Rotation) -> None:
        self.attention.rotate_and_store(layer, heads, rotation, self.slots)

    def attend(self, layer: AttentionLayer, queries: Tensor) -> Tensor:
        out = queries.new_empty(queries.shape)
        self.group.attend(layer, queries, queries, out)
        return out.flatten(1)

    def _indices(self, spans: Sequence[Span]) -> SpanIndices:
        rows = [*spans, *[self.padding] * (self.num_rows - len(spans))]
        return index_spans(rows, self.attention.block_size, self.attention.num_blocks)
