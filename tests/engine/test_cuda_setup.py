import pytest

from engine.executors.cuda_setup import StepLimits, last_tokens, whole_prompts
from engine.kv.layout import KvLayout

LAYOUT = KvLayout(num_layers=2, num_kv_heads=1, head_dim=8, block_size=16, dtype="float32")


@pytest.mark.parametrize(
    ("max_batch_tokens", "max_model_len"), [(100, 1000), (1000, 100), (1000, 1000), (64, 30), (7, 7)]
)
def test_memory_is_measured_with_the_most_tokens_and_with_the_longest_sequence(
    max_batch_tokens: int, max_model_len: int
) -> None:
    limits = StepLimits(max_batch_tokens, max_num_seqs=4, max_model_len=max_model_len, max_graph_rows=0)
    prompts = whole_prompts(LAYOUT, limits)
    assert sum(span.num_tokens for span in prompts) == max_batch_tokens
    [last] = last_tokens(LAYOUT, limits)
    assert last.start + last.num_tokens == max_model_len
    for span in (*prompts, last):
        assert span.start + span.num_tokens <= max_model_len
        assert len(span.block_ids) == LAYOUT.num_blocks_for(span.start + span.num_tokens)
        assert set(span.block_ids) == {0}
