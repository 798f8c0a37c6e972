"""The model that is trained is the one `transformers` loads; the schedule ends; what is not learnt costs nothing."""

import json

import pytest
import torch
import transformers

from benchmarks.demo_model.evaluate import same_shape, token_f1
from benchmarks.demo_model.model import Llama, save, token_loss
from benchmarks.demo_model.tokenizer import VOCAB_SIZE
from benchmarks.demo_model.train import LAST_RATE, rate_at


@pytest.fixture(scope="module")
def model():
    made = Llama(torch.Generator().manual_seed(1))
    for weight in made.parameters():  # larger than at the beginning of training, and exact in bfloat16
        weight.data = (weight.data * 2 + (0.25 if weight.ndim == 1 else 0)).to(torch.bfloat16).float()
    return made


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save(model, path)
    return path


@torch.inference_mode()
def test_its_logits_are_those_of_transformers(model, saved):
    reference = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    ids = torch.randint(0, VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(2))
    logits = model(ids) @ model.embed_tokens.weight.T
    torch.testing.assert_close(logits, reference(ids).logits, rtol=1e-3, atol=1e-3)
    assert logits.std() > 0.1


def test_its_files_are_small_enough(saved):
    sizes = {file.name: file.stat().st_size for file in saved.glob("*.safetensors")}
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == sizes.keys()
    assert max(sizes.values()) < 16e6
    assert sum(sizes.values()) < 49e6


def test_only_targets_that_are_learnt_count():
    generator = torch.Generator().manual_seed(3)
    hidden, embedding = torch.randn(1, 4, 8, generator=generator), torch.randn(VOCAB_SIZE, 8, generator=generator)
    targets = torch.tensor([[5, -1, 7, -1]])
    expected = token_loss(hidden[:, [0, 2]], embedding, targets[:, [0, 2]])
    assert token_loss(hidden, embedding, targets).item() == pytest.approx(expected.item())


def test_the_learning_rate_rises_shortly_and_falls_to_its_end():
    rates = [rate_at(step / 1000) for step in range(1001)]
    highest = rates.index(max(rates))
    assert rates[highest] == pytest.approx(1.0)
    assert highest < 50
    assert rates[:highest] == sorted(rates[:highest])
    assert rates[highest:] == sorted(rates[highest:], reverse=True)
    assert rates[-1] == pytest.approx(LAST_RATE)


@pytest.mark.parametrize(
    ("answer", "score"),
    [('{"a": 2, "b": "y"}', 1.0), ('{"a": "2", "b": "y"}', 0.0), ('{"a": 2}', 0.0), ("no", 0.0), ('{"a": 2', 0.0)],
)
def test_json_is_right_when_its_keys_and_types_are(answer, score):
    assert same_shape(answer, '{"a": 1, "b": "x"}') == score


def test_f1_counts_shared_words():
    assert token_f1("Joins two paths.", "joins two paths.") == 1.0
    assert token_f1("joins two files", "joins two paths") == pytest.approx(2 / 3)
    assert token_f1("", "joins") == 0.0
