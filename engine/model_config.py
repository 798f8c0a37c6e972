"""What a Hugging Face checkpoint's config.json says about its model, checked and in one form. No torch here.

`load_model_config` is called by the executor, by the router's front (vocabulary, end tokens) and by
tools. The files come from strangers: every field is typed and bounded before it sizes anything, and an
architecture or option outside the supported set is refused by name rather than guessed at. Both the
older field names (`torch_dtype`, `rope_theta`, `rope_scaling`) and those of transformers 5 (`dtype`,
`rope_parameters`) are read.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.config_fields import MAX_CONFIG_BYTES, ConfigFields, read_json_object
from engine.quantization import FP8_AT_LOAD, Quantization, parse_quantization

DTYPES = ("float32", "bfloat16", "float16")
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


@dataclass(frozen=True, slots=True)
class Family:
    """What the config.json of an architecture leaves unsaid. `defaults` stand in for absent fields."""

    model_type: str
    defaults: Mapping[str, Any]
    windows: str = "none"  # which layers slide: "none", "all", "optional" (use_sliding_window), "alternating"
    has_qkv_bias: bool = False


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("llama", {}),
    "MistralForCausalLM": Family("mistral", {"sliding_window": 4096, "num_key_value_heads": 8}, windows="all"),
    "Qwen2ForCausalLM": Family(
        "qwen2", {"sliding_window": 4096, "num_key_value_heads": 32}, windows="optional", has_qkv_bias=True
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3", {"sliding_window": 4096, "num_key_value_heads": 32, "head_dim": 128}, windows="optional"
    ),
    "Phi3ForCausalLM": Family("phi3", {"rms_norm_eps": 1e-5}, windows="all"),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        {
            "hidden_act": "gelu_pytorch_tanh",  # Gemma's own name for the field is hidden_activation
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        windows="alternating",
    ),
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding. `rotary_dim` leading dimensions of each head rotate; cos and sin are scaled by
    `attention_factor`. The other fields belong to the kinds that name them in `engine.layers.rotary`.
    """

    kind: str
    theta: float
    rotary_dim: int
    factor: float = 1.0
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_positions: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    activation: str
    rope: RopeConfig
    dtype: str  # of the checkpoint
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    windows: tuple[int | None, ...]  # per layer: how many positions, its own included, a token attends to
    attention_scale: float
    attention_softcap: float | None
    logit_softcap: float | None
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    quantization: Quantization | None


def load_model_config(path: Path) -> ModelConfig:
    """Read `path`/config.json and, where present, generation_config.json and hf_quant_config.json.

    Raises ValueError.
    """
    config = read_json_object(path / "config.json", MAX_CONFIG_BYTES)
    generation, quantization = (
        read_json_object(path / name, MAX_CONFIG_BYTES) if (path / name).exists() else {}
        for name in ("generation_config.json", "hf_quant_config.json")
    )
    return parse_model_config(config, generation, quantization)


def with_quantization(config: ModelConfig, asked: str | None) -> ModelConfig:
    """The model as it is to be loaded. `asked` "fp8" quantizes a checkpoint that is not quantized; None: as it is."""
    if asked not in (None, "fp8"):
        raise ValueError(f"quantization must be fp8 or absent, not {asked!r:.80}")
    if asked is None or config.quantization is not None:
        return config
    return replace(config, quantization=FP8_AT_LOAD)


