"""The prefill role with its layers outside PyTorch, handing over to decode workers that compute in PyTorch.

The graphs that TensorRT engines are compiled from run in onnxruntime; executor, gather, scatter, announcements and
everything else are those of a worker with engines.
"""

import asyncio
from collections.abc import Callable

import pytest

from engine.executors.base import Executor
from engine.executors.torch_executor import TorchExecutor
from engine.request import SamplingParams
from tests.exported import Exported
from tests.integration.harness import running_cluster
from tests.integration.test_tokens import GREEDY, prompts, reference, references

SIZES = {"num_blocks": 200, "max_model_len": 512, "max_batch_tokens": 512}


def by_role(made: Exported, **config: object) -> Callable[[str], Executor]:
    def make(role: str) -> TorchExecutor:
        return made.executor(**SIZES, **config) if role == "prefill" else made.in_torch(**SIZES)

    return make


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("transport", "prefill_tokens", "max_call_tokens"),
    [("shared_memory", 512, None), ("tcp", 48, 20)],
    ids=["several-prompts-in-a-step", "chunked-and-cut"],
)
async def test_tokens_equal_those_of_transformers(
    exported: Callable[[str], Exported], family: str, transport: str, prefill_tokens: int, max_call_tokens: int | None
) -> None:
    made = exported(family)
    expected = references(made.checkpoint)
    make = by_role(made, max_call_tokens=max_call_tokens)
    async with running_cluster(make, transport=transport, prefill_tokens=prefill_tokens) as cluster:
        assert await asyncio.gather(*(cluster.generate(prompt, GREEDY) for prompt in prompts())) == expected
        again = [cluster.start(prompt, GREEDY) for prompt in prompts()]
        for stream, tokens in zip(again, expected, strict=True):
            assert [token for delta in [d async for d in stream] for token in delta.token_ids] == tokens
        assert again[1].timeline.cached_tokens >= 80
        await cluster.quiesce()


async def test_a_prompt_goes_on_from_a_prefix_that_both_pools_hold(exported: Callable[[str], Exported]) -> None:
    made = exported("llama")
    shared = prompts()[1]
    longer = [shared + tail for tail in ([7, 8, 9], [11] * 40)]
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    async with running_cluster(by_role(made), prefill_tokens=64) as cluster:
        await cluster.generate(shared, params)
        streams = [cluster.start(prompt, params) for prompt in longer]
        for stream, prompt in zip(streams, longer, strict=True):
            tokens = [token for delta in [d async for d in stream] for token in delta.token_ids]
            assert tokens == reference(made.checkpoint, prompt, 24)[0]
            assert stream.timeline.cached_tokens >= 80
        await cluster.quiesce()


async def test_log_probabilities_of_a_prompt_equal_those_of_pytorch(exported: Callable[[str], Exported]) -> None:
    made, prompt = exported("llama"), prompts()[0]
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    found = []
    for make in (by_role(made, max_call_tokens=8), lambda _role: made.in_torch(**SIZES)):
        async with running_cluster(make, prefill_tokens=16) as cluster:
            stream = cluster.start(prompt, params)
            sampled = [entry for delta in [d async for d in stream] for entry in delta.logprobs]
            found.append([*(stream.prompt_logprobs or ()), *sampled])
    assert [entry.token_id for entry in found[0]] == [entry.token_id for entry in found[1]]
    assert len(found[0]) == len(prompt) - 1 + 4
    for ours, theirs in zip(*found, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
