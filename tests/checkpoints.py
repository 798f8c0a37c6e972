"""Tiny random checkpoints in the Hugging Face format, for every supported family.

`make_checkpoint` is what tests call; `make_tokenizer` trains the byte-level BPE tokenizer beside it.
Same arguments, same bytes: weights come from `seed`, the tokenizer from a fixed text.
"""

import fnmatch
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|end|>"
SPECIAL_TOKENS = (END_OF_TEXT, END_OF_TURN, "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' + '\n' }}{% endif %}"
)
CORPUS = (
    "The river carries the blocks of ice from the mountain to the sea, and the sea gives them back as rain.",
    "A request enters, its prompt is read once, and every token that follows remembers what came before it.",
    'def step(batch): return [token for token in batch if token]  # {"name": "baton", "value": 12345}',
    "Grüße aus Köln, ça va très bien, привет мир, こんにちは世界, 你好，世界。 🙂 naïve café",
)

# Per family: the transformers config class, and what makes the family differ from the base sizes.
FAMILIES: dict[str, tuple[type[transformers.PretrainedConfig], dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {}),
    "llama3": (
        transformers.LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            "tie_word_embeddings": True,
        },
    ),
    "mistral": (transformers.MistralConfig, {"sliding_window": 12}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 32}),
    "phi3": (transformers.Phi3Config, {"pad_token_id": 0}),
    "gemma2": (
        transformers.Gemma2Config,
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 12,
            "num_hidden_layers": 3,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
        },
    ),
}


def make_checkpoint(
    path: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | int = "5GB",
    tokenizer: bool = True,
    **overrides: Any,
) -> Path:
    """Write config.json, generation_config.json, safetensors and the tokenizer's files; return `path`.

    `overrides` go to the transformers config class (`hidden_size`, `num_key_value_heads`, ...). Tokens
    END_OF_TEXT and END_OF_TURN end generation. `max_shard_size` as in `save_pretrained`.
    """
    config_class, family_config = FAMILIES[family]
    base = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "bos_token_id": None,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
    }
    config = config_class(**(base | family_config | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        randomize(model)
    model.generation_config = transformers.GenerationConfig(bos_token_id=None, eos_token_id=[0, 1], pad_token_id=0)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    if tokenizer:
        make_tokenizer(path, config.vocab_size)
    return path


def make_fp8_checkpoint(
    path: Path,
    family: str = "llama",
    *,
    form: str = "compressed-tensors",
    per_row: bool = False,
    static_inputs: bool = False,
    kv_scales: Mapping[str, float] | None = None,
    ignore: Sequence[str] = ("lm_head",),
    **options: Any,
) -> Path:
    """A random checkpoint with FP8 linear layers; `path`/dequantized holds what its weights stand for, in float32.

    `form` is "compressed-tensors", "modelopt" or "modelopt file" (its settings in hf_quant_config.json), `ignore` as
    that writes it. `kv_scales` adds tensors to every attention, by the ends of their names. Scales lie in a file
    after that of the weights.
    """
    dequantized = make_checkpoint(path / "dequantized", family, tokenizer=False, **options)
    tensors = load_file(dequantized / "model.safetensors")
    weights, scales = dict(tensors), {}
    for name in tensors:
        module = name.removesuffix(".weight")
        if re.search(r"(_proj|lm_head)\.weight$", name) and not any(_ignores(item, module) for item in ignore):
            amax = tensors[name].abs().amax(dim=1, keepdim=True) if per_row else tensors[name].abs().max().reshape(1)
            scales[f"{module}.weight_scale"] = amax / 448
            weights[name] = (tensors[name] / (amax / 448)).to(torch.float8_e4m3fn)
            tensors[name] = weights[name].float() * (amax / 448)
            if form != "compressed-tensors":
                scales[f"{module}.weight_scale"] = (amax / 448)[0]
            if static_inputs or form != "compressed-tensors":
                scales[f"{module}.input_scale"] = torch.tensor(0.02 + 0.001 * len(scales))
    layers = sorted({name.split(".self_attn.")[0] for name in tensors if ".self_attn." in name})
    for i, layer in enumerate(layers):
        for end, scale in (kv_scales or {}).items():
            scales[f"{layer}.self_attn.{end}"] = torch.tensor(scale * (i + 1))
    save_file(tensors, dequantized / "model.safetensors", metadata={"format": "pt"})
    files = {"model-1.safetensors": weights, "model-2.safetensors": scales}
    for file, content in files.items():
        save_file(content, path / file)
    weight_map = {name: file for file, content in files.items() for name in content}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = json.loads((dequantized / "config.json").read_text())
    settings = fp8_settings(form, per_row=per_row, static_inputs=static_inputs, ignore=ignore)
    if form == "modelopt file":
        (path / "hf_quant_config.json").write_text(json.dumps(settings))
    else:
        config["quantization_config"] = settings
    (path / "config.json").write_text(json.dumps(config))
    return path


def _ignores(item: str, module: str) -> bool:
    if item.startswith("re:"):
        return re.match(item[3:], module) is not None
    return fnmatch.fnmatchcase(module, item)


def fp8_settings(
    form: str, *, per_row: bool = False, static_inputs: bool = False, ignore: Sequence[str] = ("lm_head",)
) -> dict[str, Any]:
    """The quantization settings as llm-compressor and ModelOpt write them."""
    e4m3 = {"num_bits": 8, "type": "float", "dynamic": False}
    if form == "modelopt file":
        inner = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": list(ignore)}
        return {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": inner}
    if form == "modelopt":
        group = {"input_activations": e4m3, "weights": e4m3, "targets": ["Linear"]}
        return {
            "config_groups": {"group_0": group},
            "ignore": list(ignore),
            "quant_algo": "FP8",
            "producer": {"name": "modelopt", "version": "0.29.0"},
            "quant_method": "modelopt",
        }
    common = {"symmetric": True, "group_size": None, "block_structure": None, "actorder": None, "observer_kwargs": {}}
    inputs = {"dynamic": not static_inputs, "strategy": "tensor" if static_inputs else "token", "observer": None}
    group = {
        "weights": e4m3 | common | {"strategy": "channel" if per_row else "tensor", "observer": "minmax"},
        "input_activations": e4m3 | common | inputs,
        "output_activations": None,
        "targets": ["Linear"],
    }
    return {
        "config_groups": {"group_0": group},
        "format": "float-quantized",
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.12.2",
    }


def randomize(model: torch.nn.Module) -> None:
    """Give every parameter values that matter: spread logits, norm weights off one, biases off zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, dtype=torch.float32)
            if "norm" in name:
                parameter.add_(0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5 * 1.5)


def make_tokenizer(path: Path, vocab_size: int) -> None:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, with a chat template, as files under `path`."""
    assert vocab_size >= 256 + len(SPECIAL_TOKENS), vocab_size
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, 2048),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for text in CORPUS for _ in range(4)], trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
