"""The checkpoint the demo serves when it is given none: small, made once from a seed, kept in the user's cache.

Used by `baton.demo`. A directory with the final name is always complete: it is written beside it and renamed, so
starts that race each other end with one whole checkpoint. Nothing is trained, so its text is gibberish.
"""

import ast
import json
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

DEMO_VERSION = 1  # part of the directory's name: raise it with every change that changes the files
SEED = 20261123
VOCAB_SIZE = 4096
HIDDEN_SIZE = 256
INTERMEDIATE_SIZE = 768
NUM_LAYERS = 6
NUM_HEADS = 8
NUM_KV_HEADS = 4
HEAD_DIM = HIDDEN_SIZE // NUM_HEADS
MAX_MODEL_LEN = 4096

BOS, EOS = "<|begin|>", "<|end|>"
SPECIAL_TOKENS = (BOS, EOS, "<|system|>", "<|user|>", "<|assistant|>")  # their ids are their places
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

# Modules of the standard library with much English in their docstrings; present in every Python that Baton runs on.
TEXT_MODULES = """
argparse codecs collections configparser copy csv datetime difflib email/message enum functools heapq inspect
json locale logging optparse os pathlib pickle platform pprint random shlex shutil socket statistics
string subprocess tarfile tempfile textwrap threading timeit trace typing unittest/case unittest/mock urllib/parse
urllib/request uuid weakref zipfile
"""


def cache_dir(environ: Mapping[str, str]) -> Path:
    """Where the demo's checkpoint belongs, by the XDG rules."""
    root = environ.get("XDG_CACHE_HOME", "")
    base = Path(root) if os.path.isabs(root) else Path.home() / ".cache"
    return base / "baton" / f"demo-{DEMO_VERSION}"


def ensure_demo_checkpoint(path: Path) -> Path:
    """Make the checkpoint at `path` unless it is there. Takes a few seconds the first time."""
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        write_demo_checkpoint(scratch)
        scratch.chmod(0o755)
        scratch.rename(path)
    except OSError:
        if not path.is_dir():  # otherwise another start was faster, and its files are the same
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return path


def write_demo_checkpoint(path: Path) -> None:
    """Write every file of the checkpoint into the directory `path`."""
    _write_tokenizer(path)
    _write_weights(path)
    for name, content in _configs().items():
        (path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _configs() -> dict[str, dict[str, Any]]:
    ends = {"bos_token_id": SPECIAL_TOKENS.index(BOS), "eos_token_id": SPECIAL_TOKENS.index(EOS)}
    model = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_MODEL_LEN,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        **ends,
    }
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_MODEL_LEN,
        "chat_template": CHAT_TEMPLATE,
    }
    return {"config.json": model, "tokenizer_config.json": tokenizer, "generation_config.json": ends}


def _docstrings() -> Iterator[str]:
    stdlib = Path(sysconfig.get_path("stdlib"))
    for module in TEXT_MODULES.split():
        file = stdlib / f"{module}.py"
        if not file.is_file():  # a module in one Python is a package in the next
            file = stdlib / module / "__init__.py"
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                yield text


def _write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_docstrings(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    tokenizer.save(str(path / "tokenizer.json"))


def _weight_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCAB_SIZE, HIDDEN_SIZE)
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (HIDDEN_SIZE,)
        yield f"{prefix}.self_attn.q_proj.weight", (NUM_HEADS * HEAD_DIM, HIDDEN_SIZE)
        yield f"{prefix}.self_attn.k_proj.weight", (NUM_KV_HEADS * HEAD_DIM, HIDDEN_SIZE)
        yield f"{prefix}.self_attn.v_proj.weight", (NUM_KV_HEADS * HEAD_DIM, HIDDEN_SIZE)
        yield f"{prefix}.self_attn.o_proj.weight", (HIDDEN_SIZE, NUM_HEADS * HEAD_DIM)
        yield f"{prefix}.post_attention_layernorm.weight", (HIDDEN_SIZE,)
        yield f"{prefix}.mlp.gate_proj.weight", (INTERMEDIATE_SIZE, HIDDEN_SIZE)
        yield f"{prefix}.mlp.up_proj.weight", (INTERMEDIATE_SIZE, HIDDEN_SIZE)
        yield f"{prefix}.mlp.down_proj.weight", (HIDDEN_SIZE, INTERMEDIATE_SIZE)
    yield "model.norm.weight", (HIDDEN_SIZE,)
    yield "lm_head.weight", (VOCAB_SIZE, HIDDEN_SIZE)


def _write_weights(path: Path) -> None:
    """Normal draws scaled by fan-in keep activations near unit size, so that greedy text does not fall into a loop."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(SEED)
    weights = {}
    for name, shape in _weight_shapes():
        if len(shape) == 1:
            weights[name] = torch.ones(shape)
        else:
            weights[name] = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
    weights["lm_head.weight"][: len(SPECIAL_TOKENS) + 256] = 0.0  # greedy text has no special tokens, no lone bytes
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
