import random

import pytest
import torch

from engine.attention import paged
from engine.attention.base import AttentionLayer, Span
from engine.attention.paged import PagedAttention
from engine.layers.rotary import Rotation

NUM_BLOCKS, NUM_LAYERS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM, NUM_HEADS = 64, 2, 2, 4, 8, 6


def no_rotation(num_tokens: int) -> Rotation:
    return Rotation(torch.ones(num_tokens, 1, 1, 1), torch.zeros(num_tokens, 1, 2, 1))


def attend_one_token(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: AttentionLayer
) -> torch.Tensor:
    """query [num_heads, head_dim], keys and values [num_kv_heads, positions up to its own, head_dim]."""
    out = []
    for head in range(NUM_HEADS):
        kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
        first = max(0, keys.shape[1] - layer.window) if layer.window is not None else 0
        scores = keys[kv_head, first:].double() @ query[head].double() * layer.scale
        if layer.softcap is not None:
            scores = (scores / layer.softcap).tanh() * layer.softcap
        out.append(scores.softmax(0) @ values[kv_head, first:].double())
    return torch.cat(out)


@pytest.mark.parametrize("seed", range(12))
def test_random_batches_agree_with_attention_token_by_token(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "MAX_PADDING", 8)  # decode rows fall into several batches
    if seed % 2:  # and long spans into parts
        monkeypatch.setattr(paged, "MAX_SCORES", 40)
        monkeypatch.setattr(paged, "MAX_GATHERED", 24)
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    kv = torch.full((NUM_BLOCKS, NUM_LAYERS, 2, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM), torch.nan)
    backend = PagedAttention(kv)
    free = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    layers = [
        AttentionLayer(index, 0.3, rng.choice((None, 1, 3, 7, 100)), rng.choice((None, 2.0)))
        for index in range(NUM_LAYERS)
    ]
    lengths = [rng.choice((0, 0, 1, 9, 17)) for _ in range(5)]
    blocks: list[list[int]] = [[] for _ in lengths]
    # [layer][sequence] -> [k|v, kv_head, position, head_dim]
    memory = [[torch.empty(2, NUM_KV_HEADS, 0, HEAD_DIM) for _ in lengths] for _ in layers]
    for sizes in (lengths, [rng.choice((0, 1, 1, 1, 6)) for _ in lengths], [1] * len(lengths)):
        members = [i for i, size in enumerate(sizes) if size]
        rng.shuffle(members)
        spans = []
        for i in members:
            start = memory[0][i].shape[2]
            while len(blocks[i]) * BLOCK_SIZE < start + sizes[i]:
                blocks[i].append(free.pop())
            spans.append(Span(start, sizes[i], blocks[i]))
        if not spans:
            continue
        written: list[int] = []
        step = backend.begin_step(spans, written.append)
        for layer in layers:
            num_tokens = sum(span.num_tokens for span in spans)
            queries = torch.randn(num_tokens, NUM_HEADS, HEAD_DIM, generator=generator)
            key_values = torch.randn(num_tokens, 2 * NUM_KV_HEADS, HEAD_DIM, generator=generator)
            heads = torch.cat((queries, key_values), dim=1)
            step.rotate_and_store(layer, heads, no_rotation(num_tokens))
            out = step.attend(layer, heads[:, :NUM_HEADS])
            row = 0
            for i, span in zip(members, spans, strict=True):
                new = key_values[row : row + span.num_tokens].view(-1, 2, NUM_KV_HEADS, HEAD_DIM).permute(1, 2, 0, 3)
                seen = memory[layer.index][i] = torch.cat((memory[layer.index][i], new), dim=2)
                for token in range(span.num_tokens):
                    keys, values = seen[:, :, : span.start + token + 1]
                    expected = attend_one_token(queries[row], keys, values, layer)
                    torch.testing.assert_close(out[row].double(), expected, atol=1e-5, rtol=1e-4)
                    row += 1
        assert written == [0, 1]


def test_no_group_has_more_scores_or_gathers_more_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "MAX_SCORES", 100)
    monkeypatch.setattr(paged, "MAX_GATHERED", 30)
    backend = PagedAttention(torch.zeros(NUM_BLOCKS, NUM_LAYERS, 2, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM))
    spans = [Span(20, 17, range(20)), *(Span(start, 1, range(20)) for start in (3, 9, 14, 9, 2, 40))]
    step = backend.begin_step(spans, None)
    groups = [make_group() for make_group in step._make_groups(None)]
    assert max(group.num_tokens * group.num_positions for group in groups if group.num_tokens > 1) <= 100
    assert max(group.num_spans * group.num_positions for group in groups if group.num_spans > 1) <= 30
    assert sum(group.num_spans * group.num_tokens for group in groups) == 23


def test_a_block_id_outside_the_pool_is_a_bug_that_is_caught() -> None:
    backend = PagedAttention(torch.zeros(4, 1, 2, 1, 4, 8))
    for block_ids in ([4], [-1], []):
        with pytest.raises(AssertionError):
            backend.begin_step([Span(0, 3, block_ids)], None)
