from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.attention.base import Span
from engine.attention.paged import PagedAttention
from engine.executors.tensorrt.layer_range import LayerRange
from engine.models.decoder import CausalLM
from tests.checkpoints import make_fp8_checkpoint
from tests.engine.tensorrt.ranges import fp8_model, load, small_model, whole_range

FAMILIES = ("llama3", "mistral", "phi3", "qwen2", "qwen3", "gemma2")
BLOCK_SIZE = 4
STEPS = (  # of (sequence, start, number of tokens): one prompt alone, one in chunks, others beside it
    ((0, 0, 5),),
    ((0, 5, 11), (1, 0, 7), (2, 0, 1)),
    ((2, 1, 9), (0, 16, 1)),
)


class Steps:
    """Steps of three sequences in the paged KV of the model's own attention."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        config = model.config
        shape = (20, config.num_layers, 2, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
        self.kv = torch.full(shape, torch.nan)
        blocks = torch.randperm(20, generator=torch.Generator().manual_seed(1)).tolist()
        self.blocks = [blocks[:6], blocks[6:12], blocks[12:18]]
        self.attention = PagedAttention(self.kv)

    def keys_values(self, layer: int, sequence: int, start: int, end: int) -> Tensor:
        """[k|v, kv_head, position, head_dim]"""
        pages = self.kv[self.blocks[sequence], layer]  # [block, k|v, kv_head, slot, head_dim]
        return pages.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, start:end]

    def run(self, token_ids: Tensor, step: Sequence[tuple[int, int, int]]) -> Tensor:
        spans = [Span(start, num_tokens, self.blocks[sequence]) for sequence, start, num_tokens in step]
        return self.model(token_ids, positions_of(step), self.attention.begin_step(spans, None))


def positions_of(step: Sequence[tuple[int, int, int]]) -> Tensor:
    return torch.cat([torch.arange(start, start + num_tokens) for _, start, num_tokens in step]).float()


def range_inputs(
    model: CausalLM, steps: Steps, step: Sequence[tuple[int, int, int]], layers: LayerRange
) -> list[Tensor]:
    """All but hidden."""
    positions = positions_of(step)
    rotation = model.rotary.rotation(positions)
    sequence_ids = torch.cat([torch.full((num_tokens,), sequence) for sequence, _, num_tokens in step])
    past = [(sequence, start) for sequence, start, _ in step if start > 0]
    # Where nothing is past: one key of no sequence. What it holds must not matter.
    past_positions = torch.cat([torch.arange(end) for _, end in past] or [torch.zeros(1)])
    past_ids = torch.cat([torch.full((end,), sequence) for sequence, end in past] or [torch.tensor([-1])])
    of_none = torch.full((2, model.config.num_kv_heads, 1, model.config.head_dim), 1e4)
    pasts = [
        torch.cat([steps.keys_values(layer, sequence, 0, end) for sequence, end in past] or [of_none], dim=2)
        for layer in range(layers.first, layers.end)
    ]
    integers = (positions, sequence_ids, past_positions, past_ids)
    return [rotation.cos[:, 0, 0], rotation.sin[:, 0, 1], *(item.int() for item in integers), *pasts]


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_ranges_one_after_the_other_are_the_model_with_its_paged_attention(family: str, tmp_path: Path) -> None:
    model = small_model(tmp_path, family)
    num_layers = model.config.num_layers
    ranges = [LayerRange(model, 0, 1), LayerRange(model, 1, num_layers)]
    steps = Steps(model)
    generator = torch.Generator().manual_seed(0)
    for step in STEPS:
        token_ids = torch.randint(512, (sum(tokens for _, _, tokens in step),), generator=generator)
        hidden = model.embed(token_ids)
        new: list[Tensor] = []
        for layers in ranges:
            before = hidden.clone()
            outputs = layers(hidden, *range_inputs(model, steps, step, layers))
            assert torch.equal(hidden, before), "an input was changed"
            hidden = outputs[0]
            new += outputs[1:]
        torch.testing.assert_close(hidden, steps.run(token_ids, step), rtol=1e-4, atol=1e-4)
        for layer in range(num_layers):
            stored = [steps.keys_values(layer, sequence, start, start + size) for sequence, start, size in step]
            torch.testing.assert_close(new[layer], torch.cat(stored, dim=2), rtol=1e-4, atol=1e-4)


def test_its_tensors_are_named_by_the_layers_of_the_model(tmp_path: Path) -> None:
    layers = LayerRange(small_model(tmp_path, "llama", num_hidden_layers=3), 1, 3)
    names = ["hidden", "cos", "sin", "positions", "sequence_ids", "past_positions", "past_sequence_ids"]
    assert layers.input_names == [*names, "past_1", "past_2"]
    assert layers.output_names == ["out", "new_1", "new_2"]
    assert all(name.startswith(("model.layers.1.", "model.layers.2.")) for name in layers.weights())


def test_weights_are_those_of_the_checkpoint_fused(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    layers = whole_range(small_model(tmp_path, "qwen2"))
    stored = load_file(tmp_path / "model.safetensors")
    weights = layers.weights()
    for name, parts in layers.fused().items():
        for end in ("weight", "bias"):
            if f"{name}.{end}" in weights:
                wanted = torch.cat([stored[f"{part}.{end}"] for part in parts])
                assert torch.equal(weights[f"{name}.{end}"](), wanted)
                assert list(parts.values()) == [len(stored[f"{part}.{end}"]) for part in parts]
    assert torch.equal(
        weights["model.layers.1.input_layernorm.weight"](), stored["model.layers.1.input_layernorm.weight"]
    )
    assert set(weights) == {name for name, _ in layers.named_parameters()}


def test_it_holds_no_memory_of_its_own_and_sees_new_weights_of_the_model(tmp_path: Path) -> None:
    model = small_model(tmp_path, "llama", torch.float16)
    layers = whole_range(model)
    assert sum(parameter.untyped_storage().nbytes() for parameter in layers.parameters()) < 100
    linear = model.model.layers[1].mlp.down_proj  # type: ignore[union-attr]
    linear.weight.fill_(2.0)  # type: ignore[union-attr, operator]
    assert layers.weights()["model.layers.1.mlp.down_proj.weight"]().unique().tolist() == [2.0]


@pytest.mark.parametrize("static_inputs", [False, True])
def test_fp8_weights_stay_fp8_with_their_scales(static_inputs: bool, tmp_path: Path) -> None:
    layers = whole_range(fp8_model(tmp_path, static_inputs=static_inputs))
    weights = layers.weights()
    name = "model.layers.0.self_attn.qkv_proj"
    assert weights[f"{name}.weight"]().dtype is torch.float8_e4m3fn
    assert weights[f"{name}.weight_scale"]().shape == (128,)
    assert (f"{name}.input_scale" in weights) is static_inputs


def test_fp8_weights_that_the_device_cannot_multiply_are_those_of_the_model_without_scales(tmp_path: Path) -> None:
    path = make_fp8_checkpoint(tmp_path, static_inputs=True)
    layers = whole_range(load(path, torch.bfloat16))
    assert {read().dtype for name, read in layers.weights().items() if "_proj" in name} == {torch.bfloat16}
    assert {name.rpartition(".")[2] for name in layers.weights()} == {"weight"}


def test_a_range_beyond_the_model_is_refused(tmp_path: Path) -> None:
    model = small_model(tmp_path, "llama")
    for first, end in ((0, 3), (1, 1), (-1, 1)):
        with pytest.raises(ValueError, match="of a model with 2"):
            LayerRange(model, first, end)
