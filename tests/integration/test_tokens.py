"""Disaggregated tokens == colocated tokens == transformers' tokens, for every family and every way KV can travel."""

import asyncio
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import transformers

from engine.executors.base import Executor
from engine.executors.torch_executor import TorchConfig, TorchExecutor
from engine.request import SamplingParams
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.fakes import LateExecutor
from tests.integration.harness import running_cluster

NUM_TOKENS = 64
PROMPT_LENGTHS = (37, 90, 5)
steps_in_flight = pytest.mark.parametrize(
    "wrap", [lambda executor: executor, LateExecutor], ids=["one-step", "two-steps-in-flight"]
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: make_checkpoint(root / family, family) for family in FAMILIES}


def prompts(vocab_size: int = 512) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(5, vocab_size, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


@functools.cache
def references(path: Path) -> list[list[int]]:
    return [reference(path, prompt)[0] for prompt in prompts()]


@functools.cache
def _model(path: Path) -> transformers.PreTrainedModel:
    # Eager: the fused attention of some releases of transformers leaves out Gemma-2's softcap.
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def reference(path: Path, prompt: Sequence[int], num_tokens: int = NUM_TOKENS) -> tuple[list[int], list[torch.Tensor]]:
    """Greedy tokens of transformers in float32, end tokens do not end it; and each step's log probabilities."""
    model = _model(path)
    tokens: list[int] = []
    logprobs: list[torch.Tensor] = []
    ids, past = torch.tensor([list(prompt)]), None
    with torch.inference_mode():
        for _ in range(num_tokens):
            out = model(ids, past_key_values=past, use_cache=True)
            past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            tokens.append(int(ids))
            logprobs.append(out.logits[0, -1].log_softmax(-1))
    return tokens, logprobs


def executor(path: Path, block_size: int = 16, num_blocks: int = 200) -> TorchExecutor:
    config = TorchConfig(
        dtype="float32", block_size=block_size, num_blocks=num_blocks, max_model_len=512, layers_per_group=1
    )
    return TorchExecutor(path, config)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("transport", "prefill_tokens"), [("shared_memory", 512), ("tcp", 16)], ids=["shared-memory-whole", "tcp-chunked"]
)
async def test_greedy_tokens_equal_the_reference(
    checkpoints: dict[str, Path], family: str, transport: str, prefill_tokens: int
) -> None:
    path = checkpoints[family]
    expected = references(path)
    async with running_cluster(
        lambda _role: executor(path), transport=transport, prefill_tokens=prefill_tokens
    ) as cluster:
        first = await asyncio.gather(*(cluster.generate(prompt, GREEDY) for prompt in prompts()))
        assert first == expected
        again = [cluster.start(prompt, GREEDY) for prompt in prompts()]  # now both sides hold prefixes
        for stream, tokens in zip(again, expected, strict=True):
            assert [token for delta in [d async for d in stream] for token in delta.token_ids] == tokens
        assert again[1].timeline.cached_tokens >= 80
        assert again[1].timeline.transfer_blocks <= 1  # only what the decode worker lacks travels
        await cluster.quiesce()


@pytest.mark.parametrize("transport", ["shared_memory", "tcp"])
@pytest.mark.parametrize("family", FAMILIES)
async def test_logits_after_a_handoff_are_those_of_the_reference(
    checkpoints: dict[str, Path], family: str, transport: str
) -> None:
    """Log probabilities of the sampled token and of the ten most likely, at every step, within 1e-4."""
    path, prompt = checkpoints[family], prompts()[1]
    tokens, expected = reference(path, prompt, 24)
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=10)
    async with running_cluster(lambda _role: executor(path), transport=transport, prefill_tokens=32) as cluster:
        got = [entry for delta in [d async for d in cluster.start(prompt, params)] for entry in delta.logprobs]
    assert [entry.token_id for entry in got] == tokens
    for entry, row in zip(got, expected, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        for token_id, logprob in entry.top:
            assert logprob == pytest.approx(float(row[token_id]), abs=1e-4)


@pytest.mark.parametrize(("prefill_block", "decode_block"), [(16, 4), (4, 16), (8, 32)])
async def test_block_sizes_may_differ_between_the_pools(
    checkpoints: dict[str, Path], prefill_block: int, decode_block: int
) -> None:
    path = checkpoints["llama"]
    sizes = {"prefill": prefill_block, "decode": decode_block}
    expected = references(path)
    async with running_cluster(lambda role: executor(path, sizes[role]), transport="tcp", prefill_tokens=48) as cluster:
        for _ in range(2):
            assert await asyncio.gather(*(cluster.generate(prompt, GREEDY) for prompt in prompts())) == expected
        await cluster.quiesce()


@steps_in_flight
async def test_sampled_text_depends_on_the_seed_and_on_nothing_else(
    checkpoints: dict[str, Path], wrap: Callable[[Executor], Executor]
) -> None:
    path = checkpoints["qwen2"]
    params = SamplingParams(temperature=1.0, top_p=0.95, max_tokens=32, ignore_eos=True, presence_penalty=1.5)
    prompt = prompts()[0]
    async with running_cluster(lambda _role: wrap(executor(path))) as cluster:
        alone = await cluster.generate(prompt, params, seed=11)
        crowd = await asyncio.gather(*(cluster.generate(prompt, params, seed=seed) for seed in (11, 12, 11, 13)))
        assert crowd[0] == crowd[2] == alone
        assert len({tuple(tokens) for tokens in crowd}) == 3
    async with running_cluster(lambda _role: executor(path), local_prefill_max_tokens=500) as colocated:
        assert await colocated.generate(prompt, params, seed=11) == alone


@steps_in_flight
async def test_more_sequences_than_the_pool_holds_all_finish_with_their_own_tokens(
    checkpoints: dict[str, Path], wrap: Callable[[Executor], Executor]
) -> None:
    """The decode pool holds fewer blocks than the requests need together: some are preempted and recomputed."""
    path = checkpoints["llama"]
    texts = [[5 + (i * 7 + j) % 500 for j in range(40)] for i in range(12)]
    expected = [reference(path, prompt, 48)[0] for prompt in texts]
    params = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)
    sizes = {"prefill": 200, "decode": 32}
    async with running_cluster(lambda role: wrap(executor(path, num_blocks=sizes[role])), prefill_tokens=64) as cluster:
        assert await asyncio.gather(*(cluster.generate(prompt, params) for prompt in texts)) == expected
        await cluster.quiesce()
