"""What a worker on a GPU is made of beside its weights: attention kernels, a KV pool as large as fits, CUDA graphs."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.attention.base import AttentionBackend, Span
from engine.attention.paged import PagedAttention
from engine.executors.base import SampleSpec
from engine.executors.cuda_graphs import CapturableAttention, DecodeGraphs
from engine.executors.prefill_graphs import PrefillGraphs, SplitAttention
from engine.executors.step_forward import StepForward, TorchForward
from engine.kv.device_memory import DeviceMemory
from engine.kv.layout import KvLayout
from engine.layers.fp8 import FIRST_CAPABILITY
from engine.models.decoder import CausalLM
from engine.request import MAX_LOGPROBS, SamplingParams
from engine.sampler import part_rows, prompt_logprobs, sample
from engine.weights import KvScales

log = logging.getLogger(__name__)

GIB = 1 << 30
LAST_TOKENS = 512
MARGIN_BYTES = GIB  # CUDA's own memory, loaded kernels, captured graphs, fragments
RANDOM = SampleSpec(SamplingParams(top_k=50, top_p=0.9), seed=0, token_ids=(0,), num_prompt_tokens=1)
GREEDY = SampleSpec(SamplingParams(temperature=0.0), seed=0, token_ids=(0,), num_prompt_tokens=1)
EVERYTHING = SamplingParams(
    repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.5, logit_bias={0: 1.0}, logprobs=MAX_LOGPROBS
)
# Kernels are compiled anew for one row, for rows in multiples of 16, and for sizes of their tiles.
WARM_UP_TOKENS = (1, 2, 16, 17, 33, 48, 65, 80)


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest step there can be; `max_graph_rows` 0: no CUDA graphs."""

    max_batch_tokens: int
    max_num_seqs: int
    max_model_len: int
    max_graph_rows: int


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes that PyTorch holds: `kept` between steps, `step` more while the largest step runs."""

    kept: int
    step: int


LayerMaker = Callable[[torch.Tensor, StepLimits], StepForward]  # over a KV pool, as it lies in memory


def make_attention(
    kv: torch.Tensor, model: CausalLM, limits: StepLimits, kv_scales: KvScales | None
) -> AttentionBackend:
    """FlashInfer where it is installed and has kernels, else PyTorch's own operators. Raises ValueError for FP8 KV."""
    config, dtype = model.config, model.rotary.dtype
    capability = torch.cuda.get_device_capability(kv.device)
    if kv.dtype != dtype and capability < FIRST_CAPABILITY:
        needed, found = (".".join(map(str, numbers)) for numbers in (FIRST_CAPABILITY, capability))
        raise ValueError(f"kv_cache.dtype fp8 needs a GPU of compute capability {needed}, and this one has {found}")
    missing = ""
    try:
        from engine.attention.flashinfer import FlashInferAttention, supports
    except ImportError as error:
        missing = f"FlashInfer cannot be imported ({error}); pip install flashinfer-python"
    else:
        if supports(dtype, config.head_dim, kv.dtype):
            k_scales, v_scales = zip(*kv_scales, strict=True) if kv_scales else (None, None)
            attention = FlashInferAttention(
                kv,
                config.num_heads,
                dtype,
                max_graph_rows=limits.max_graph_rows,
                max_model_len=limits.max_model_len,
                k_scales=k_scales,
                v_scales=v_scales,
            )
            attention.load(model.attention_layers())
            return attention
        missing = f"FlashInfer has no kernel for {dtype} with head_dim {config.head_dim}"
    if kv.dtype != dtype:
        raise ValueError(f"kv_cache.dtype fp8 needs FlashInfer's kernels: {missing}")
    log.warning("attention runs in PyTorch operators, without CUDA graphs: %s", missing)
    return PagedAttention(kv)


def capture_graphs(model: CausalLM, layers: TorchForward, limits: StepLimits, spare_block: int) -> None:
    """For `layers`, unless its attention cannot be captured."""
    if limits.max_graph_rows == 0:
        return
    pool = torch.cuda.graph_pool_handle()
    if isinstance(layers.attention, CapturableAttention):
        graphs = DecodeGraphs(model, layers.attention, limits.max_graph_rows, spare_block)
        graphs.capture(pool)
        layers.graphs = graphs
    if isinstance(layers.attention, SplitAttention):
        prefill_graphs = PrefillGraphs(model, layers.attention, limits.max_batch_tokens)
        prefill_graphs.capture(pool)
        layers.prefill_graphs = prefill_graphs


def warm_up(model: CausalLM, layers: StepForward, memory: DeviceMemory, max_tokens: int) -> None:
    """Compile and load what steps of any size need, so that no request waits for it. Before there are requests."""
    layout = memory.layout
    for num_tokens in WARM_UP_TOKENS:
        if num_tokens <= min(max_tokens, memory.num_blocks * layout.block_size):
            prompt = [Span(0, num_tokens, range(layout.num_blocks_for(num_tokens)))]
            decodes = [Span(0, 1, (0,))] * num_tokens
            for spans in (prompt, decodes):
                run_step(model, layers, spans, num_tokens, 1)


