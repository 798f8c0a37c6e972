import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.executors.model_loading import load_model, make_model
from engine.layers.fp8 import dequantize_weight, quantize_weight
from engine.layers.linear import Linear
from engine.model_config import load_model_config, with_quantization
from engine.weights import KvScales, load_weights, model_hash
from tests.checkpoints import make_checkpoint, make_fp8_checkpoint
from tests.engine.models.runner import Reference, Runner, random_tokens

CPU = torch.device("cpu")
IGNORING = ("lm_head", "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj")

CASES: dict[str, dict[str, Any]] = {
    "per tensor": {},
    "per row, other types": {"per_row": True, "family": "qwen2", "tie_word_embeddings": True},
    "fused in the checkpoint": {"family": "phi3", "per_row": True},
    "static inputs, head too": {"static_inputs": True, "ignore": ()},
    "some parts ignored": {"ignore": IGNORING, "per_row": True},
    "ignored by expression": {"ignore": (r"re:.*\.self_attn\..*", "re:model.layers.0.mlp", "lm_head")},
    "ModelOpt": {"form": "modelopt", "family": "qwen3"},
    "ModelOpt's file": {"form": "modelopt file", "family": "gemma2", "ignore": ("lm_head", "*.1.*.down_proj")},
}


def load(path: Path, quantization: str | None = None) -> KvScales:
    config = with_quantization(load_model_config(path), quantization)
    return load_weights(make_model(config, torch.float32, CPU), path, None, config.quantization)


