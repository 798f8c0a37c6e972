import time
from typing import Any

import pytest

from engine.model_config import parse_model_config
from engine.quantization import Quantization
from tests.checkpoints import fp8_settings
from tests.engine.models.test_model_config import LLAMA

COMPRESSED = fp8_settings("compressed-tensors", static_inputs=True)
MODELOPT = fp8_settings("modelopt")
MODELOPT_FILE = fp8_settings("modelopt file")
GROUP = COMPRESSED["config_groups"]["group_0"]
KV_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def parse(settings: dict[str, Any], file: dict[str, Any] | None = None) -> Quantization:
    found = parse_model_config(LLAMA | {"quantization_config": settings}, {}, file).quantization
    assert found is not None
    return found


def with_group(part: str, change: dict[str, Any] | None) -> dict[str, Any]:
    changed = None if change is None else GROUP[part] | change
    return COMPRESSED | {"config_groups": {"group_0": GROUP | {part: changed}}}


def test_both_forms_are_read() -> None:
    static = parse(COMPRESSED | {"kv_cache_scheme": KV_SCHEME})
    assert (static.is_stored, static.scale_per_row, static.has_input_scales, static.has_kv_scales) == (
        (True, False, True, True)
    )
    dynamic = parse(fp8_settings("compressed-tensors", per_row=True))
    assert (dynamic.scale_per_row, dynamic.has_input_scales, dynamic.has_kv_scales) == (True, False, False)
    modelopt = parse(MODELOPT)
    assert (modelopt.is_stored, modelopt.scale_per_row, modelopt.has_input_scales) == (True, False, True)
    assert parse_model_config(LLAMA, {}, MODELOPT_FILE).quantization == modelopt
    assert parse({}, MODELOPT_FILE) == modelopt
    assert parse(MODELOPT, {"quantization": {"quant_algo": "W4A16"}}) == modelopt  # config.json comes first
    assert parse_model_config(LLAMA, {}, {}).quantization is None


def test_the_format_may_be_said_in_the_group_alone() -> None:
    settings = COMPRESSED | {"config_groups": {"group_0": GROUP | {"format": "float-quantized"}}}
    del settings["format"]
    assert parse(settings) == parse(COMPRESSED)