def measure_peak(
    model: CausalLM,
    make_layers: LayerMaker,
    layout: KvLayout,
    limits: StepLimits,
    device: torch.device,
    held: int = 0,
) -> Peak:
    """Run the largest step, and one at the end of the longest sequence, over one KV block: its content does not matter.

    `held` bytes that PyTorch does not know of are kept as well. Raises ValueError if that cannot be.
    """
    try:
        torch.cuda.synchronize(device)
        kept = torch.cuda.memory_allocated(device)
        memory = DeviceMemory(layout, 1, device)
        layers = make_layers(memory.kv(getattr(torch, layout.dtype)), limits)
        torch.cuda.synchronize(device)
        own = torch.cuda.memory_allocated(device) - memory.tensor.numel()
        step = 0
        for spans, num_sampled in (
            (whole_prompts(layout, limits), limits.max_num_seqs),
            (last_tokens(layout, limits), 1),
        ):
            torch.cuda.reset_peak_memory_stats(device)
            run_step(model, layers, spans, num_sampled, limits.max_model_len)
            torch.cuda.synchronize(device)
            step += torch.cuda.max_memory_allocated(device) - memory.tensor.numel() - own
    except torch.OutOfMemoryError as error:
        _, total = torch.cuda.mem_get_info(device)
        raise ValueError(
            f"a step of {limits.max_batch_tokens} tokens does not fit beside the weights, which take "
            f"{kept / GIB:.1f} of the GPU's {total / GIB:.1f} GiB: lower scheduler.max_batch_tokens or "
            f"scheduler.max_num_seqs, or free memory on the GPU ({error})"
        ) from error
    del layers
    memory.close()
    torch.cuda.empty_cache()
    return Peak(own + max(0, held), step)


def bytes_outside_pytorch(device: torch.device) -> int:
    """Of the GPU's memory: what other libraries, CUDA and other processes have."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def num_blocks_that_fit(layout: KvLayout, peak: Peak, device: torch.device, fraction: float, least: int = 1) -> int:
    """KV blocks for a worker that may use `fraction` of the GPU. Raises ValueError with the numbers if fewer fit than
    `least`."""
    free, total = torch.cuda.mem_get_info(device)
    room = min(int(total * fraction) - peak.kept, free) - peak.step - MARGIN_BYTES
    numbers = (
        f"{fraction:.0%} of the GPU's {total / GIB:.1f} GiB are this worker's, and {free / GIB:.1f} GiB are free; "
        f"weights and workspaces take {peak.kept / GIB:.1f} GiB, the largest step {peak.step / GIB:.1f} GiB more, "
        f"CUDA {MARGIN_BYTES / GIB:.1f} GiB"
    )
    if room < least * layout.block_bytes:
        raise ValueError(
            f"no room for {least * layout.block_bytes / GIB:.1f} GiB of KV: {numbers}. Free memory on the GPU, raise "
            "gpu_memory_fraction, or lower kv_cache.memory, scheduler.max_batch_tokens or scheduler.max_num_seqs"
        )
    log.info("KV may take %.1f GiB: %s", room / GIB, numbers)
    return room // layout.block_bytes


def make_pool(layout: KvLayout, num_blocks: int, device: torch.device) -> DeviceMemory:
    """With one spare block, for the padding of batches. Raises ValueError when it does not fit."""
    try:
        return DeviceMemory(layout, num_blocks, device, spare_blocks=1)
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise ValueError(
            f"{num_blocks} KV blocks of {layout.block_bytes} bytes need {num_blocks * layout.block_bytes / GIB:.1f} "
            f"GiB, and {free / GIB:.1f} of the GPU's {total / GIB:.1f} GiB are free. Lower kv_cache.memory or "
            "kv_cache.num_blocks"
        ) from error


def whole_prompts(layout: KvLayout, limits: StepLimits) -> list[Span]:
    """`max_batch_tokens` of them, all in block 0."""
    sizes = [limits.max_model_len] * (limits.max_batch_tokens // limits.max_model_len)
    if rest := limits.max_batch_tokens % limits.max_model_len:
        sizes.append(rest)
    return [Span(0, size, [0] * layout.num_blocks_for(size)) for size in sizes]


def last_tokens(layout: KvLayout, limits: StepLimits) -> list[Span]:
    """A few, of the longest sequence: what attention needs for its length, it needs for any number of them."""
    num_tokens = min(LAST_TOKENS, limits.max_batch_tokens, limits.max_model_len)
    block_ids = [0] * layout.num_blocks_for(limits.max_model_len)
    return [Span(limits.max_model_len - num_tokens, num_tokens, block_ids)]


@torch.inference_mode()
def run_step(model: CausalLM, layers: StepForward, spans: list[Span], num_sampled: int, num_seen: int) -> None:
    """A step that samples `num_sampled` rows, if it has as many, in each way: for penalties after `num_seen` tokens."""
    device = model.model.embed_tokens.weight.device
    num_tokens = sum(span.num_tokens for span in spans)
    token_ids = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    hidden = layers.run(token_ids, spans, None, None)
    vocab = model.config.vocab_size
    num_rows = min(num_sampled, num_tokens)
    for specs in sampling_kinds(num_rows, vocab, num_seen):
        sample(model.logits(hidden[:num_rows])[: len(specs)], specs, [1] * len(specs))
    num_rows = min(part_rows(vocab), num_tokens)
    prompt_logprobs(model.logits(hidden[:num_rows]), [0] * num_rows, MAX_LOGPROBS)


def sampling_kinds(num_rows: int, vocab: int, num_seen: int) -> list[list[SampleSpec]]:
    """Random and greedy rows, random rows, and rows that ask for everything: of these as many as are done at a time."""
    seen = tuple(token_id % vocab for token_id in range(num_seen))
    demanding = SampleSpec(EVERYTHING, seed=0, token_ids=seen, num_prompt_tokens=0)
    mixed = [RANDOM if row % 2 else GREEDY for row in range(num_rows)]
    part = [demanding, GREEDY, *[demanding] * num_rows][: min(num_rows, part_rows(vocab, num_seen))]
    return [mixed, [RANDOM] * num_rows, part]