def change_tensors(path: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replace, add or (None) remove scales."""
    file = path / "model-2.safetensors"
    tensors = load_file(file) | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_dequantized_weights(tmp_path: Path, case: str) -> None:
    path = make_fp8_checkpoint(tmp_path, **CASES[case])
    stored = load_file(path / "model-1.safetensors")
    num_fp8 = sum(tensor.dtype is torch.float8_e4m3fn for tensor in stored.values())
    assert 2 <= num_fp8 < len(stored)
    token_ids = random_tokens(40)
    runner = Runner(path, 16)
    ours = runner.in_chunks(token_ids, [25, 1, 14], runner.allocate(40))
    theirs = Reference(path / "dequantized").logits(token_ids)
    assert (ours - theirs).abs().max() < 1e-4 < theirs.std()


def test_weights_quantized_at_load_are_those_of_each_row_rounded(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "float", "llama", tokenizer=False)
    expected = make_fp8_checkpoint(tmp_path / "fp8", "llama", per_row=True) / "dequantized"
    config = load_model_config(path)
    model = load_model(path, config, torch.float32, CPU, None)
    runner = Runner(path, 16)
    runner.model = load_model(path, with_quantization(config, "fp8"), torch.float32, CPU, None)
    token_ids = random_tokens(40)
    ours = runner.in_chunks(token_ids, [40], runner.allocate(40))
    assert (ours - Reference(expected).logits(token_ids)).abs().max() < 1e-4
    assert (ours - Reference(path).logits(token_ids)).abs().max() > 1e-2
    assert torch.equal(runner.model.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_quantizing_at_load_changes_the_hash_and_leaves_quantized_checkpoints_as_they_are(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "float", "llama", tokenizer=False)
    asked = with_quantization(load_model_config(path), "fp8").quantization
    assert model_hash(path, asked) != model_hash(path) == model_hash(path, None)
    fp8 = make_fp8_checkpoint(tmp_path / "fp8", "llama")
    config = load_model_config(fp8)
    assert with_quantization(config, "fp8") == config
    assert model_hash(fp8, config.quantization) == model_hash(fp8)
    with pytest.raises(ValueError, match="quantization must be fp8 or absent, not 'int4'"):
        with_quantization(config, "int4")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({}, ((1.0, 1.0), (1.0, 1.0))),
        ({"k_scale": 0.5, "v_scale": 0.25}, ((0.5, 0.25), (1.0, 0.5))),
        ({"k_proj.k_scale": 0.5, "v_proj.v_scale": 0.25}, ((0.5, 0.25), (1.0, 0.5))),
        ({"k_proj.output_scale": 0.5}, ((0.5, 1.0), (1.0, 1.0))),
    ],
)
def test_kv_scales_come_from_the_checkpoint_whatever_their_name(
    tmp_path: Path, names: dict[str, float], expected: KvScales
) -> None:
    assert load(make_fp8_checkpoint(tmp_path, form="modelopt", kv_scales=names)) == expected


def test_kv_scales_that_the_scheme_promises_must_be_there_and_only_once(tmp_path: Path) -> None:
    path = make_fp8_checkpoint(tmp_path, kv_scales={"k_scale": 0.5, "v_scale": 0.25})
    config = json.loads((path / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    config["quantization_config"]["kv_cache_scheme"] = scheme
    (path / "config.json").write_text(json.dumps(config))
    assert load(path) == ((0.5, 0.25), (1.0, 0.5))
    change_tensors(path, {"model.layers.1.self_attn.v_scale": None})
    with pytest.raises(ValueError, match=r"lacks model\.layers\.1\.self_attn\.v_scale$"):
        load(path)
    change_tensors(path, {"model.layers.0.self_attn.k_proj.k_scale": torch.tensor(1.0)})
    with pytest.raises(ValueError, match=r"self_attn\.k_scale and also model\.layers\.0\.self_attn\.k_proj\.k_scale"):
        load(path)


Q_SCALE = "model.layers.0.self_attn.q_proj.weight_scale"
O_INPUT = "model.layers.1.self_attn.o_proj.input_scale"


@pytest.mark.parametrize(
    ("per_row", "change", "message"),
    [
        (False, {Q_SCALE: None}, r"lacks model\.layers\.0\.self_attn\.q_proj\.weight_scale$"),
        (False, {O_INPUT: None}, r"lacks model\.layers\.1\.self_attn\.o_proj\.input_scale$"),
        (False, {"lm_head.weight_scale": torch.ones(1)}, r"does not know: lm_head\.weight_scale$"),
        (False, {Q_SCALE: torch.ones(64, 1)}, r"q_proj\.weight_scale has shape \[64, 1\], the model wants \[\]"),
        (True, {Q_SCALE: torch.ones(1)}, r"q_proj\.weight_scale has shape \[1\], the model wants \[64, 1\]"),
        (True, {Q_SCALE: torch.ones(64, 2)}, r"q_proj\.weight_scale has shape \[64, 2\], the model wants \[64, 1\]"),
        (True, {Q_SCALE: torch.ones(32, 1)}, r"q_proj\.weight_scale has shape \[32, 1\]"),
        (False, {O_INPUT: torch.ones(2)}, r"o_proj\.input_scale has shape \[2\]"),
        (False, {Q_SCALE: torch.tensor([torch.nan])}, r"q_proj\.weight_scale must hold positive numbers"),
        (False, {Q_SCALE: torch.zeros(1)}, r"q_proj\.weight_scale must hold positive numbers"),
        (True, {Q_SCALE: -torch.ones(64, 1)}, r"q_proj\.weight_scale must hold positive numbers"),
        (False, {O_INPUT: torch.tensor([torch.inf])}, r"o_proj\.input_scale must hold positive numbers"),
        (False, {Q_SCALE: torch.ones(1, dtype=torch.int32)}, r"q_proj\.weight_scale has type torch\.int32"),
    ],
)
def test_scales_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, per_row: bool, change: dict[str, torch.Tensor | None], message: str
) -> None:
    path = make_fp8_checkpoint(tmp_path, per_row=per_row, static_inputs=True)
    change_tensors(path, change)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_weights_of_another_type_than_the_scheme_says_are_refused(tmp_path: Path) -> None:
    path = make_fp8_checkpoint(tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["ignore"] = []
    (path / "config.json").write_text(json.dumps(config))
    change_tensors(path, {"lm_head.weight_scale": torch.ones(1)})
    with pytest.raises(ValueError, match=r"lm_head\.weight has type torch\.float32, the model wants float8_e4m3fn"):
        load(path)
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"does not know: .*weight_scale"):
        load(path)
    (path / "model-2.safetensors").unlink()
    (path / "model-1.safetensors").rename(path / "model.safetensors")
    with pytest.raises(ValueError, match=r"has type torch\.float8_e4m3fn, the model wants float32 or bfloat16"):
        load(path)


def test_parts_fused_into_an_fp8_layer_keep_their_own_scales() -> None:
    layer = Linear(32, {"q": 16, "k": 8})
    layer.allocate(fp8=True)
    q, k = torch.randn(16, 32), torch.randn(8, 32) * 100
    layer.fill(slice(0, 16), *quantize_weight(q))
    one_scale = k.abs().max().reshape(1) / 448
    layer.fill(slice(16, 24), (k / one_scale).to(torch.float8_e4m3fn), one_scale)
    assert layer.weight.dtype is torch.float8_e4m3fn
    assert layer.weight_scale is not None
    restored = dequantize_weight(layer.weight, layer.weight_scale)
    assert (restored - torch.cat((q, k))).abs().max() <= 16 * one_scale  # half of the widest step, 32
    assert (restored[:16] - q).abs().max() < 0.2


def test_a_row_of_zeros_and_one_of_huge_values_survive_quantization() -> None:
    weight = torch.cat((torch.zeros(1, 32), torch.full((1, 32), 3e38), torch.linspace(-1, 1, 32)[None]))
    quantized, scale = quantize_weight(weight)
    restored = dequantize_weight(quantized, scale)
    assert torch.equal(restored[0], weight[0])
    assert ((restored[1:] - weight[1:]).abs() <= weight[1:].abs() / 16 + scale[1:, None] * 2**-9).all()
