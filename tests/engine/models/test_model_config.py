import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.model_config import FAMILIES, load_model_config, parse_model_config
from engine.models.registry import MAKERS
from tests.checkpoints import make_checkpoint

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def test_every_accepted_architecture_has_a_maker() -> None:
    assert MAKERS.keys() == FAMILIES.keys()


def test_old_and_new_field_names_say_the_same() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    new = LLAMA | {"dtype": "bfloat16", "rope_parameters": scaling | {"rope_type": "llama3", "rope_theta": 500000.0}}
    old = LLAMA | {"torch_dtype": "bfloat16", "rope_theta": 500000.0, "rope_scaling": scaling | {"type": "llama3"}}
    config = parse_model_config(new, {})
    assert config == parse_model_config(old, {})
    assert (config.dtype, config.rope.kind, config.rope.theta, config.head_dim) == ("bfloat16", "llama3", 500000.0, 16)


def test_absent_fields_mean_what_they_mean_in_transformers() -> None:
    gemma = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    config = parse_model_config(gemma | {"architectures": ["Gemma2ForCausalLM"]}, {})
    assert (config.head_dim, config.num_kv_heads, config.tie_word_embeddings) == (256, 4, True)
    assert config.windows == (4096, None, 4096, None)
    assert (config.attention_softcap, config.logit_softcap, config.activation) == (50.0, 30.0, "gelu_pytorch_tanh")
    assert parse_model_config(LLAMA | {"architectures": ["MistralForCausalLM"]}, {}).windows == (4096,) * 4
    sliding = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 3}
    qwen = LLAMA | {"architectures": ["Qwen2ForCausalLM"]} | sliding
    assert parse_model_config(qwen, {}).windows == (None, None, None, 32)
    assert parse_model_config(qwen | {"use_sliding_window": False}, {}).windows == (None,) * 4


def test_end_tokens_come_from_the_generation_config_first() -> None:
    config = LLAMA | {"eos_token_id": 5}
    assert parse_model_config(config, {}).eos_token_ids == (5,)
    assert parse_model_config(config, {"eos_token_id": [7, 9, 7, 200]}).eos_token_ids == (7, 9)
    assert parse_model_config(LLAMA, {}).eos_token_ids == ()


def test_longrope_is_served_up_to_its_original_window() -> None:
    scaling = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config = parse_model_config(LLAMA | {"rope_scaling": scaling, "original_max_position_embeddings": 64}, {})
    assert config.max_position_embeddings == 64
    assert config.rope.attention_factor == pytest.approx(1.1547, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            "architecture 'MambaForCausalLM' is not supported; supported are Gem",
        ),
        ({"architectures": None, "model_type": "rwkv"}, "architecture of model_type 'rwkv' is not supported"),
        ({"architectures": [{"x": 1}]}, "is not supported"),
        ({"hidden_size": None}, "hidden_size must be an integer between"),
        ({"hidden_size": "64"}, "hidden_size must be an integer between .* not '64'"),
        ({"hidden_size": True}, "hidden_size must be"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be"),
        ({"vocab_size": 1e9}, "vocab_size must be"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must be a divisor"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"hidden_act": "relu"}, "hidden_act must be one of silu, gelu_pytorch_tanh, not 'relu'"),
        ({"dtype": "int4"}, "dtype must be one of float32"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is set, and that is not supported"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number"),
        ({"rope_scaling": [1]}, "rope_parameters must be an object"),
        ({"rope_scaling": {"type": "su"}}, "type must be one of default, linear, dynamic, llama3, yarn, longrope"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor must be a number"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "short_factor must be a list of 8"),
        ({"rope_parameters": {"partial_rotary_factor": 0.0}}, "partial_rotary_factor must be"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"eos_token_id": "end"}, "eos_token_id must be a token id"),
        ({"eos_token_id": [1, -2]}, "eos_token_id must be a token id"),
        (
            {"architectures": ["Gemma2ForCausalLM"], "layer_types": ["linear_attention"] * 4},
            "layer_types must be a list of 4",
        ),
    ],
)
def test_a_bad_config_is_refused_by_field_and_value(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_model_config(LLAMA | change, {})


def test_files_that_are_no_config_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load_model_config(tmp_path)
    for content, message in (
        (b"{", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[1]", "must hold a JSON object"),
        (b" " * (5 << 20), "larger than"),
    ):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_model_config(tmp_path)


def test_reading_a_config_does_not_load_torch(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3", tokenizer=False)
    program = (
        "import pathlib, sys\n"
        "from engine.model_config import load_model_config\n"
        f"config = load_model_config(pathlib.Path({str(tmp_path)!r}))\n"
        "assert 'torch' not in sys.modules\n"
        "print(config.architecture)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "Qwen3ForCausalLM"


def test_the_old_form_of_a_config_file_gives_the_same_model(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama3", tokenizer=False)
    expected = load_model_config(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model_config(tmp_path) == expected