@pytest.mark.parametrize(
    ("settings", "ignored", "covered"),
    [
        (COMPRESSED, ["lm_head"], ["model.layers.0.mlp.up_proj", "model.lm_head"]),
        (
            COMPRESSED | {"ignore": ["re:.*mlp.*", r"re:^model\.layers\.\d+\.self_attn\.k_proj$"]},
            ["model.layers.0.mlp.up_proj", "model.layers.12.self_attn.k_proj"],
            ["lm_head", "model.layers.0.self_attn.q_proj"],
        ),
        (
            MODELOPT | {"ignore": ["lm_head", "model.layers.1*", "*.o_proj"]},
            ["lm_head", "model.layers.1.mlp.up_proj", "model.layers.15.mlp.up_proj", "model.layers.0.self_attn.o_proj"],
            ["model.layers.2.mlp.up_proj", "model.layers.2.self_attn.o_proj_b"],
        ),
    ],
)
def test_ignored_modules_are_known_by_name_or_pattern(
    settings: dict[str, Any], ignored: list[str], covered: list[str]
) -> None:
    quantization = parse(settings)
    assert [name for name in ignored + covered if quantization.covers(name)] == covered


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 4}, "quant_method must be one of compressed-tensors, modelopt, not None"),
        ({"quant_method": "gptq", "bits": 4}, "quant_method must be one of .* not 'gptq'"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "quant_method must be one of .* not 'fp8'"),
        (["fp8"], "quantization_config must be an object"),
        (COMPRESSED | {"format": "pack-quantized"}, "format must be one of float-quantized, not 'pack-quantized'"),
        (COMPRESSED | {"format": "nvfp4-pack-quantized"}, "format must be .* not 'nvfp4-pack-quantized'"),
        (COMPRESSED | {"config_groups": {}}, "config_groups must be an object of one group"),
        (COMPRESSED | {"config_groups": {"a": GROUP, "b": GROUP}}, "config_groups must be an object of one group"),
        (COMPRESSED | {"config_groups": {"a": None}}, "config_groups: a must be an object"),
        (COMPRESSED | {"sparsity_config": {"format": "sparse-24"}}, "sparsity_config must be empty"),
        (COMPRESSED | {"transform_config": {"config_groups": {}}}, "transform_config must be empty"),
        (COMPRESSED | {"config_groups": {"a": GROUP | {"targets": ["re:.*"]}}}, "targets must be"),
        (with_group("weights", {"num_bits": 4}), "weights: num_bits must be an integer between 8 and 8, not 4"),
        (with_group("weights", {"type": "int"}), "weights: type must be one of float, not 'int'"),
        (with_group("weights", {"strategy": "block"}), "weights: strategy must be one of tensor, channel, not 'block'"),
        (with_group("weights", {"strategy": "group"}), "weights: strategy must be .* not 'group'"),
        (with_group("weights", {"symmetric": False}), "weights: symmetric must be true, not False"),
        (with_group("weights", {"dynamic": True}), "weights: dynamic must be false, not True"),
        (with_group("input_activations", None), "input_activations must be an object, not None"),
        (with_group("input_activations", {"strategy": "token"}), "strategy must be one of tensor, not 'token'"),
        (with_group("input_activations", {"dynamic": True}), "strategy must be one of token, not 'tensor'"),
        (with_group("input_activations", {"dynamic": "local"}), "dynamic must be true or false"),
        (COMPRESSED | {"kv_cache_scheme": KV_SCHEME | {"num_bits": 4}}, "kv_cache_scheme: num_bits must be"),
        (COMPRESSED | {"kv_cache_scheme": KV_SCHEME | {"strategy": "attn_head"}}, "kv_cache_scheme: strategy must be"),
        (COMPRESSED | {"ignore": "lm_head"}, "ignore must be a list of names"),
        (COMPRESSED | {"ignore": [1]}, "ignore must be a list of names"),
        (COMPRESSED | {"ignore": ["re:(a+)+$"]}, r"ignore holds the pattern '\(a\+\)\+\$', which is not supported"),
        (COMPRESSED | {"ignore": ["re:" + ".*a" * 9]}, "ignore holds the pattern"),
        (COMPRESSED | {"ignore": ["re:a"] * 65}, "ignore must be a list with at most 64 patterns"),
        (MODELOPT | {"quant_algo": "NVFP4"}, "quant_algo must be one of FP8, not 'NVFP4'"),
        (MODELOPT | {"quant_algo": None}, "quant_algo must be one of FP8, not None"),
        (MODELOPT | {"kv_cache_quant_algo": "NVFP4"}, "kv_cache_quant_algo must be one of FP8, not 'NVFP4'"),
        (MODELOPT | {"kv_cache_scheme": {"num_bits": 4, "type": "float"}}, "kv_cache_scheme: num_bits must be"),
        (MODELOPT | {"ignore": ["a[*"]}, r"ignore holds the pattern 'a\[\*'"),
    ],
)
def test_other_schemes_are_refused_by_field_and_value(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(settings)


def test_a_bad_file_of_modelopt_is_refused_by_its_name() -> None:
    for inner, message in (
        (None, r"hf_quant_config\.json: quantization must be an object"),
        ({"quant_algo": "W4A16_AWQ"}, r"hf_quant_config\.json, quantization: quant_algo must be one of FP8"),
        ({"quant_algo": "FP8", "exclude_modules": {}}, "exclude_modules must be a list of names"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_model_config(LLAMA, {}, {"quantization": inner})


def test_the_worst_patterns_that_are_accepted_take_no_time() -> None:
    quantization = parse(COMPRESSED | {"ignore": [f"re:.*o.*o.*{i}x$" for i in range(64)]})
    start = time.perf_counter()
    for layer in range(20):
        assert quantization.covers(f"model.layers.{layer}.self_attn.o_proj")
    assert time.perf_counter() - start < 2


def test_a_sparsity_of_the_dense_kind_is_none() -> None:
    assert parse(COMPRESSED | {"sparsity_config": {"format": "dense"}}) == parse(COMPRESSED)
