"""The torch executor on a GPU: under the contract of all executors, against transformers, and against itself."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine import sampler
from engine.engine import Engine
from engine.executors import prefill_graphs, torch_executor
from engine.executors.base import Batch, Chunk, Executor, SampleSpec
from engine.executors.cuda_setup import Peak, measure_peak
from engine.executors.torch_executor import TorchConfig, TorchExecutor
from engine.request import MAX_LOGPROBS, Request, RequestId, SamplingParams
from engine.scheduler import SchedulerConfig
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.engine.executor_contract import CHECKS
from tests.engine.test_sampler import random_logits, random_spec

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]  # a fresh machine compiles attention kernels first

FP8_KV_DIVERGENCE = 0.02  # nats; a small random model feels it more than a large one (benchmarks/gpu/fp8_accuracy.py)

GREEDY = SamplingParams(temperature=0.0)
# What FlashInfer has kernels for: the tests' usual checkpoints have smaller heads.
REAL_HEADS = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}


def gpu(path: Path, **options: Any) -> TorchExecutor:
    config = {"num_blocks": 256, "max_batch_tokens": 512, "max_num_seqs": 16, "layers_per_group": 1, **options}
    return TorchExecutor(path, TorchConfig(device="cuda", **config))


def generate(
    executor: Executor, prompts: Sequence[Sequence[int]], num_tokens: int, max_batch_tokens: int = 64, **params: Any
) -> list[list[int]]:
    """All prompts at once, as a worker loop drives an engine."""
    engine = Engine(executor, SchedulerConfig(max_batch_tokens, 16), secret="s", model="m")
    asked = SamplingParams(max_tokens=num_tokens, ignore_eos=True, **{"temperature": 0.0, **params})
    for i, prompt in enumerate(prompts):
        engine.submit(Request(RequestId(str(i)), tuple(prompt), len(prompt), asked, seed=i))
    found: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        scheduled = engine.schedule()
        if scheduled is not None:
            engine.start(scheduled)
        if scheduled is None or not engine.can_start:
            for output in engine.collect():
                found[int(output.request_id)].append(output.token_id)
        engine.check_invariants()
    return found


def random_prompts(seed: int, lengths: Sequence[int], vocab_size: int = 512) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5, vocab_size) for _ in range(length)] for length in lengths]


@torch.inference_mode()
def reference(path: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    return model.cuda().eval()


@torch.inference_mode()
def greedy(model: transformers.PreTrainedModel, prompt: Sequence[int], num_tokens: int) -> list[int]:
    ids = torch.tensor([list(prompt)], device="cuda")
    out = model.generate(ids, max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@pytest.fixture(scope="module", params=["float32-llama", "bfloat16-llama", "bfloat16-gemma2"])
def executor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Executor]:
    dtype, _, family = request.param.partition("-")
    shape = REAL_HEADS if dtype == "bfloat16" else {}
    path = make_checkpoint(tmp_path_factory.mktemp(family), family, tokenizer=False, **shape)
    executor = gpu(path, dtype=dtype, block_size=8, num_blocks=64)
    assert (executor._layers.graphs is not None) == (dtype == "bfloat16")
    yield executor
    executor.close()


# In bfloat16 the kernels for other batches round otherwise, and a random model's likeliest tokens are close.
EXACT_ONLY = {"check_batch_mates_do_not_matter", "check_chunks_do_not_matter"}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_an_executor_keeps_the_contract(check: Callable[[Executor], None], executor: Executor) -> None:
    if executor.layout.dtype != "float32" and check.__name__ in EXACT_ONLY:
        pytest.skip("exact in float32 only")
    check(executor)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_those_of_transformers_in_float32(tmp_path: Path, family: str) -> None:
    path = make_checkpoint(tmp_path, family, tokenizer=False)
    executor = gpu(path, dtype="float32")
    prompts = random_prompts(1, (37, 90, 5))
    found = generate(executor, prompts, 48)
    executor.close()
    model = reference(path, torch.float32)
    assert found == [greedy(model, prompt, 48) for prompt in prompts]


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_logits_are_as_close_to_the_truth_as_those_of_transformers(tmp_path: Path, family: str) -> None:
    path = make_checkpoint(tmp_path, family, tokenizer=False, **REAL_HEADS)
    executor = gpu(path, dtype="bfloat16")
    [prompt] = random_prompts(2, (150,))
    with torch.inference_mode():
        ids = torch.tensor([prompt], device="cuda")
        exact = reference(path, torch.float32)(ids).logits[0].log_softmax(-1)
        rounded = reference(path, torch.bfloat16)(ids).logits[0].float().log_softmax(-1)
    ours = logprobs(executor, prompt)
    executor.close()
    noise = (rounded - exact).abs()
    error = (ours - exact[: len(ours)]).abs()
    assert error.mean() < 2 * noise.mean()
    assert error.max() < 3 * noise.max()


@torch.inference_mode()
def logprobs(executor: TorchExecutor, token_ids: Sequence[int]) -> torch.Tensor:
    """Of what follows each token but the first: the first as a prompt, the others decoded one by one in a graph."""
    rows = []
    blocks = range(executor.layout.num_blocks_for(len(token_ids)))
    for position in range(len(token_ids)):
        spec = SampleSpec(SamplingParams(), 0, token_ids[: position + 1], 1)
        chunk = Chunk(RequestId("r"), [token_ids[position]], position, blocks, spec)
        hidden = executor._forward([chunk], [1], _no_marks(executor))
        rows.append(executor._model.logits(hidden)[0].float().log_softmax(-1).clone())
    return torch.stack(rows)


def _no_marks(executor: TorchExecutor) -> Any:
    from engine.executors.queued_step import GroupMarks

    return GroupMarks(executor.layer_groups, None, torch.device("cuda"))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("max_batch_tokens", [64, 512])
def test_graphs_give_the_tokens_of_a_run_without_them(tmp_path: Path, family: str, max_batch_tokens: int) -> None:
    """With as many rows as a graph has: above 64, products of other numbers of rows round otherwise."""
    path = make_checkpoint(tmp_path, family, tokenizer=False, **REAL_HEADS)
    prompts = random_prompts(3, (37, 90, 5, 16, 33, 64, 1, 10))
    assert sum(map(len, prompts)) in prefill_graphs.SIZES
    prompts += [[*prompts[1][:80], *prompt] for prompt in random_prompts(8, (5, 30))]  # begin as another one
    found = []
    for cuda_graphs in (True, False):
        executor = gpu(path, dtype="bfloat16", cuda_graphs=cuda_graphs)
        assert (executor._layers.graphs is not None) == cuda_graphs
        assert (executor._layers.prefill_graphs is not None) == cuda_graphs
        sets = [
            generate(executor, some, 40, max_batch_tokens, **params)
            for some in (prompts[:8], prompts[8:])
            for params in ({}, {"temperature": 1.0, "top_p": 0.9})
        ]
        found.append(sets)
        executor.close()
    assert found[0] == found[1]


@pytest.mark.parametrize(("kv_dtype", "max_batch_tokens"), [("auto", 512), ("auto", 201), ("fp8", 512)])
def test_a_small_step_is_not_changed_by_what_fills_it_up(tmp_path: Path, kv_dtype: str, max_batch_tokens: int) -> None:
    path = make_checkpoint(tmp_path, "llama", tokenizer=False, **{**REAL_HEADS, "head_dim": 128})
    executor = gpu(path, dtype="bfloat16", kv_dtype=kv_dtype, max_batch_tokens=max_batch_tokens)
    [prompt, other] = random_prompts(9, (200, max_batch_tokens))
    cuts = [[200], [37, 163], [100, 17, 83], [64, 64, 72]]
    graphs, executor._layers.prefill_graphs = executor._layers.prefill_graphs, None
    queued = [all_logprobs(executor, prompt, sizes) for sizes in cuts]
    noise = max((one - queued[0]).abs().max() for one in queued[1:])
    executor._layers.prefill_graphs = graphs
    all_logprobs(executor, other, [max_batch_tokens], first_block=40)  # leaves its values in every row
    kv = executor.memory.kv(getattr(torch, executor.layout.dtype)).view(torch.uint8)
    for sizes, expected in zip(cuts, queued, strict=True):
        before = kv.clone()
        assert (all_logprobs(executor, prompt, sizes) - expected).abs().max() < noise, sizes
        changed = (kv != before).flatten(1).any(1).nonzero().flatten().tolist()
        assert set(changed) <= set(range(executor.layout.num_blocks_for(200))), "only the prompt's own blocks"
    executor.close()


@torch.inference_mode()
def all_logprobs(
    executor: TorchExecutor, token_ids: Sequence[int], sizes: Sequence[int], first_block: int = 0
) -> torch.Tensor:
    """Of what follows each token, computed in chunks of `sizes`."""
    blocks = range(first_block, first_block + executor.layout.num_blocks_for(len(token_ids)))
    rows, start = [], 0
    for size in sizes:
        chunk = Chunk(RequestId("r"), token_ids[start : start + size], start, blocks)
        hidden = executor._forward([chunk], [size], _no_marks(executor))
        rows.append(executor._model.logits(hidden).float().log_softmax(-1))
        start += size
    return torch.cat(rows)


def test_steps_in_flight_change_no_token(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama", tokenizer=False, **REAL_HEADS)
    executor = gpu(path, dtype="bfloat16")
    prompts = random_prompts(4, (37, 90, 5, 16, 33))
    together = generate(executor, prompts, 40, presence_penalty=0.1), generate(executor, prompts, 40, temperature=0.8)
    executor.max_in_flight = 1
    alone = generate(executor, prompts, 40, presence_penalty=0.1), generate(executor, prompts, 40, temperature=0.8)
    executor.close()
    assert together == alone


def test_fp8_keys_and_values_cost_little(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama", tokenizer=False, **{**REAL_HEADS, "head_dim": 128})
    [prompt] = random_prompts(5, (150,))
    exact = gpu(path, dtype="bfloat16")
    rounded = gpu(path, dtype="bfloat16", kv_dtype="fp8")
    assert rounded.layout.block_bytes * 2 == exact.layout.block_bytes
    truth, found = logprobs(exact, prompt), logprobs(rounded, prompt)
    exact.close()
    rounded.close()
    divergence = (truth.exp() * (truth - found)).sum(-1)  # Kullback-Leibler, per position
    assert divergence.mean() < FP8_KV_DIVERGENCE
    assert found.isfinite().all()


def test_the_same_seed_samples_the_same_tokens_on_cpu_and_gpu(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama", tokenizer=False)
    prompts = random_prompts(6, (37, 12))
    params = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1}
    on_gpu = gpu(path, dtype="float32")
    on_cpu = TorchExecutor(path, TorchConfig(num_blocks=256, dtype="float32"))
    assert generate(on_gpu, prompts, 40, **params) == generate(on_cpu, prompts, 40, **params)
    on_gpu.close()
    on_cpu.close()


def test_the_step_that_memory_is_measured_with_covers_what_requests_may_ask_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """512 rows of a large vocabulary, all with penalties and log probabilities; and those of a prompt."""
    path = make_checkpoint(
        tmp_path, "llama", tokenizer=False, dtype=torch.bfloat16, vocab_size=1 << 17, num_hidden_layers=1, **REAL_HEADS
    )
    peaks: list[Peak] = []
    monkeypatch.setattr(torch_executor, "measure_peak", lambda *args: peaks.append(measure_peak(*args)) or peaks[0])
    executor = gpu(path, num_blocks=None, gpu_memory_fraction=0.2, max_batch_tokens=512, max_num_seqs=512)
    params = SamplingParams(repetition_penalty=1.2, frequency_penalty=0.5, top_p=0.9, logprobs=MAX_LOGPROBS)
    everything = SampleSpec(params, seed=0, token_ids=range(1000), num_prompt_tokens=1)
    tokens = list(range(512))
    prompt = Chunk(RequestId("p"), tokens, 0, range(32), None, MAX_LOGPROBS, tokens[1:])
    specs = [replace(everything, params=GREEDY) if i % 50 == 0 else everything for i in tokens]
    decodes = [Chunk(RequestId(str(i)), [i], 0, [i], spec) for i, spec in enumerate(specs)]
    for chunks in (decodes, [prompt]):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        executor.submit(Batch(chunks)).result()
        assert torch.cuda.max_memory_allocated() - before <= peaks[0].step
    executor.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_sampled_a_few_at_a_time_give_what_they_give_together(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(6)
    specs = [random_spec(rng, seed) for seed in range(64)]
    logits = random_logits(6, rows=64).to(dtype).cuda()
    found = []
    for num_rows in (64, 5, 1):
        monkeypatch.setattr(sampler, "PART_BYTES", num_rows * 4 * (logits.shape[-1] + 4 * 40))
        choice = sampler.sample(logits, specs, [len(spec.token_ids) for spec in specs])
        torch.cuda.synchronize()
        found.append((choice.read(), sampler.prompt_logprobs(logits, list(range(64)), 5)))
    assert found[0] == found[1] == found[2]


def test_the_pool_is_sized_from_what_is_free_after_the_largest_step(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama", tokenizer=False, **REAL_HEADS)
    total = torch.cuda.mem_get_info()[1]
    executor = gpu(path, num_blocks=None, gpu_memory_fraction=0.1, dtype="bfloat16")
    taken = executor.memory.num_blocks * executor.layout.block_bytes
    assert 0.06 * total < taken < 0.1 * total
    batch = Batch([Chunk(RequestId("r"), list(range(5, 500)), 0, range(64))])
    executor.submit(batch).result()
    executor.close()
    with pytest.raises(ValueError, match=r"no room for 0\.0 GiB of KV: 0% of the GPU's"):
        gpu(path, num_blocks=None, gpu_memory_fraction=0.001)
    with pytest.raises(ValueError, match=r"no room for .* GiB of KV: 100% of the GPU's .* are free"):
        gpu(path, num_blocks=1 << 32)
