"""A Llama for training: the architecture and the names of weights of `transformers`' LlamaForCausalLM, nothing else."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.demo_model.tokenizer import MAX_MODEL_LEN, VOCAB_SIZE

HIDDEN = 512
INTERMEDIATE = 1280
NUM_LAYERS = 8
NUM_HEADS = 8
NUM_KV_HEADS = 2
HEAD_DIM = 64
ROPE_THETA = 10000.0
EPS = 1e-5
MAX_FILE_BYTES = 15_500_000

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": NUM_HEADS,
    "num_key_value_heads": NUM_KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "max_position_embeddings": MAX_MODEL_LEN,
    "rms_norm_eps": EPS,
    "rope_theta": ROPE_THETA,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, NUM_HEADS * HEAD_DIM, bias=False)
        self.k_proj = nn.Linear(HIDDEN, NUM_KV_HEADS * HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(HIDDEN, NUM_KV_HEADS * HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(NUM_HEADS * HEAD_DIM, HIDDEN, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x [rows, length, hidden]
        rows, length, _ = x.shape
        q, k, v = (
            proj(x).view(rows, length, -1, HEAD_DIM).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        k, v = (each.repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=1) for each in (k, v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(rows, length, -1))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.down_proj = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(HIDDEN, EPS)
        self.self_attn = Attention()
        self.post_attention_layernorm = nn.RMSNorm(HIDDEN, EPS)
        self.mlp = Mlp()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Token ids [rows, length] to hidden states of the last layer, normalized."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB_SIZE, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(NUM_LAYERS))
        self.norm = nn.RMSNorm(HIDDEN, EPS)
        inverse = ROPE_THETA ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM)
        angles = torch.outer(torch.arange(MAX_MODEL_LEN, dtype=torch.float32), inverse).repeat(1, 2)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                depth = (2 * NUM_LAYERS) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                nn.init.normal_(weight, std=0.02 * depth, generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


def token_loss(hidden: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the targets that are not negative. hidden [rows, length, hidden], targets [rows, length]"""
    logits = functional.linear(hidden, embedding).float()
    return functional.cross_entropy(logits.view(-1, VOCAB_SIZE), targets.reshape(-1), ignore_index=-1)


def save(model: Llama, path: Path) -> None:
    """bfloat16 weights in files under 16 MB, their index, config.json."""
    path.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{name}": weight.detach().to(torch.bfloat16).cpu() for name, weight in model.named_parameters()}
    files = list(_files(weights))
    places: dict[str, str] = {}
    for number, file in enumerate(files, start=1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        save_file(file, path / name, metadata={"format": "pt"})
        (path / name).chmod(0o644)
        places |= dict.fromkeys(file, name)
    total = sum(weight.numel() * 2 for weight in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    for name, content in (("model.safetensors.index.json", index), ("config.json", CONFIG)):
        (path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _files(weights: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    file: dict[str, Tensor] = {}
    size = 0
    for name, weight in weights.items():
        if size + weight.nbytes > MAX_FILE_BYTES:
            yield file
            file, size = {}, 0
        file[name] = weight
        size += weight.nbytes
    yield file


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
