import math
import random

import numpy as np
import pytest

from engine.attention.base import Span
from engine.executors.tensorrt.calls import NO_PAST, PADDING, CallLimits, cut, exactly, ladder, make_call
from engine.executors.tensorrt.limits import call_limits, pairs_worth_a_call
from engine.kv.layout import KvLayout
from engine.model_config import parse_model_config

BLOCK_SIZE = 4
NUM_BLOCKS = 400


def random_spans(rng: random.Random) -> list[Span]:
    free = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    spans = []
    for _ in range(rng.randint(1, 6)):
        start, num_tokens = rng.choice((0, rng.randint(1, 30))), rng.choice((1, rng.randint(1, 40)))
        spans.append(Span(start, num_tokens, [free.pop() for _ in range(-(-(start + num_tokens) // BLOCK_SIZE))]))
    return spans


def slot(span: Span, position: int) -> int:
    return span.block_ids[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


@pytest.mark.parametrize("padded", [exactly, ladder(8)])
def test_calls_hold_every_token_once_with_all_its_past(padded: object) -> None:
    rng = random.Random(0)
    for _ in range(200):
        spans = random_spans(rng)
        max_wasted = rng.choice((0, 100, math.inf))
        limits = CallLimits(rng.choice((8, 16, 64)), 72, padded, max_wasted)  # type: ignore[arg-type]
        computed = [0] * len(spans)
        for parts in cut(spans, limits):
            call = make_call(parts, BLOCK_SIZE, NUM_BLOCKS, limits)
            assert len(call.positions) == len(call.sequence_ids) <= limits.max_tokens
            assert len(call.past_positions) == len(call.past_sequence_ids) == len(call.past_slots) <= limits.max_past
            assert set(call.sequence_ids[call.num_tokens :]) <= {PADDING}
            row = entry = 0
            for part in parts:
                span = spans[part.span]
                assert part.start == span.start + computed[part.span]
                computed[part.span] += part.num_tokens
                positions = list(range(part.start, part.start + part.num_tokens))
                rows = slice(row, row + part.num_tokens)
                assert call.positions[rows].tolist() == positions
                assert set(call.sequence_ids[rows].tolist()) == {part.span}
                assert call.slots[rows].tolist() == [slot(span, position) for position in positions]
                past = slice(entry, entry + part.start)
                assert call.past_positions[past].tolist() == list(range(part.start))
                assert set(call.past_sequence_ids[past].tolist()) <= {part.span}
                assert call.past_slots[past].tolist() == [slot(span, position) for position in range(part.start)]
                row, entry = row + part.num_tokens, entry + part.start
            assert row == call.num_tokens == len(call.slots)
            assert call.has_past == (entry > 0)
            assert len(call.past_positions) >= 1
            assert set(call.past_sequence_ids[entry:]) <= {NO_PAST}
            if call.has_past:  # padding reads nothing that a sequence of the call has not written
                assert set(call.past_slots[entry:]) <= {call.past_slots[0]}
        assert computed == [span.num_tokens for span in spans]


def test_a_step_within_the_limits_is_one_call() -> None:
    spans = [Span(20, 6, range(7)), Span(0, 10, range(7, 10))]
    assert len(cut(spans, CallLimits(16, 20, exactly))) == 1
    assert len(cut(spans, CallLimits(15, 20, exactly))) == 2
    assert len(cut(spans, CallLimits(8, 25, exactly))) == 2
    assert [[part.start for part in parts] for parts in cut(spans, CallLimits(8, 24, exactly))] == [[20, 0], [2]]
    assert [[part.start for part in parts] for parts in cut([spans[0]] * 2, CallLimits(16, 24, exactly))] == [[20]] * 2


def test_sequences_share_a_call_while_few_pairs_are_wasted() -> None:
    def calls(spans: list[Span], max_wasted_pairs: int) -> list[list[int]]:
        limits = CallLimits(64, 256, exactly, max_wasted_pairs)
        return [[part.span for part in parts] for parts in cut(spans, limits)]

    prompts = [Span(0, 10, range(3))] * 4  # the second wastes 2 x 10 x 10 pairs, the third 4 x 10 x 10
    assert calls(prompts, 199) == [[0], [1], [2], [3]]
    assert calls(prompts, 200) == [[0, 1], [2, 3]]
    assert calls(prompts, 400) == [[0, 1, 2], [3]]
    later = [Span(20, 10, range(8))] * 2  # 2 x 10 x 30
    assert calls(later, 599) == [[0], [1]]
    assert calls(later, 600) == [[0, 1]]


def test_of_an_8b_model_short_prompts_share_calls_and_long_pasts_do_not() -> None:
    config = parse_model_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
        },
        {},
    )
    limits = CallLimits(2048, 1 << 20, exactly, pairs_worth_a_call(config))
    assert len(cut([Span(0, 512, range(32))] * 4, limits)) == 1
    assert len(cut([Span(8192, 256, range(528))] * 4, limits)) == 4


def test_a_past_beyond_the_limit_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="start=21"):
        cut([Span(21, 1, range(6))], CallLimits(16, 20, exactly))


def test_blocks_that_are_not_the_pools_are_a_bug() -> None:
    [parts] = cut([Span(0, 8, [0, 7])], limits := CallLimits(16, 16, exactly))
    with pytest.raises(AssertionError):
        make_call(parts, BLOCK_SIZE, 7, limits)
    [parts] = cut([Span(0, 9, [0, 1])], limits)
    with pytest.raises(AssertionError):
        make_call(parts, BLOCK_SIZE, 7, limits)


def test_the_ladder_repeats_sizes_and_wastes_an_eighth_at_most() -> None:
    padded = ladder(8)
    sizes = [padded(size) for size in range(1, 4097)]
    assert sizes == sorted(sizes)
    assert all(size % 8 == 0 for size in sizes)
    assert all(size <= padded_size < max(9, size * 9 / 8 + 1) for size, padded_size in enumerate(sizes, 1) if size > 64)
    assert len(set(sizes)) == 64
    assert [padded(size) for size in set(sizes)] == list(set(sizes))


@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(8, 128), (1, 24), (2, 16), (1, 3)])
def test_on_cuda_every_layer_of_a_call_lies_at_an_aligned_place(num_kv_heads: int, head_dim: int) -> None:
    layout = KvLayout(4, num_kv_heads, head_dim, 16, "bfloat16")
    limits = call_limits(layout, "cuda", max_batch_tokens=8192, max_model_len=5000)
    assert limits.max_tokens == limits.padded(limits.max_tokens) == 2048
    assert limits.max_past == limits.padded(limits.max_past) >= 5000
    for size in np.random.default_rng(0).integers(1, 5000, 100).tolist():
        assert 2 * num_kv_heads * limits.padded(size) * head_dim * 2 % 256 == 0


def test_on_the_cpu_nothing_is_padded() -> None:
    layout = KvLayout(4, 8, 128, 16, "float32")
    limits = call_limits(layout, "cpu", max_batch_tokens=512, max_model_len=777)
    assert (limits.max_tokens, limits.max_past, limits.padded(5)) == (512, 777, 5)
    assert call_limits(layout, "cpu", 512, 777, max_tokens=64).max_tokens == 64
