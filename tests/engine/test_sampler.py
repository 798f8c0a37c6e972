"""The sampler against a plain numpy twin, against transformers, and against itself in other batches."""

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from engine import sampler
from engine.executors.base import Sampled, SampleSpec
from engine.request import SamplingParams
from engine.sampler import prompt_logprobs, uniform

VOCAB = 97


def sample(logits: torch.Tensor, specs: list[SampleSpec]) -> list[Sampled]:
    return sampler.sample(logits, specs, [len(spec.token_ids) for spec in specs]).read()


def spec(seed: int = 0, token_ids: tuple[int, ...] = (1, 2, 3), num_prompt: int = 2, **params: Any) -> SampleSpec:
    banned = params.pop("banned", ())
    return SampleSpec(SamplingParams(**params), seed, token_ids, num_prompt, banned)


def random_logits(seed: int, rows: int = 1, vocab: int = VOCAB, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def random_spec(rng: random.Random, seed: int) -> SampleSpec:
    length = rng.randrange(1, 40)
    return spec(
        seed=seed,
        token_ids=tuple(rng.randrange(VOCAB) for _ in range(length)),
        num_prompt=rng.randrange(1, length + 1),
        temperature=rng.choice([0.0, 0.5, 1.0, 1.7]),
        top_k=rng.choice([0, 0, 1, 5, 40, 1000]),
        top_p=rng.choice([1.0, 1.0, 0.9, 0.3]),
        min_p=rng.choice([0.0, 0.0, 0.05, 0.4]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3, 0.7]),
        presence_penalty=rng.choice([0.0, 0.0, 0.8]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.5, -0.5]),
        logit_bias=rng.choice([{}, {}, {3: 5.0, 90: -100.0}]),
        banned=rng.choice([(), (), (1, 2, 3, 50)]),
        logprobs=rng.choice([None, 0, 3]),
    )


def twin_logits(row: np.ndarray, spec: SampleSpec) -> np.ndarray:
    row, params = row.astype(np.float64).copy(), spec.params
    for token_id in spec.banned_token_ids:
        row[token_id] = -np.inf
    for token_id, bias in params.logit_bias.items():
        row[token_id] += bias
    for token_id in set(spec.token_ids):
        row[token_id] *= params.repetition_penalty if row[token_id] < 0 else 1 / params.repetition_penalty
    for token_id, count in Counter(spec.token_ids[spec.num_prompt_tokens :]).items():
        row[token_id] -= params.presence_penalty + params.frequency_penalty * count
    return row


def twin_probabilities(row: np.ndarray, params: SamplingParams) -> np.ndarray:
    probabilities = np.exp((row - row.max()) / params.temperature)
    probabilities[probabilities < params.min_p * probabilities.max()] = 0
    if 0 < params.top_k < len(row):
        probabilities[probabilities < np.sort(probabilities)[-params.top_k]] = 0
    probabilities /= probabilities.sum()
    if params.top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        last = int(np.searchsorted(np.cumsum(probabilities[order]), params.top_p - 1e-12))
        probabilities[probabilities < probabilities[order[min(last, len(row) - 1)]]] = 0
        probabilities /= probabilities.sum()
    return probabilities


def twin_sample(row: np.ndarray, spec: SampleSpec) -> int:
    row = twin_logits(row, spec)
    if spec.params.greedy:
        return int(row.argmax())
    cumulative = np.cumsum(twin_probabilities(row, spec.params))
    return int(np.searchsorted(cumulative, uniform(spec.seed, len(spec.token_ids)) * cumulative[-1], side="right"))


