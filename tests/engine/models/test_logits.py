import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.checkpoints import make_checkpoint
from tests.engine.models.cases import CASES
from tests.engine.models.runner import Piece, Reference, Runner, random_tokens

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(case: str) -> Path:
        if case not in made:
            made[case] = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), tokenizer=False, **CASES[case])
        return made[case]

    return get


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.3  # the comparison means something
    assert (ours - theirs).abs().max() < TOLERANCE  # also false for NaN


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("block_size", [4, 16])
def test_logits_agree_with_transformers_however_the_prompt_is_cut(
    checkpoint: Callable[[str], Path], case: str, block_size: int
) -> None:
    token_ids = random_tokens(75)
    expected = Reference(checkpoint(case)).logits(token_ids)
    runner = Runner(checkpoint(case), block_size)
    assert_close(runner.in_chunks(token_ids, [75], runner.allocate(75)), expected)
    assert_close(runner.in_chunks(token_ids, [1, 2, 30, 1, 1, 17, 23], runner.allocate(75)), expected)


@pytest.mark.parametrize("case", CASES)
def test_a_prefix_that_is_present_is_continued(checkpoint: Callable[[str], Path], case: str) -> None:
    first, second = random_tokens(60, seed=1), random_tokens(60, seed=2)
    second[:32] = first[:32]
    runner = Runner(checkpoint(case), block_size=16)
    blocks = runner.allocate(60)
    runner.in_chunks(first, [60], blocks)
    [logits] = runner.step(Piece(second[32:], 32, blocks[:2] + runner.allocate(28)))
    assert_close(logits, Reference(checkpoint(case)).logits(second)[32:])


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen3", "gemma2"])
def test_batch_mates_of_any_length_do_not_change_the_logits(checkpoint: Callable[[str], Path], case: str) -> None:
    rng = random.Random(3)
    runner = Runner(checkpoint(case), block_size=4)
    sequences = [random_tokens(size, seed=size) for size in (1, 5, 12, 13, 40, 64, 90)]
    blocks = [runner.allocate(len(tokens)) for tokens in sequences]
    done = [0] * len(sequences)
    logits: list[list[torch.Tensor]] = [[] for _ in sequences]
    while any(done[i] < len(tokens) for i, tokens in enumerate(sequences)):
        chosen = [i for i, tokens in enumerate(sequences) if done[i] < len(tokens) and rng.random() < 0.8]
        rng.shuffle(chosen)
        pieces = []
        for i in chosen:
            size = min(rng.choice((1, 1, 1, 7, 20)), len(sequences[i]) - done[i])
            pieces.append(Piece(sequences[i][done[i] : done[i] + size], done[i], blocks[i]))
            done[i] += size
        if pieces:
            for i, rows in zip(chosen, runner.step(*pieces), strict=True):
                logits[i].append(rows)
    reference = Reference(checkpoint(case))
    for tokens, rows in zip(sequences, logits, strict=True):
        assert_close(torch.cat(rows), reference.logits(tokens))


@pytest.mark.parametrize("case", ["llama", "mistral", "gemma2", "qwen2"])
def test_bfloat16_stays_as_close_to_float32_as_transformers_does(checkpoint: Callable[[str], Path], case: str) -> None:
    token_ids = random_tokens(40)
    exact = Reference(checkpoint(case)).logits(token_ids)
    theirs = Reference(checkpoint(case), torch.bfloat16).logits(token_ids).float()
    runner = Runner(checkpoint(case), 16, torch.bfloat16)
    ours = runner.in_chunks(token_ids, [20, 1, 1, 18], runner.allocate(40)).float()
    assert (ours - exact).square().mean() < 1.5 * (theirs - exact).square().mean()
