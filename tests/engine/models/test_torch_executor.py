import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.attention.base import Span
from engine.executors import cuda_setup
from engine.executors.base import Batch, Chunk, SampleSpec
from engine.executors.host_pool import check_memory
from engine.executors.torch_executor import TorchConfig, TorchExecutor, layer_group_ends, num_blocks_asked
from engine.kv.layout import KvLayout
from engine.request import MAX_LOGPROBS, RequestId, SamplingParams
from engine.sampler import sample
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.engine.models.runner import Reference, random_tokens

GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama", num_hidden_layers=3, tokenizer=False)


@pytest.fixture
def executor(llama: Path) -> Iterator[TorchExecutor]:
    executor = TorchExecutor(llama, TorchConfig(num_blocks=64, block_size=4))
    yield executor
    executor.close()


def chunk(
    token_ids: list[int], start: int, end: int, block_ids: list[int], params: SamplingParams | None = GREEDY
) -> Chunk:
    sample = None
    if params is not None and end == len(token_ids):
        sample = SampleSpec(params, seed=1, token_ids=token_ids, num_prompt_tokens=len(token_ids))
    return Chunk(RequestId("r"), token_ids[start:end], start, block_ids, sample)


def greedy_tokens(
    executor: TorchExecutor, prompts: list[list[int]], num_tokens: int, cuts: list[int]
) -> list[list[int]]:
    """All prompts at once: each in pieces of `cuts` tokens in turn, then token by token. Scattered blocks."""
    sequences = [list(prompt) for prompt in prompts]
    per_sequence = executor.layout.num_blocks_for(max(map(len, prompts)) + num_tokens)
    blocks = [[i + len(prompts) * j for j in range(per_sequence)] for i in range(len(prompts))]
    done = [0] * len(prompts)
    step = 0
    while any(len(s) < len(p) + num_tokens for s, p in zip(sequences, prompts, strict=True)):
        members = [i for i, p in enumerate(prompts) if len(sequences[i]) < len(p) + num_tokens]
        chunks = []
        for i in members:
            end = min(len(sequences[i]), done[i] + cuts[step % len(cuts)])
            chunks.append(chunk(sequences[i], done[i], end, blocks[i]))
            done[i] = end
        for i, sampled in zip(members, executor.submit(Batch(chunks)).result().sampled, strict=True):
            if sampled is not None:
                sequences[i].append(sampled.token_id)
        step += 1
    return [s[len(p) :] for s, p in zip(sequences, prompts, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_those_of_transformers(tmp_path: Path, family: str) -> None:
    path = make_checkpoint(tmp_path, family, tokenizer=False)
    prompts = [random_tokens(size, seed=size) for size in (40, 7, 23)]
    reference = Reference(path)
    expected = [reference.greedy(prompt, 64) for prompt in prompts]
    for block_size, cuts in ((4, [9, 3, 11]), (16, [64])):
        executor = TorchExecutor(path, TorchConfig(num_blocks=96, block_size=block_size))
        assert greedy_tokens(executor, prompts, 64, cuts) == expected
        assert greedy_tokens(executor, prompts[:1], 64, cuts) == expected[:1]
        executor.close()


def test_only_chunks_that_ask_are_sampled_and_results_keep_their_order(executor: TorchExecutor, llama: Path) -> None:
    first, second, third = random_tokens(12), random_tokens(6, seed=1), random_tokens(9, seed=2)
    batch = Batch([chunk(first, 0, 12, [3, 9, 1]), chunk(second, 0, 5, [8, 2]), chunk(third, 0, 9, [30, 10, 20])])
    sampled = executor.submit(batch).result().sampled
    reference = Reference(llama)
    assert sampled[1] is None
    assert [sampled[i].token_id for i in (0, 2)] == [  # type: ignore[union-attr]
        int(reference.logits(tokens)[-1].argmax()) for tokens in (first, third)
    ]


def test_a_group_is_announced_in_order_when_its_kv_is_in_memory_and_later_layers_are_not(llama: Path) -> None:
    executor = TorchExecutor(llama, TorchConfig(num_blocks=8, block_size=4, layers_per_group=2))
    assert executor.layer_groups == (2, 3)
    layer_bytes = executor.layout.layer_bytes
    seen = []

    def written(block_id: int, layer: int) -> bool:
        block = executor.memory.block(block_id)
        return any(block[layer * layer_bytes : (layer + 1) * layer_bytes])

    def on_group_done(group: int) -> None:
        seen.append((group, [written(5, layer) for layer in range(3)]))

    executor.submit(Batch([chunk(random_tokens(4), 0, 4, [5])]), on_group_done).result()
    assert seen == [(0, [True, True, False]), (1, [True, True, True])]
    assert not any(written(block_id, layer) for block_id in (0, 1, 2, 3, 4, 6, 7) for layer in range(3))
    executor.close()


def test_prompt_logprobs_are_the_models_own_across_chunks(
    executor: TorchExecutor, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.sampler.PART_BYTES", 3 * 4 * 512)  # three rows at a time
    tokens, blocks = random_tokens(21), [7, 3, 5, 1, 40, 41]
    found = []
    for start, end in ((0, 8), (8, 21)):
        asked = Chunk(
            RequestId("r"),
            tokens[start:end],
            start,
            blocks,
            prompt_logprobs=2,
            next_token_ids=tokens[start + 1 : end + 1],
        )
        mate = chunk(random_tokens(5), 0, 5, [60, 61])
        result = executor.submit(Batch([mate, asked])).result()
        assert result.prompt_logprobs[0] is None
        found += result.prompt_logprobs[1] or []
    expected = Reference(llama).logits(tokens).log_softmax(-1)
    assert [logprobs.token_id for logprobs in found] == tokens[1:]
    for row, logprobs in enumerate(found):
        assert logprobs.logprob == pytest.approx(float(expected[row, tokens[row + 1]]), abs=1e-4)
        assert [token for token, _ in logprobs.top] == expected[row].topk(2).indices.tolist()


@pytest.mark.parametrize(
    ("stored", "asked", "used"),
    [
        (torch.bfloat16, "auto", "bfloat16"),
        (torch.float16, "auto", "float32"),
        (torch.float16, "float16", "float16"),
        (torch.bfloat16, "float32", "float32"),
        (torch.float32, "bfloat16", "bfloat16"),
    ],
)
def test_every_stored_type_runs_in_the_type_asked_for(
    tmp_path: Path, stored: torch.dtype, asked: str, used: str
) -> None:
    path = make_checkpoint(tmp_path, "llama", dtype=stored, tokenizer=False)
    executor = TorchExecutor(path, TorchConfig(num_blocks=16, dtype=asked))
    assert executor.layout.dtype == used
    tokens = random_tokens(30)
    [sampled] = executor.submit(Batch([chunk(tokens, 0, 30, [4, 2])])).result().sampled
    assert sampled is not None
    exact = Reference(path).logits(tokens)[-1]
    assert exact.max() - exact[sampled.token_id] < (1e-3 if used == "float32" else 0.2)
    executor.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be auto or one of float32, bfloat16, float16, not 'int8'"),
        ({"max_model_len": 1025}, "between 1 and the model's 1024 positions, not 1025"),
        ({"max_model_len": 100, "num_blocks": 6}, "max_model_len 100 needs 7 blocks of 16 tokens"),
        ({"num_blocks": 0}, "kv_cache.num_blocks must be at least 1, not 0"),
        ({"layers_per_group": 0}, "layers_per_group must be at least 1, not 0"),
        ({"device": "tpu"}, "device must be cpu or cuda, not 'tpu'"),
        ({"gpu_memory_fraction": 7.0}, "gpu_memory_fraction must be above 0 and at most 1, not 7.0"),
        ({"block_size": 15}, "block_size must be a power of two, not 15"),
        ({"kv_dtype": "fp8"}, "kv_cache.dtype fp8 is for device cuda"),
        ({"num_blocks": 1 << 40}, "GiB are available beside the weights"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(llama: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TorchExecutor(llama, TorchConfig(**({"num_blocks": 64} | options)))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_for_less_than_one_block_is_refused_with_the_bytes_of_one(device: str) -> None:
    layout = KvLayout(num_layers=2, num_kv_heads=2, head_dim=16, block_size=16, dtype="float32")
    assert num_blocks_asked(TorchConfig(device=device, kv_memory=3 * 8192 - 1), layout) == 2
    for num_bytes in (0, 8191):
        with pytest.raises(ValueError, match=rf"kv_cache\.memory must be at least the 8192 bytes .* not {num_bytes}"):
            num_blocks_asked(TorchConfig(device=device, kv_memory=num_bytes), layout)


def test_limits_default_to_what_model_and_blocks_allow(llama: Path) -> None:
    for num_blocks, expected in ((4, 64), (100, 1024)):
        executor = TorchExecutor(llama, TorchConfig(num_blocks=num_blocks))
        assert executor.max_model_len == expected
        assert (executor.vocab_size, executor.eos_token_ids) == (512, (0, 1))
        executor.close()


def test_a_pool_that_does_not_fit_is_refused_with_the_numbers() -> None:
    layout = KvLayout(num_layers=2, num_kv_heads=2, head_dim=16, block_size=16, dtype="float32")
    check_memory(layout, 1024, available=8 << 20)
    with pytest.raises(ValueError, match=r"2048 KV blocks of 8192 bytes need 0\.0 GiB.* at most 1024 fit"):
        check_memory(layout, 2048, available=8 << 20)


def test_memory_is_measured_with_what_requests_may_ask_for(
    executor: TorchExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled: list[SampleSpec] = []

    def noting(logits: torch.Tensor, specs: list[SampleSpec], positions: list[int]) -> None:
        assert len(logits) == len(specs)
        sampled.extend(specs)
        sample(logits, specs, positions)

    monkeypatch.setattr(cuda_setup, "sample", noting)
    cuda_setup.run_step(executor._model, executor._layers, [Span(0, 9, range(3))], 4, 1000)
    assert {spec.params.greedy for spec in sampled} == {True, False}
    everything = [spec for spec in sampled if spec.params.has_penalties and spec.params.logprobs == MAX_LOGPROBS]
    assert [len(spec.token_ids) for spec in everything] == [1000] * 3


def test_layer_groups_cover_all_layers() -> None:
    assert layer_group_ends(32, None) == (8, 16, 24, 30, 32)
    assert layer_group_ends(18, None) == (4, 8, 12, 16, 17, 18)
    assert layer_group_ends(3, None) == (1, 2, 3)
    assert layer_group_ends(1, None) == (1,)
    assert layer_group_ends(7, 3) == (3, 6, 7)
    assert layer_group_ends(2, 9) == (2,)


def test_closing_gives_the_memory_back(llama: Path) -> None:
    executor = TorchExecutor(llama, TorchConfig(num_blocks=4))
    executor.close()
    assert executor.memory.fd == -1