def test_every_combination_of_parameters_agrees_with_the_numpy_twin() -> None:
    rng = random.Random(1)
    logits = random_logits(1, rows=400)
    specs = [random_spec(rng, seed) for seed in range(400)]
    tokens = [sampled.token_id for sampled in sample(logits, specs)]
    assert tokens == [twin_sample(row, spec) for row, spec in zip(logits.numpy(), specs, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_sampled_the_same_alone_and_in_any_batch(dtype: torch.dtype) -> None:
    rng = random.Random(2)
    logits = random_logits(2, rows=64).to(dtype)
    specs = [random_spec(rng, seed) for seed in range(64)]
    together = sample(logits, specs)
    assert [sample(logits[i : i + 1], specs[i : i + 1])[0] for i in range(64)] == together
    order = rng.sample(range(64), 64)
    assert sample(logits[order], [specs[i] for i in order]) == [together[i] for i in order]


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that anything makes."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple) else (made,):
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.num_bytes = max(self.num_bytes, tensor.nbytes)
        return made


@pytest.mark.parametrize("num_seen", [3, 2000])
def test_memory_is_bounded_whatever_many_rows_ask_for_and_the_results_are_the_same(
    num_seen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 rows of 4 KB; 64 KB are worked on at a time, as integers of eight bytes at most."""
    rng = random.Random(13)
    logits = random_logits(13, rows=64, vocab=1000)
    seen = tuple(rng.randrange(1000) for _ in range(num_seen))
    specs = [replace(random_spec(rng, seed), token_ids=seen, num_prompt_tokens=1) for seed in range(64)]
    whole = sample(logits, specs), prompt_logprobs(logits, range(64), 5)
    monkeypatch.setattr(sampler, "PART_BYTES", 64_000)
    with LargestTensor() as largest:
        assert (sample(logits, specs), prompt_logprobs(logits, range(64), 5)) == whole
    assert largest.num_bytes <= 2 * 64_000


def test_the_logits_given_are_not_changed() -> None:
    logits = random_logits(3)
    before = logits.clone()
    sample(logits, [spec(banned=(1,), repetition_penalty=2.0, frequency_penalty=1.0, top_p=0.5, logprobs=2)])
    assert torch.equal(logits, before)


def test_equal_logits_are_broken_by_the_lowest_id() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [70, 20, 90]] = 5.0
    assert sample(logits, [spec(temperature=0.0)])[0].token_id == 20
    assert sample(logits, [spec(top_k=1)])[0].token_id == 20
    top = sample(logits, [spec(temperature=0.0, logprobs=4)])[0].logprobs
    assert top is not None
    assert [token_id for token_id, _ in top.top] == [20, 70, 90, 0]


@pytest.mark.parametrize(
    ("params", "warper"),
    [
        ({"top_k": 7}, TopKLogitsWarper(7)),
        ({"top_p": 0.8}, TopPLogitsWarper(0.8)),
        ({"min_p": 0.1}, MinPLogitsWarper(0.1)),
    ],
)
def test_the_filters_keep_what_those_of_transformers_keep(params: dict[str, Any], warper: Any) -> None:
    logits = random_logits(4)
    kept = torch.isfinite(warper(torch.zeros(1, 1, dtype=torch.long), logits))[0]
    specs = [spec(seed=seed, **params) for seed in range(4000)]
    drawn = {sampled.token_id for sampled in sample(logits.expand(4000, -1), specs)}
    assert drawn <= set(kept.nonzero().squeeze(1).tolist())
    weights = (logits - logits.max()).exp()
    sampler._filter(weights, specs[:1])
    assert torch.equal(weights[0] > 0, kept)


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    logits, seen = random_logits(5), (4, 9, 9, 60)
    expected = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([seen]), logits.clone())
    shaped = sampler._penalize(logits, [spec(token_ids=seen, repetition_penalty=1.5)])
    assert torch.allclose(shaped, expected)


def test_presence_and_frequency_count_the_output_only() -> None:
    shaped = sampler._penalize(
        torch.zeros(1, VOCAB),
        [spec(token_ids=(5, 5, 6, 7, 7), num_prompt=2, presence_penalty=1.0, frequency_penalty=0.25)],
    )
    assert shaped[0, [5, 6, 7, 8]].tolist() == [0.0, -1.25, -1.5, 0.0]


def test_draws_follow_the_distribution() -> None:
    vocab, draws = 12, 30_000
    logits = random_logits(6, vocab=vocab, scale=1.0)
    expected = logits.double().softmax(-1)[0].numpy() * draws
    tokens = [
        sampled.token_id
        for start in range(0, draws, 5000)
        for sampled in sample(logits.expand(5000, -1), [spec(seed=start + i) for i in range(5000)])
    ]
    chi_square = ((np.bincount(tokens, minlength=vocab) - expected) ** 2 / expected).sum()
    assert chi_square < 31.3  # 11 degrees of freedom, p = 0.001


def test_uniform_numbers_are_even_over_positions_and_differ_between_seeds() -> None:
    numbers = np.array([uniform(7, position) for position in range(20_000)])
    counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 85.4  # 49 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03
    assert len({uniform(seed, 5) for seed in range(1000)}) == 1000


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
def test_an_excluded_token_is_never_drawn_even_at_the_ends_of_the_unit_interval(
    number: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "uniform", lambda _seed, _position: number)
    logits = random_logits(7, rows=200)
    rng = random.Random(7)
    specs = [replace(random_spec(rng, seed), banned_token_ids=(0, 1, 95, 96)) for seed in range(200)]
    for row, (sampled, one) in enumerate(zip(sample(logits, specs), specs, strict=True)):
        shaped = twin_logits(logits[row].numpy(), one)
        params = one.params
        allowed = {int(shaped.argmax())} if params.greedy else set(twin_probabilities(shaped, params).nonzero()[0])
        assert sampled.token_id in allowed


def test_with_everything_banned_but_one_token_that_one_comes() -> None:
    banned = tuple(token_id for token_id in range(VOCAB) if token_id != 42)
    for params in ({"temperature": 0.0}, {}, {"top_p": 1e-6}, {"temperature": 100.0, "min_p": 1.0}):
        assert sample(random_logits(8), [spec(banned=banned, **params)])[0].token_id == 42


@pytest.mark.parametrize("params", [{"temperature": 1e-5}, {"temperature": 1e-300}, {"top_p": 1e-12}, {"min_p": 1.0}])
def test_extreme_parameters_choose_the_most_likely_token(params: dict[str, Any]) -> None:
    logits = random_logits(9, rows=50)
    tokens = [sampled.token_id for sampled in sample(logits, [spec(seed=i, **params) for i in range(50)])]
    assert tokens == logits.argmax(-1).tolist()


def test_rows_with_infinite_logits_give_a_token() -> None:
    logits = torch.full((2, VOCAB), -torch.inf)
    logits[1, 33] = -1000.0
    for params in ({"temperature": 0.0}, {}, {"top_p": 0.5}, {"top_k": 3, "logprobs": 2}):
        first, second = sample(logits, [spec(**params)] * 2)
        assert first.token_id == 0
        assert second.token_id == 33


def test_a_nucleus_wider_than_the_first_look_is_still_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(10, rows=40, scale=0.1)
    specs = [spec(seed=i, top_p=0.95) for i in range(40)]
    whole = sample(logits, specs)
    monkeypatch.setattr(sampler, "NUCLEUS_SIZE", 4)
    assert sample(logits, specs) == whole


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = random_logits(11)
    own = logits.log_softmax(-1)[0]
    found = sample(logits, [spec(temperature=0.3, top_k=2, logit_bias={5: 50.0}, logprobs=3)])[0]
    assert found.token_id == 5
    assert found.logprobs is not None
    assert found.logprobs.logprob == own[5].item()
    best = own.topk(3)
    assert found.logprobs.top == tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    assert sample(logits, [spec()])[0].logprobs is None
    none_beside = sample(logits, [spec(logprobs=0)])[0].logprobs
    assert none_beside is not None
    assert none_beside.top == ()


def test_prompt_logprobs_rate_each_next_token() -> None:
    logits = random_logits(12, rows=70)
    next_ids = [i % VOCAB for i in range(69)]
    own = logits.log_softmax(-1)
    found = prompt_logprobs(logits, next_ids, 2)
    assert [one.token_id for one in found] == next_ids
    assert [one.logprob for one in found] == [own[i, token_id].item() for i, token_id in enumerate(next_ids)]
    assert [one.top[0][0] for one in found] == logits[:69].argmax(-1).tolist()
    assert prompt_logprobs(logits[:1], [], 5) == []


def test_the_ordering_key_of_top_tokens_sorts_like_floats() -> None:
    values = torch.tensor([[0.0, -0.5, torch.inf, -torch.inf, 1e-40, -1e-40, 3.5, -7.0]])
    order = sampler._most_likely(values, 8)[0].tolist()
    assert values[0, order].tolist() == sorted(values[0].tolist(), reverse=True)
