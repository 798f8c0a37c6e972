import json
import logging
from pathlib import Path

import pytest
import torch

from engine.executors.model_loading import load_model, make_model
from engine.model_config import load_model_config, with_quantization
from engine.models.decoder import CausalLM
from engine.weights import dummy_model_hash, dummy_weights
from tests.checkpoints import make_checkpoint
from tests.engine.models.runner import Runner, random_tokens

CPU = torch.device("cpu")


@pytest.fixture(params=["llama", "qwen2", "gemma2", "phi3"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, request.param, tokenizer=False)


def make(path: Path, seed: int = 0, dtype: torch.dtype = torch.float32, quantization: str | None = None) -> CausalLM:
    config = with_quantization(load_model_config(path), quantization)
    model = make_model(config, dtype, CPU)
    dummy_weights(model, seed, config.quantization)
    return model


def logits(path: Path, model: CausalLM, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    runner = Runner(path, 16, dtype)
    runner.model = model
    return runner.in_chunks(random_tokens(40), [40], runner.allocate(40)).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_dummy_weights_give_sane_logits(path: Path, dtype: torch.dtype, quantization: str | None) -> None:
    found = logits(path, make(path, dtype=dtype, quantization=quantization), dtype)
    assert found.isfinite().all()
    assert 0.3 < found.std() < 3
    assert found.argmax(dim=1).unique().numel() > 20


def test_dummy_weights_depend_on_the_seed_alone(path: Path) -> None:
    first, again, other = (logits(path, make(path, seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.5


def test_a_layer_has_the_same_dummy_weights_whatever_other_layers_there_are(path: Path) -> None:
    expected = dict(make(path).model.layers[1].named_parameters())
    config = json.loads((path / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "layer_types": None, "vocab_size": 300}
    (path / "config.json").write_text(json.dumps(config))
    found = dict(make(path).model.layers[1].named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_dummy_weights_need_a_config_and_nothing_else(path: Path) -> None:
    whole = make(path)
    for file in path.iterdir():
        if file.name != "config.json":
            file.unlink()
    assert torch.equal(make(path).model.embed_tokens.weight, whole.model.embed_tokens.weight)
    with pytest.raises(ValueError, match="only safetensors are loaded"):
        load_model(path, load_model_config(path), torch.float32, CPU, None)


def test_the_hash_of_dummy_weights_is_of_config_device_and_seed(path: Path) -> None:
    config = load_model_config(path)
    one = dummy_model_hash(config, CPU)
    assert one == dummy_model_hash(load_model_config(path), CPU)
    fp8, gpu = with_quantization(config, "fp8"), torch.device("cuda:0")
    assert len({one, dummy_model_hash(config, CPU, 1), dummy_model_hash(fp8, CPU), dummy_model_hash(config, gpu)}) == 4
    (path / "config.json").write_text(
        json.dumps(json.loads((path / "config.json").read_text()) | {"rms_norm_eps": 1e-4})
    )
    assert dummy_model_hash(load_model_config(path), CPU) != one


def test_a_device_without_fp8_products_is_said_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        make(path, quantization="fp8")
    [record] = caplog.records
    assert "linear layers are not multiplied in FP8: device cpu has no FP8 products" in record.message