def parse_model_config(
    config: Mapping[str, Any], generation: Mapping[str, Any], quantization: Mapping[str, Any] | None = None
) -> ModelConfig:
    """The same from parsed files; `generation` and `quantization` may be empty."""
    architecture, family = _family(config)
    fields = ConfigFields("config.json", {**family.defaults, **config})
    _refuse_unsupported_options(fields)
    hidden_size = fields.integer("hidden_size", 1, 1 << 20)
    num_layers = fields.integer("num_hidden_layers", 1, 4096)
    num_heads = fields.integer("num_attention_heads", 1, 1 << 16)
    num_kv_heads = fields.integer("num_key_value_heads", 1, num_heads, default=num_heads)
    if num_heads % num_kv_heads:
        raise fields.refuse("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
    head_dim = fields.integer("head_dim", 2, 4096, default=hidden_size // num_heads)
    if head_dim % 2:
        raise fields.refuse("head_dim", "even")
    vocab_size = fields.integer("vocab_size", 1, 1 << 24)
    max_positions = fields.integer("max_position_embeddings", 1, 1 << 28)
    rope = _rope(fields, head_dim, max_positions)
    attention_bias = fields.flag("attention_bias", False)
    return ModelConfig(
        architecture=architecture,
        model_type=family.model_type,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", 1, 1 << 22),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        # Beyond its original window longrope changes the rotation of every earlier position with the length
        # of the sequence, so KV could not be shared between sequences: the model is served up to that window.
        max_position_embeddings=rope.original_max_positions if rope.kind == "longrope" else max_positions,
        norm_eps=fields.number("rms_norm_eps", 0.0, 1.0, default=1e-6),
        activation=fields.choice(
            "hidden_activation" if fields.has("hidden_activation") else "hidden_act", ACTIVATIONS, "silu"
        ),
        rope=rope,
        dtype=_dtype(fields),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        eos_token_ids=_eos_token_ids(fields, ConfigFields("generation_config.json", generation), vocab_size),
        bos_token_id=fields.integer("bos_token_id", 0, 1 << 31) if fields.has("bos_token_id") else None,
        windows=_windows(fields, family, num_layers),
        attention_scale=fields.number("query_pre_attn_scalar", 1e-6, 1e9, default=float(head_dim)) ** -0.5,
        attention_softcap=fields.optional_number("attn_logit_softcapping", 1e-3, 1e6),
        logit_softcap=fields.optional_number("final_logit_softcapping", 1e-3, 1e6),
        qkv_bias=family.has_qkv_bias or attention_bias,
        output_bias=attention_bias and not family.has_qkv_bias,
        mlp_bias=fields.flag("mlp_bias", False),
        quantization=parse_quantization(fields, quantization or {}),
    )


def _family(config: Mapping[str, Any]) -> tuple[str, Family]:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in FAMILIES:
        asked = repr(name)[:80] if name else f"of model_type {config.get('model_type')!r:.80}"
        raise ValueError(f"architecture {asked} is not supported; supported are {', '.join(sorted(FAMILIES))}")
    return name, FAMILIES[name]


def _refuse_unsupported_options(fields: ConfigFields) -> None:
    if fields.values.get("use_bidirectional_attention"):
        raise ValueError("config.json: use_bidirectional_attention is set, and that is not supported")


def _dtype(fields: ConfigFields) -> str:
    name = "dtype" if fields.has("dtype") else "torch_dtype"
    return fields.choice(name, DTYPES, "float32")


def _eos_token_ids(fields: ConfigFields, generation: ConfigFields, vocab_size: int) -> tuple[int, ...]:
    """The generation config's end tokens, else the model's. Ids past the vocabulary can never be sampled."""
    source = generation if generation.has("eos_token_id") else fields
    value = source.values.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if len(ids) > 1024 or any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in ids):
        raise source.refuse("eos_token_id", "a token id or a list of them")
    return tuple(dict.fromkeys(item for item in ids if item < vocab_size))


def _windows(fields: ConfigFields, family: Family, num_layers: int) -> tuple[int | None, ...]:
    if family.windows == "none" or not fields.has("sliding_window"):
        return (None,) * num_layers
    if family.windows == "optional" and not fields.flag("use_sliding_window", False):
        return (None,) * num_layers
    window = fields.integer("sliding_window", 1, 1 << 28)
    if family.windows == "all":
        return (window,) * num_layers
    types = fields.values.get("layer_types")
    if types is None and family.windows == "alternating":
        types = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(num_layers)]
    elif types is None:
        first = fields.integer("max_window_layers", 0, 1 << 16, default=28)
        types = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    allowed = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != num_layers or any(item not in allowed for item in types):
        raise fields.refuse("layer_types", f"a list of {num_layers} of {' and '.join(allowed)}")
    return tuple(window if item == "sliding_attention" else None for item in types)


