"""FP8 products and loading on a GPU, against float64 products of the same FP8 numbers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.executors.model_loading import load_model, make_model
from engine.layers.fp8 import FP8, dequantize_weight, quantize_weight
from engine.layers.linear import Linear
from engine.model_config import load_model_config, with_quantization
from engine.models.decoder import CausalLM
from engine.weights import dummy_weights
from tests.checkpoints import make_checkpoint, make_fp8_checkpoint

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda:0")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(CUDA).manual_seed(seed)
    return torch.randn(*shape, device=CUDA, dtype=torch.bfloat16, generator=generator)


def make_linear(size: int, parts: dict[str, int], *, bias: bool = False) -> Linear:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with CUDA:
            return Linear(size, parts, bias=bias)
    finally:
        torch.set_default_dtype(torch.float32)


def make_fp8_linear(size: int, num_rows: int, *, bias: bool = False) -> Linear:
    """Two parts, the second's values 30 times the first's."""
    layer = make_linear(size, {"a": num_rows // 2, "b": num_rows // 2}, bias=bias)
    layer.allocate(fp8=True)
    for first, factor in ((0, 1), (num_rows // 2, 30)):
        rows = slice(first, first + num_rows // 2)
        layer.fill(rows, *quantize_weight(random(num_rows // 2, size, seed=first) * factor * size**-0.5))
    if layer.bias is not None:
        layer.bias.copy_(random(num_rows))
    layer.finalize()
    return layer


def exact(layer: Linear, x: torch.Tensor) -> torch.Tensor:
    assert layer.weight_scale is not None
    product = x.double() @ dequantize_weight(layer.weight, layer.weight_scale).double().t()
    return product if layer.bias is None else product + layer.bias.double()


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """By the size of each half. Sums are accumulated in 14 bits on Hopper, results rounded to bfloat16."""
    assert found.dtype is torch.bfloat16
    for ours, theirs in zip(found.double().chunk(2, -1), expected.chunk(2, -1), strict=True):
        error = (ours - theirs).abs()
        assert error.square().mean().sqrt() < 0.01 * theirs.std()
        assert (error - theirs.abs() / 128).max() < 0.1 * theirs.std()


@pytest.mark.parametrize(("num_tokens", "size"), [(1, 64), (5, 4096), (33, 14336), (3, 20496), (2048, 4096)])
def test_rows_are_quantized_with_their_own_largest_value(num_tokens: int, size: int) -> None:
    kernels = pytest.importorskip("engine.kernels.quantize")
    x = random(num_tokens, 2 * size)[:, :size] * 3
    x[-1] = 0
    quantized, scales = kernels.quantize_rows(x)
    expected_scales = (x.float().abs().amax(1, keepdim=True) / 448).clamp(min=1e-12)
    torch.testing.assert_close(scales, expected_scales)
    expected = (x.float() / expected_scales).to(FP8).float()
    # A division that ends a bit apart may fall on the other side of a rounding border.
    assert (quantized.float() != expected).float().mean() < 1e-3
    torch.testing.assert_close(quantized.float(), expected, rtol=1 / 8, atol=2**-9)
    assert (quantized[-1].float() == 0).all()


def test_a_static_scale_clips_what_lies_outside() -> None:
    kernels = pytest.importorskip("engine.kernels.quantize")
    x = torch.tensor([[1.0, -2.0, 500.0, -500.0, 0.0] + [0.25] * 27] * 3, device=CUDA, dtype=torch.bfloat16)
    quantized, scales = kernels.quantize_rows(x, torch.tensor(0.5, device=CUDA))
    assert scales.tolist() == [[0.5]] * 3
    assert quantized[2, :6].float().tolist() == [2.0, -4.0, 448.0, -448.0, 0.0, 0.5]


@pytest.mark.parametrize("num_tokens", [1, 2, 17, 128, 600, 1000])
@pytest.mark.parametrize(
    ("size", "num_rows", "bias"), [(64, 32, True), (4096, 6144, False), (14336, 4096, True), (1040, 96, True)]
)
def test_products_are_those_of_the_fp8_numbers(num_tokens: int, size: int, num_rows: int, bias: bool) -> None:
    kernels = pytest.importorskip("engine.kernels.quantize")
    layer = make_fp8_linear(size, num_rows, bias=bias)
    x = random(num_tokens, size, seed=7)
    seen = x.double()
    if num_tokens > 1:  # a single token is not quantized
        quantized, scales = kernels.quantize_rows(x)
        seen = quantized.double() * scales
    assert_close(layer(x), exact(layer, seen))


@pytest.mark.parametrize("num_tokens", [2, 100])
def test_products_use_a_static_input_scale(num_tokens: int) -> None:
    layer = make_fp8_linear(256, 64)
    layer.input_scale = torch.tensor(1 / 64, device=CUDA)
    x = random(num_tokens, 256)
    seen = (x.float() * 64).clamp(-448, 448).to(FP8).double() / 64
    assert_close(layer(x), exact(layer, seen))


@pytest.mark.parametrize("num_tokens", [1, 32])
def test_a_cuda_graph_holds_the_product(num_tokens: int) -> None:
    layer = make_fp8_linear(512, 256)
    x = random(num_tokens, 512)
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
    x.copy_(random(num_tokens, 512, seed=5) * 9)
    graph.replay()
    assert torch.equal(out, layer(x))


@pytest.mark.parametrize("form", ["compressed-tensors", "modelopt"])
def test_a_checkpoint_keeps_its_fp8_weights(tmp_path: Path, form: str) -> None:
    ignore = ("lm_head", "model.layers.1.self_attn.k_proj")
    path = make_fp8_checkpoint(tmp_path, form=form, ignore=ignore)
    model = load_model(path, load_model_config(path), torch.bfloat16, CUDA, None)
    stored = load_file(path / "model-1.safetensors")
    scales = load_file(path / "model-2.safetensors")
    first = model.model.layers[0].self_attn.qkv_proj
    assert first.weight.dtype is FP8
    assert (first.input_scale is not None) == (form == "modelopt")
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    assert torch.equal(first.weight.float().cpu(), torch.cat([stored[name].float() for name in names]))
    expected = torch.cat([scales[f"{name}_scale"].reshape(1).expand(len(stored[name])) for name in names])
    assert torch.equal(first.weight_scale.cpu(), expected)
    assert model.model.layers[1].self_attn.qkv_proj.weight.dtype is torch.bfloat16
    assert model.lm_head is not None
    assert model.lm_head.weight.dtype is torch.bfloat16


def test_weights_are_quantized_at_load_where_their_shape_allows(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama", tokenizer=False, intermediate_size=88)
    config = with_quantization(load_model_config(path), "fp8")
    model = load_model(path, config, torch.bfloat16, CUDA, None)
    layer = model.model.layers[0]
    assert layer.self_attn.o_proj.weight.dtype is layer.mlp.gate_up_proj.weight.dtype is FP8
    assert layer.mlp.down_proj.weight.dtype is torch.bfloat16  # 88 is not a multiple of 16
    stored = load_file(path / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    rounded = dequantize_weight(*quantize_weight(stored)).bfloat16()
    assert torch.equal(layer.mlp.down_proj.weight.cpu(), rounded)


@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_dummy_weights_are_equal_each_time(tmp_path: Path, quantization: str | None) -> None:
    path = make_checkpoint(tmp_path, "llama", tokenizer=False)
    config = with_quantization(load_model_config(path), quantization)

    def make() -> CausalLM:
        model = make_model(config, torch.bfloat16, CUDA)
        dummy_weights(model, quantization=config.quantization)
        return model

    first, second = make().state_dict(), make().state_dict()
    assert first["model.layers.0.mlp.gate_up_proj.weight"].dtype is (FP8 if quantization else torch.bfloat16)
    assert all(torch.equal(first[name].float(), second[name].float()) for name in first)
