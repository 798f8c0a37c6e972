"""What every executor owes its callers, as checks that take one executor. `CHECKS` lists them.

Greedy sampling throughout, so that results can be compared exactly; log probabilities are compared closely.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

from engine.executors.base import Batch, Chunk, Executor, SampleSpec, StepResult
from engine.kv.device_memory import DeviceMemory
from engine.kv.memory import HostMemory
from engine.request import RequestId, SamplingParams

NUM_NEW = 8


def read_block(executor: Executor, block: int) -> bytes:
    if isinstance(executor.memory, HostMemory):
        return bytes(executor.memory.block(block))
    return bytes(_device_block(executor, block).cpu().numpy())


def write_block(executor: Executor, block: int, content: bytes) -> None:
    if isinstance(executor.memory, HostMemory):
        executor.memory.block(block)[:] = content
    else:
        _device_block(executor, block).copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))


def _device_block(executor: Executor, block: int) -> torch.Tensor:
    assert isinstance(executor.memory, DeviceMemory)
    size = executor.layout.block_bytes
    return executor.memory.tensor[block * size : (block + 1) * size]


@dataclass
class Run:
    """One sequence driven by hand through its blocks."""

    executor: Executor
    token_ids: list[int]
    block_ids: list[int]
    num_prompt: int
    banned: tuple[int, ...] = ()
    num_computed: int = 0

    def chunk(self, num_tokens: int, params: SamplingParams) -> Chunk:
        start, end = self.num_computed, self.num_computed + num_tokens
        last = end == len(self.token_ids)
        spec = SampleSpec(params, 0, self.token_ids, self.num_prompt, self.banned) if last else None
        self.num_computed = end
        if params.prompt_logprobs is None:
            return Chunk(RequestId(str(id(self))), self.token_ids[start:end], start, self.block_ids, spec)
        following = self.token_ids[start + 1 : end + 1]
        return Chunk(
            RequestId(str(id(self))),
            self.token_ids[start:end],
            start,
            self.block_ids,
            spec,
            params.prompt_logprobs,
            following,
        )


def prompt_of(executor: Executor, num_tokens: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(executor.vocab_size) for _ in range(num_tokens)]


def start(executor: Executor, prompt: Sequence[int], first_block: int = 0, *, scattered: bool = False) -> Run:
    num_blocks = executor.layout.num_blocks_for(len(prompt) + NUM_NEW)
    blocks = list(range(first_block, first_block + num_blocks))
    if scattered:
        random.Random(len(prompt)).shuffle(blocks)
    return Run(executor, list(prompt), blocks, len(prompt))


def step(
    runs: Sequence[Run],
    sizes: Sequence[int],
    on_group_done: Callable[[int], None] | None = None,
    **params: object,
) -> StepResult:
    greedy = SamplingParams(temperature=0.0, max_tokens=100, **params)  # type: ignore[arg-type]
    batch = Batch([run.chunk(size, greedy) for run, size in zip(runs, sizes, strict=True)])
    result = runs[0].executor.submit(batch, on_group_done).result()
    assert len(result.sampled) == len(result.prompt_logprobs) == len(runs)
    for run, sampled in zip(runs, result.sampled, strict=True):
        assert (sampled is None) == (run.num_computed < len(run.token_ids))
        if sampled is not None:
            assert 0 <= sampled.token_id < run.executor.vocab_size
            run.token_ids.append(sampled.token_id)
    return result


def decode(*runs: Run) -> list[list[int]]:
    """New tokens of each run, decoded together from where they are."""
    while len(runs[0].token_ids) < runs[0].num_prompt + NUM_NEW:
        step(runs, [len(run.token_ids) - run.num_computed for run in runs])
    return [run.token_ids[run.num_prompt :][:NUM_NEW] for run in runs]


def alone(executor: Executor, prompt: Sequence[int]) -> list[int]:
    return decode(start(executor, prompt))[0]


def check_description(executor: Executor) -> None:
    assert executor.memory.layout == executor.layout
    assert list(executor.layer_groups) == sorted(set(executor.layer_groups))
    assert executor.layer_groups[-1] == executor.layout.num_layers
    assert all(0 <= token_id < executor.vocab_size for token_id in executor.eos_token_ids)
    assert executor.model_hash


def check_chunks_do_not_matter(executor: Executor) -> None:
    prompt = prompt_of(executor, 37)
    whole = alone(executor, prompt)
    for sizes in ([16, 16, 5], [1] * 37, [36, 1], [3, 20, 14]):
        run = start(executor, prompt)
        for size in sizes:
            step([run], [size])
        assert decode(run) == [whole], sizes


def check_batch_mates_do_not_matter(executor: Executor) -> None:
    prompts = [prompt_of(executor, num_tokens, seed=num_tokens) for num_tokens in (1, 9, 33, 20)]
    expected = [alone(executor, prompt) for prompt in prompts]
    width = executor.layout.num_blocks_for(33 + NUM_NEW)
    runs = [start(executor, prompt, i * width) for i, prompt in enumerate(prompts)]
    step(runs, [len(run.token_ids) for run in runs])
    assert decode(*runs) == expected
    mixed = [start(executor, prompt, i * width) for i, prompt in enumerate(prompts)]
    step(mixed[:1], [1])
    step(mixed, [1, 9, 16, 20])  # a decode, two whole prompts and a part of one
    step(mixed, [1, 1, 17, 1])
    assert [run.token_ids[run.num_prompt :][:1] for run in mixed] == [tokens[:1] for tokens in expected]
    assert [tokens[:6] for tokens in decode(*mixed)] == [tokens[:6] for tokens in expected]


def check_placement_does_not_matter(executor: Executor) -> None:
    prompt = prompt_of(executor, 37)
    whole = alone(executor, prompt)
    assert decode(start(executor, prompt, first_block=5, scattered=True)) == [whole]


def check_moved_kv_goes_on_elsewhere(executor: Executor) -> None:
    prompt = prompt_of(executor, 37)
    whole = alone(executor, prompt)
    run = start(executor, prompt)
    step([run], [37])
    moved = [block + 20 for block in reversed(run.block_ids)]
    for old, new in zip(run.block_ids, moved, strict=True):
        write_block(executor, new, read_block(executor, old))
        write_block(executor, old, bytes(executor.layout.block_bytes))
    run.block_ids = moved
    assert decode(run) == [whole]


def check_only_its_own_blocks_are_written(executor: Executor) -> None:
    for block in range(executor.memory.num_blocks):
        write_block(executor, block, b"\x11" * executor.layout.block_bytes)
    run = start(executor, prompt_of(executor, 20), first_block=3, scattered=True)
    decode(run)
    for block in set(range(executor.memory.num_blocks)) - set(run.block_ids):
        assert read_block(executor, block) == b"\x11" * executor.layout.block_bytes, block


def check_groups_are_announced_in_order_when_their_kv_is_final(executor: Executor) -> None:
    layout = executor.layout
    run = start(executor, prompt_of(executor, 37))
    used = run.block_ids[: 37 // layout.block_size]
    seen: list[tuple[int, list[bytes]]] = []

    def pieces(group: int) -> list[bytes]:
        first = executor.layer_groups[group - 1] if group else 0
        span = slice(first * layout.layer_bytes, executor.layer_groups[group] * layout.layer_bytes)
        return [read_block(executor, block)[span] for block in used]

    step([run], [37], lambda group: seen.append((group, pieces(group))))
    assert [group for group, _ in seen] == list(range(len(executor.layer_groups)))
    assert all(at_call == pieces(group) for group, at_call in seen)


def check_prompt_logprobs_cover_the_prompt_whatever_the_chunks(executor: Executor) -> None:
    prompt = prompt_of(executor, 21)
    whole = step([start(executor, prompt)], [21], prompt_logprobs=2, logprobs=1).prompt_logprobs[0]
    assert whole is not None
    assert [each.token_id for each in whole] == prompt[1:]
    run = start(executor, prompt)
    parts = [step([run], [size], prompt_logprobs=2).prompt_logprobs[0] or [] for size in (8, 8, 5)]
    together = [each for part in parts for each in part]
    assert [each.token_id for each in together] == prompt[1:]
    assert [each.logprob for each in together] == pytest.approx([each.logprob for each in whole], abs=1e-3)
    single = step([start(executor, prompt[:1])], [1], prompt_logprobs=0).prompt_logprobs[0]
    assert single is not None
    assert list(single) == []


def check_logprobs_come_when_asked_for(executor: Executor) -> None:
    prompt = prompt_of(executor, 5)
    with_top = step([start(executor, prompt)], [5], logprobs=2).sampled[0]
    assert with_top is not None
    assert with_top.logprobs is not None
    assert with_top.logprobs.token_id == with_top.token_id
    assert with_top.logprobs.top[0][0] == with_top.token_id
    without = step([start(executor, prompt)], [5])
    assert without.sampled[0] is not None
    assert without.sampled[0].logprobs is None
    assert without.prompt_logprobs[0] is None


def check_banned_tokens_are_not_sampled(executor: Executor) -> None:
    prompt = prompt_of(executor, 5)
    banned: list[int] = []
    for _ in range(5):
        run = start(executor, prompt)
        run.banned = tuple(banned)
        step([run], [5])
        assert run.token_ids[-1] not in banned
        banned.append(run.token_ids[-1])


CHECKS: list[Callable[[Executor], None]] = [
    check_description,
    check_chunks_do_not_matter,
    check_batch_mates_do_not_matter,
    check_placement_does_not_matter,
    check_moved_kv_goes_on_elsewhere,
    check_only_its_own_blocks_are_written,
    check_groups_are_announced_in_order_when_their_kv_is_final,
    check_prompt_logprobs_cover_the_prompt_whatever_the_chunks,
    check_logprobs_come_when_asked_for,
    check_banned_tokens_are_not_sampled,
]
