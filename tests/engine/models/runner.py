"""Runs a model on a paged KV whose unwritten slots are NaN, and the same checkpoint in transformers."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

from engine.attention.base import Span
from engine.attention.paged import PagedAttention
from engine.executors.model_loading import load_model
from engine.model_config import load_model_config

NUM_BLOCKS = 512


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one sequence for one step."""

    token_ids: Sequence[int]
    start: int
    block_ids: Sequence[int]


class Runner:
    def __init__(self, path: Path, block_size: int = 4, dtype: torch.dtype = torch.float32) -> None:
        config = load_model_config(path)
        shape = (NUM_BLOCKS, config.num_layers, 2, config.num_kv_heads, block_size, config.head_dim)
        self.kv = torch.full(shape, torch.nan, dtype=dtype)
        self.block_size = block_size
        self.attention = PagedAttention(self.kv)
        self.model = load_model(path, config, dtype, torch.device("cpu"), None)
        self.free = random.Random(0).sample(range(NUM_BLOCKS), NUM_BLOCKS)

    def allocate(self, num_tokens: int) -> list[int]:
        """Scattered blocks, never the same twice."""
        return [self.free.pop() for _ in range(-(-num_tokens // self.block_size))]

    @torch.inference_mode()
    def step(self, *pieces: Piece) -> list[Tensor]:
        """Logits [num_tokens, vocab] of each piece."""
        sizes = [len(piece.token_ids) for piece in pieces]
        spans = [Span(piece.start, size, piece.block_ids) for piece, size in zip(pieces, sizes, strict=True)]
        token_ids = torch.tensor([token for piece in pieces for token in piece.token_ids])
        positions = torch.cat([torch.arange(span.start, span.start + span.num_tokens) for span in spans])
        hidden = self.model(token_ids, positions.float(), self.attention.begin_step(spans, None))
        return list(self.model.logits(hidden).split(sizes))

    def in_chunks(self, token_ids: Sequence[int], sizes: Sequence[int], block_ids: Sequence[int]) -> Tensor:
        """Logits of the whole sequence, computed `sizes` tokens at a time."""
        assert sum(sizes) == len(token_ids)
        logits, start = [], 0
        for size in sizes:
            logits += self.step(Piece(token_ids[start : start + size], start, block_ids))
            start += size
        return torch.cat(logits)


class Reference:
    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="eager"
        ).eval()

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        logits: Tensor = self.model(torch.tensor([list(token_ids)])).logits[0]
        return logits

    @torch.inference_mode()
    def greedy(self, token_ids: Sequence[int], num_tokens: int) -> list[int]:
        output = self.model.generate(
            torch.tensor([list(token_ids)]),
            attention_mask=torch.ones(1, len(token_ids), dtype=torch.long),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
        )
        tokens: list[int] = output[0, len(token_ids) :].tolist()
        return tokens


def random_tokens(num_tokens: int, seed: int = 0, vocab_size: int = 512) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(vocab_size) for _ in range(num_tokens)]
