"""How a checkpoint's linear layers are quantized, checked and in one form. No torch here.

FP8 (e4m3) is read as compressed-tensors and NVIDIA ModelOpt write it; every other scheme is refused by the
field that names it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.config_fields import ConfigFields

MAX_IGNORED = 1 << 16
MAX_PATTERNS = 64
MAX_WILDCARDS = 3  # in one pattern: matching takes time in the power of it
# The regular expressions that ignore lists hold in practice: names, dots, `.*`, `\d+`, anchors. Others could run
# for ever on purpose.
REGEX = re.compile(r"\^?(?:[\w-]|\\\.|\.\*|\\d\+|\.)+\$?", re.ASCII)
GLOB = re.compile(r"[\w.*?-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Quantization:
    """FP8 weights of linear layers: a weight is its e4m3 value times a float32 scale.

    A name is a module's name in the checkpoint, such as `model.layers.0.mlp.up_proj`; the ignored ones stay in
    floating point.
    """

    is_stored: bool  # in the checkpoint; False: its float weights are quantized at load, row by row
    scale_per_row: bool  # else one for the matrix
    has_input_scales: (
        bool  # activations have the checkpoint's scale per layer; else each token its own, found as it runs
    )
    has_kv_scales: bool  # every layer has scales for FP8 keys and values; else those that are there are used
    ignored_names: frozenset[str]
    ignored_patterns: tuple[str, ...]  # regular expressions that match from a name's beginning

    def covers(self, name: str) -> bool:
        return name not in self.ignored_names and not any(re.match(item, name) for item in self.ignored_patterns)


FP8_AT_LOAD = Quantization(
    is_stored=False,
    scale_per_row=True,
    has_input_scales=False,
    has_kv_scales=False,
    ignored_names=frozenset({"lm_head"}),
    ignored_patterns=(),
)


def parse_quantization(config: ConfigFields, hf_quant_config: Mapping[str, Any]) -> Quantization | None:
    """From config.json's quantization_config or, where that is absent, ModelOpt's own file. Raises ValueError."""
    if config.values.get("quantization_config"):
        fields = _object(config, "quantization_config")
    elif hf_quant_config:
        fields = _object(ConfigFields("hf_quant_config.json", hf_quant_config), "quantization")
        fields = ConfigFields(fields.source, {"quant_method": "modelopt", **fields.values})
    else:
        return None
    method = fields.choice("quant_method", ("compressed-tensors", "modelopt"), "none")
    return _compressed_tensors(fields) if method == "compressed-tensors" else _modelopt(fields)


def _compressed_tensors(fields: ConfigFields) -> Quantization:
    groups = fields.values.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise fields.refuse("config_groups", "an object of one group")
    sparsity = fields.values.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":  # which means none
        raise fields.refuse("sparsity_config", "empty")
    if fields.values.get("transform_config"):
        raise fields.refuse("transform_config", "empty")
    [group_name] = groups
    group = _object(ConfigFields(f"{fields.source}.config_groups", groups), group_name)
    (fields if fields.has("format") else group).choice("format", ("float-quantized",), "none")
    if group.values.get("targets") != ["Linear"]:
        raise group.refuse("targets", "['Linear']")
    if group.has("output_activations"):
        raise group.refuse("output_activations", "null")
    weights, inputs = _object(group, "weights"), _object(group, "input_activations")
    scale_per_row = _strategy(weights, ("tensor", "channel")) == "channel"
    is_dynamic = inputs.flag("dynamic", False)
    _strategy(inputs, ("token",) if is_dynamic else ("tensor",), is_dynamic=is_dynamic)
    names, patterns = [], []
    for item in _strings(fields, "ignore"):
        if item.startswith("re:"):
            patterns.append(_checked(fields, "ignore", item.removeprefix("re:"), REGEX))
        else:
            names.append(item)
    return Quantization(
        is_stored=True,
        scale_per_row=scale_per_row,
        has_input_scales=not is_dynamic,
        has_kv_scales=_quantizes_kv(fields),
        ignored_names=frozenset(names),
        ignored_patterns=tuple(patterns),
    )


def _modelopt(fields: ConfigFields) -> Quantization:
    fields.choice("quant_algo", ("FP8",), "none")
    if fields.has("kv_cache_quant_algo"):
        fields.choice("kv_cache_quant_algo", ("FP8",), "none")
    _quantizes_kv(fields)
    field = "ignore" if fields.has("ignore") else "exclude_modules"
    patterns, names = [], []
    for item in _strings(fields, field):
        if "*" in item or "?" in item:
            glob = _checked(fields, field, item, GLOB)
            patterns.append(re.escape(glob).replace(r"\*", ".*").replace(r"\?", ".") + "$")
        else:
            names.append(item)
    return Quantization(
        is_stored=True,
        scale_per_row=False,
        has_input_scales=True,
        has_kv_scales=False,  # ModelOpt leaves out those that are one
        ignored_names=frozenset(names),
        ignored_patterns=tuple(patterns),
    )


def _strategy(fields: ConfigFields, allowed: tuple[str, ...], *, is_dynamic: bool = False) -> str:
    fields.integer("num_bits", 8, 8)
    fields.choice("type", ("float",), "none")
    if not fields.flag("symmetric", True):
        raise fields.refuse("symmetric", "true")
    if fields.flag("dynamic", False) != is_dynamic:
        raise fields.refuse("dynamic", str(is_dynamic).lower())
    return fields.choice("strategy", allowed, "tensor")


def _quantizes_kv(fields: ConfigFields) -> bool:
    if not fields.has("kv_cache_scheme"):
        return False
    _strategy(_object(fields, "kv_cache_scheme"), ("tensor",))
    return True


def _object(fields: ConfigFields, name: str) -> ConfigFields:
    value = fields.values.get(name)
    if not isinstance(value, dict):
        raise fields.refuse(name, "an object")
    return ConfigFields(f"{fields.source}, {name}", value)


def _strings(fields: ConfigFields, name: str) -> list[str]:
    values = fields.values.get(name)
    values = [] if values is None else values
    if not isinstance(values, list) or len(values) > MAX_IGNORED or not all(isinstance(item, str) for item in values):
        raise fields.refuse(name, "a list of names")
    if sum("*" in item or "?" in item or item.startswith("re:") for item in values) > MAX_PATTERNS:
        raise fields.refuse(name, f"a list with at most {MAX_PATTERNS} patterns")
    return values


def _checked(fields: ConfigFields, name: str, pattern: str, allowed: re.Pattern[str]) -> str:
    num_wildcards = pattern.count("*") + pattern.count("+")
    if len(pattern) > 256 or num_wildcards > MAX_WILDCARDS or not allowed.fullmatch(pattern):
        raise ValueError(f"{fields.source}: {name} holds the pattern {pattern!r:.80}, which is not supported")
    return pattern