def _rope(fields: ConfigFields, head_dim: int, max_positions: int) -> RopeConfig:
    given = fields.values.get("rope_parameters") or fields.values.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise fields.refuse("rope_parameters", "an object")
    outer = {name: fields.values.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    rope = ConfigFields("config.json, rope parameters", outer | given)
    kind_field = "rope_type" if rope.has("rope_type") or not rope.has("type") else "type"
    kind = rope.choice(kind_field, ROPE_KINDS, "default")
    theta = rope.number("rope_theta", 1.01, 1e15, default=10000.0)
    rotary_dim = int(head_dim * rope.number("partial_rotary_factor", 0.0, 1.0, default=1.0))
    if rotary_dim < 2 or rotary_dim % 2:
        raise rope.refuse("partial_rotary_factor", f"such that an even part of head_dim {head_dim} rotates")
    if kind in ("default", "dynamic"):  # dynamic scaling begins past max_position_embeddings, which is our limit
        return RopeConfig("default", theta, rotary_dim)
    if kind == "linear":
        return RopeConfig("linear", theta, rotary_dim, factor=rope.number("factor", 1e-3, 1e6))
    source = fields if fields.has("original_max_position_embeddings") else rope
    original = source.integer("original_max_position_embeddings", 1, 1 << 28, default=max_positions)
    if kind == "llama3":
        return RopeConfig(
            kind,
            theta,
            rotary_dim,
            factor=rope.number("factor", 1e-3, 1e6),
            low_freq_factor=rope.number("low_freq_factor", 1e-3, 1e6),
            high_freq_factor=rope.number("high_freq_factor", 1e-3, 1e6),
            original_max_positions=original,
        )
    factor = rope.number("factor", 1e-3, 1e6, default=max_positions / original)
    if kind == "yarn":
        return _yarn(rope, theta, rotary_dim, factor, original)
    return _longrope(rope, theta, rotary_dim, factor, min(original, max_positions))


def _yarn(rope: ConfigFields, theta: float, rotary_dim: int, factor: float, original: int) -> RopeConfig:
    """YaRN (arXiv:2309.00071)."""
    attention_factor = rope.optional_number("attention_factor", 1e-6, 1e6)
    if attention_factor is None:
        mscale = rope.optional_number("mscale", 0.0, 1e6)
        mscale_all = rope.optional_number("mscale_all_dim", 0.0, 1e6)
        attention_factor = _mscale(factor, 1.0)
        if mscale and mscale_all:
            attention_factor = _mscale(factor, mscale) / _mscale(factor, mscale_all)
    return RopeConfig(
        "yarn",
        theta,
        rotary_dim,
        factor=factor,
        attention_factor=attention_factor,
        original_max_positions=original,
        beta_fast=rope.number("beta_fast", 1e-3, 1e6, default=32.0),
        beta_slow=rope.number("beta_slow", 1e-3, 1e6, default=1.0),
        truncate=rope.flag("truncate", True),
    )


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _longrope(rope: ConfigFields, theta: float, rotary_dim: int, factor: float, original: int) -> RopeConfig:
    """LongRoPE (arXiv:2402.13753) within its original window."""
    attention_factor = rope.optional_number("attention_factor", 1e-6, 1e6)
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if min(factor, original) > 1 else 1.0
    factors = rope.values.get("short_factor")
    usable = isinstance(factors, list) and all(isinstance(item, int | float) and 0 < item < 1e6 for item in factors)
    if factors is None or not usable or len(factors) != rotary_dim // 2:
        raise rope.refuse("short_factor", f"a list of {rotary_dim // 2} positive numbers")
    return RopeConfig(
        "longrope",
        theta,
        rotary_dim,
        factor=factor,
        attention_factor=attention_factor,
        original_max_positions=original,
        short_factors=tuple(float(item) for item in factors),
    )
