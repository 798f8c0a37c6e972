from random import Random

import numpy as np
import pytest

from engine.kv.layout import KvLayout
from kv_transfer.plan import TransferPlan, plan_transfer

MODEL_LAYERS = 4
HEAD_DIM = 2


def ranks(tensor: int, pipeline: int, num_kv_heads: int, block_size: int) -> list[KvLayout]:
    """All ranks of a worker; with more tensor ranks than kv heads each head is on several of them."""
    layers = MODEL_LAYERS // pipeline
    heads = max(1, num_kv_heads // tensor)
    return [
        KvLayout(layers, heads, HEAD_DIM, block_size, "int32", stage * layers, rank * num_kv_heads // tensor)
        for stage in range(pipeline)
        for rank in range(tensor)
    ]


def fill(layout: KvLayout, model: np.ndarray) -> np.ndarray:
    """A rank's blocks, in order, from the whole model's KV `[token, layer, k|v, head, dim]`, token by token."""
    blocks = np.full(layout.shape(layout.num_blocks_for(len(model))), -1, np.int32)
    for token, kv in enumerate(model):
        mine = kv[
            layout.first_layer : layout.first_layer + layout.num_layers,
            :,
            layout.first_kv_head : layout.first_kv_head + layout.num_kv_heads,
        ]
        blocks[token // layout.block_size, :, :, :, token % layout.block_size] = mine
    return blocks


def apply(plan: TransferPlan, sources: list[np.ndarray], sink: np.ndarray, pieces, num_tokens: int, held: int) -> int:
    """Do the copies byte row by byte row; returns how many bytes they were."""
    num_bytes = 0
    target = sink.reshape(len(sink), -1).view(np.uint8)
    for rank, layers, blocks in pieces:
        source = sources[rank].reshape(len(sources[rank]), -1).view(np.uint8)
        for copy in plan.copies(rank, layers, blocks, num_tokens, held):
            assert copy.source_rank == rank
            assert copy.source_block in blocks
            for row in range(copy.count):
                a = copy.source_offset + row * copy.source_stride
                b = copy.sink_offset + row * copy.sink_stride
                assert a + copy.size <= source.shape[1]
                assert b + copy.size <= target.shape[1]
                target[copy.sink_block, b : b + copy.size] = source[copy.source_block, a : a + copy.size]
                num_bytes += copy.size
    return num_bytes


@pytest.mark.parametrize("sink_shape", [(t, p) for t in (1, 2, 4) for p in (1, 2)])
@pytest.mark.parametrize("source_shape", [(t, p) for t in (1, 2, 4) for p in (1, 2)])
@pytest.mark.parametrize("block_sizes", [(2, 4), (4, 4), (4, 2), (8, 2)])
def test_every_pair_of_splits_moves_every_token_once(source_shape, sink_shape, block_sizes) -> None:
    random = Random(f"{source_shape}{sink_shape}{block_sizes}")
    for num_kv_heads in (2, 4):
        source_layouts = ranks(*source_shape, num_kv_heads, block_sizes[0])
        num_tokens = random.randint(1, 30)
        model = np.arange(num_tokens * MODEL_LAYERS * 2 * num_kv_heads * HEAD_DIM, dtype=np.int32)
        model = model.reshape(num_tokens, MODEL_LAYERS, 2, num_kv_heads, HEAD_DIM)
        sources = [fill(layout, model) for layout in source_layouts]
        for sink_layout in ranks(*sink_shape, num_kv_heads, block_sizes[1]):
            held = random.randint(0, num_tokens // sink_layout.block_size) * sink_layout.block_size
            plan = plan_transfer(source_layouts, sink_layout)
            sink = np.full(sink_layout.shape(sink_layout.num_blocks_for(num_tokens)), -7, np.int32)
            pieces = []
            for rank, layout in enumerate(source_layouts):
                cut = random.randint(1, layout.num_layers)
                first = plan.first_block(rank, held)
                for layers in (range(cut), range(cut, layout.num_layers)):
                    for block in range(first, layout.num_blocks_for(num_tokens)):
                        if plan.needs(rank, layers):
                            pieces.append((rank, layers, range(block, block + 1)))
            random.shuffle(pieces)
            num_bytes = apply(plan, sources, sink, pieces, num_tokens, held)

            expected = fill(sink_layout, model)
            for token in range(held, num_tokens):
                block, slot = divmod(token, sink_layout.block_size)
                assert (sink[block, :, :, :, slot] == expected[block, :, :, :, slot]).all(), (token, held)
            assert (sink[: held // sink_layout.block_size] == -7).all(), "a block that the sink held was written"
            slot_bytes = sink_layout.block_bytes // sink_layout.block_size
            end = min(
                -(-num_tokens // source_layouts[0].block_size) * source_layouts[0].block_size,
                sink_layout.num_blocks_for(num_tokens) * sink_layout.block_size,
            )
            assert num_bytes == (end - held) * slot_bytes, "a byte travelled twice, or one too many"


def test_equal_layouts_copy_whole_blocks_and_whole_layer_groups() -> None:
    layout = KvLayout(32, 8, 128, 16, "bfloat16")
    plan = plan_transfer([layout], layout)
    (copy,) = plan.copies(0, range(32), range(3, 4), 100, 0)
    assert (copy.source_block, copy.sink_block, copy.size, copy.count) == (3, 3, layout.block_bytes, 1)
    (copy,) = plan.copies(0, range(8, 16), range(3, 4), 100, 0)
    assert (copy.source_offset, copy.sink_offset) == (8 * layout.layer_bytes, 8 * layout.layer_bytes)
    assert (copy.size, copy.count) == (8 * layout.layer_bytes, 1)
    assert plan.direct_offset(0, range(8, 16)) == 8 * layout.layer_bytes


def test_a_head_split_copies_the_longest_runs_of_heads() -> None:
    sources = [KvLayout(4, 4, 64, 16, "bfloat16", first_kv_head=first) for first in (0, 4)]
    sink = KvLayout(4, 2, 64, 16, "bfloat16", first_kv_head=4)
    plan = plan_transfer(sources, sink)
    (copy,) = plan.copies(1, range(4), range(1), 16, 0)
    assert (copy.size, copy.count) == (2 * sink.head_bytes, 8)
    assert not plan.needs(0, range(4))
    assert list(plan.copies(0, range(4), range(1), 16, 0)) == []
    assert plan.direct_offset(1, range(4)) is None


def test_of_replicated_heads_one_rank_sends() -> None:
    sources = [KvLayout(2, 1, 64, 16, "bfloat16", first_kv_head=head) for head in (0, 0, 1, 1)]
    plan = plan_transfer(sources, KvLayout(2, 2, 64, 16, "bfloat16"))
    assert [rank for rank in range(4) if plan.needs(rank, range(2))] == [0, 2]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"head_dim": 32}, "head_dim"),
        ({"dtype": "float16"}, "dtype"),
        ({"block_size": 24}, "block_size"),
        ({"num_layers": 3}, "num_layers"),
        ({"first_layer": 1}, "num_layers"),
        ({"num_kv_heads": 1}, "num_kv_heads"),
        ({"first_kv_head": 1}, "num_kv_heads"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(change: dict, name: str) -> None:
    sizes = {"num_layers": 4, "num_kv_heads": 2, "head_dim": 64, "block_size": 16, "dtype": "bfloat16"}
    with pytest.raises(ValueError, match=f"^{name}"):
        plan_transfer([KvLayout(**sizes | change)], KvLayout(**sizes))
