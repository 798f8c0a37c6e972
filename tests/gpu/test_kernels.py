"""Every kernel against plain torch on fresh random inputs; on the CPU they run in Triton's interpreter."""

import os
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

from engine import sampler  # noqa: E402
from engine.executors.base import SampleSpec  # noqa: E402
from engine.kernels.activation import gated  # noqa: E402
from engine.kernels.argmax import argmax  # noqa: E402
from engine.kernels.gemv import gemv, gemv_gated  # noqa: E402
from engine.kernels.norm import add_rms_norm, rms_norm  # noqa: E402
from engine.kernels.rope_kv import rotate_and_store  # noqa: E402
from engine.kernels.select import draw, thresholds  # noqa: E402
from engine.kernels.skinny import skinny_linear  # noqa: E402
from engine.layers.rotary import Rotation  # noqa: E402
from engine.request import SamplingParams  # noqa: E402

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def _fresh_inputs() -> None:
    print("torch.manual_seed", torch.seed())  # shown when the test fails


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=tolerance, atol=tolerance)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    if DEVICE == "cpu" and actual.dtype == torch.bfloat16:
        assert_close(actual, expected)  # the interpreter cuts bits off where a GPU rounds to the nearest
    else:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 4096), (3, 100), (7, 33), (5, 1)])
def test_rms_norm_equals_torch(rows: int, size: int, dtype: torch.dtype) -> None:
    x, weight = random(rows, size, dtype=dtype), random(size)
    assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x.float(), (size,), weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_takes_heads_inside_a_fused_projection(dtype: torch.dtype) -> None:
    heads, weight = random(5, 11, 80, dtype=dtype), random(80)
    for view in (heads[:, :7], heads[:, 7:9], heads[1:4, 7:9]):
        normalized = rms_norm(view, weight, 1e-6)
        assert normalized.is_contiguous()
        assert_close(normalized, F.rms_norm(view.float(), (80,), weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 4096), (9, 250)])
def test_add_rms_norm_adds_in_place_and_normalizes_the_rounded_sum(rows: int, size: int, dtype: torch.dtype) -> None:
    hidden, delta, weight = random(rows, size, dtype=dtype), random(rows, size, dtype=dtype), random(size)
    expected = hidden.clone()
    expected += delta
    normalized = add_rms_norm(hidden, delta, weight, 1e-5)
    assert_equal(hidden, expected)
    assert_close(normalized, F.rms_norm(hidden.float(), (size,), weight, 1e-5))


def activated(gate: Tensor, kind: str) -> Tensor:
    return F.silu(gate.float()) if kind == "silu" else F.gelu(gate.float(), approximate="tanh")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "size"), [(1, 14336), (6, 77)])
def test_gated_equals_torch(rows: int, size: int, kind: str, dtype: torch.dtype) -> None:
    gate_up = 4 * random(rows, 2 * size, dtype=dtype)
    gate, up = gate_up.chunk(2, -1)
    assert_close(gated(gate_up, kind), activated(gate, kind) * up.float())


def make_rotation(num_tokens: int, half: int, dtype: torch.dtype) -> Rotation:
    angles = random(num_tokens, half)
    signed = torch.stack((-angles.sin(), angles.sin()), dim=1)
    return Rotation(angles.cos().to(dtype)[:, None, None], signed.to(dtype)[:, None])


def rotated(heads: Tensor, rotation: Rotation) -> Tensor:
    wide = heads.float().clone()
    Rotation(rotation.cos.float(), rotation.sin.float()).apply_(wide)
    return wide.to(heads.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "half"), [(128, 64), (80, 40), (96, 20), (64, 12)])
def test_rotation_and_store_equal_torch(head_dim: int, half: int, dtype: torch.dtype) -> None:
    num_tokens, num_heads, num_kv_heads, block_size = 5, 10, 3, 4
    heads = random(num_tokens, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    rotation = make_rotation(num_tokens, half, dtype)
    pool = random(6, 3, 2, num_kv_heads, block_size, head_dim, dtype=dtype)
    slots = torch.randperm(6 * block_size, device=DEVICE)[:num_tokens]
    slots[2] = -1
    expected_heads, expected_pool = heads.clone(), pool.clone()
    given, empty_pool = heads.clone(), pool.clone()
    expected_heads[:, :-num_kv_heads] = rotated(heads[:, :-num_kv_heads], rotation)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            kv = expected_heads[token, num_heads:].view(2, num_kv_heads, head_dim)
            expected_pool[slot // block_size, 1, :, :, slot % block_size] = kv
    rotate_and_store(heads, rotation.cos, rotation.sin, pool[:, 1], slots, num_heads, num_kv_heads)
    assert_close(heads, expected_heads)
    assert_close(pool, expected_pool)
    out, kept = torch.empty_like(given), given.clone()
    rotate_and_store(given, rotation.cos, rotation.sin, empty_pool[:, 1], slots, num_heads, num_kv_heads, out=out)
    assert torch.equal(out, heads)
    assert torch.equal(given, kept)
    assert torch.equal(empty_pool, pool)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter does not round to float8")
def test_an_fp8_pool_holds_scaled_and_clamped_keys_and_values() -> None:
    heads = 200 * random(4, 8 + 2 * 2, 64, dtype=torch.bfloat16)
    rotation = make_rotation(4, 32, torch.bfloat16)
    pool = torch.zeros(3, 2, 2, 2, 8, 64, device=DEVICE).to(torch.float8_e4m3fn)
    slots = torch.tensor([3, 17, 8, 23], dtype=torch.int32, device=DEVICE)
    rotate_and_store(heads, rotation.cos, rotation.sin, pool[:, 1], slots, 8, 2, 0.5, 2.0)
    kv = heads[:, 8:].view(4, 2, 2, 64).float() / torch.tensor([0.5, 2.0], device=DEVICE)[:, None, None]
    assert kv.abs().max() > 448
    expected = kv.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    stored = torch.stack([pool[slot // 8, 1, :, :, slot % 8].float() for slot in slots.tolist()])
    torch.testing.assert_close(stored, expected, rtol=0, atol=0)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs more than 4 GiB of device memory")
def test_a_pool_of_more_than_2_to_the_31_elements_is_addressed_right() -> None:
    pool = torch.zeros(2**31 // (2 * 8 * 16 * 128) + 2, 2, 8, 16, 128, dtype=torch.bfloat16, device=DEVICE)
    heads, rotation = random(1, 48, 128, dtype=torch.bfloat16), make_rotation(1, 64, torch.bfloat16)
    slots = torch.tensor([pool.shape[0] * 16 - 1], device=DEVICE)
    rotate_and_store(heads, rotation.cos, rotation.sin, pool, slots, 32, 8)
    torch.testing.assert_close(pool[-1, :, :, -1], heads[0, 32:].view(2, 8, 128), rtol=0, atol=0)


SHAPES = [(6144, 4096), (100, 4096), (33, 77), (6, 5000), (1, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gemv_equals_torch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    num_out, num_in = shape
    x, weight = random(1, num_in, dtype=dtype), random(num_out, num_in, dtype=dtype) / num_in**0.5
    bias = random(num_out, dtype=dtype)
    product = x.double() @ weight.double().T
    assert_close(gemv(x, weight), product)
    assert_close(gemv(x, weight, bias), product + bias)
    scale = random(num_out).abs()
    assert_close(gemv(x, weight, bias, scale), product * scale + bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(2048, 4096), (2 * 33, 77), (2 * 3, 3000)])
def test_gemv_gated_equals_torch(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    x, weight = random(1, shape[1], dtype=dtype), random(*shape, dtype=dtype) / shape[1] ** 0.5
    gate, up = (x.double() @ weight.double().T).chunk(2, -1)
    assert_close(gemv_gated(x, weight, kind), activated(gate, kind) * up)
    scale = random(shape[0]).abs()
    gate, up = (x.double() @ weight.double().T * scale).chunk(2, -1)
    assert_close(gemv_gated(x, weight, kind, scale), activated(gate, kind) * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "num_out", "num_in"), [(2, 192, 512), (17, 100, 384), (33, 33, 77), (64, 16512, 256)])
def test_skinny_linear_equals_torch(rows: int, num_out: int, num_in: int, dtype: torch.dtype) -> None:
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies the bits of bfloat16")
    x, weight = random(rows, num_in, dtype=dtype), random(num_out, num_in, dtype=dtype) / num_in**0.5
    bias = random(num_out, dtype=dtype)
    product = x.double() @ weight.double().T
    assert_close(skinny_linear(x, weight), product)
    assert_close(skinny_linear(x, weight, bias), product + bias)


def make_weights(rows: int, vocab: int, *, ties: bool) -> Tensor:
    logits = random(rows, vocab) * torch.rand(rows, 1, device=DEVICE) * 8
    if ties:
        logits = (2 * logits).round() / 2
    return (logits - logits.amax(-1, keepdim=True)).exp()


def make_specs(params: Sequence[SamplingParams]) -> list[SampleSpec]:
    return [
        SampleSpec(params=each, seed=row, token_ids=(1,) * row, num_prompt_tokens=0) for row, each in enumerate(params)
    ]


def kernel_filter(weights: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The thresholds that the kernel finds for `params`."""
    min_p = torch.tensor([each.min_p for each in params], dtype=torch.float32, device=DEVICE)
    top_k = torch.tensor([each.top_k for each in params], device=DEVICE)
    top_p = torch.tensor([each.top_p for each in params], dtype=torch.float64, device=DEVICE)
    return thresholds(weights, min_p, top_k, top_p)


PARAMS = [
    SamplingParams(),
    SamplingParams(top_k=1),
    SamplingParams(top_k=50),
    SamplingParams(top_k=10**9),
    SamplingParams(top_p=0.9),
    SamplingParams(top_p=0.999999),
    SamplingParams(top_p=1e-9),
    SamplingParams(min_p=0.05),
    SamplingParams(min_p=0.3, top_k=400),
    SamplingParams(top_k=40, top_p=0.7),
    SamplingParams(min_p=0.02, top_k=100, top_p=0.95),
    SamplingParams(min_p=0.02, top_p=0.5),
]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("vocab", [61, 5003, 20011] if DEVICE == "cpu" else [61, 5003, 20011, 128256])
def test_thresholds_and_draw_are_exactly_the_sampler_s(vocab: int, ties: bool) -> None:
    weights = make_weights(len(PARAMS), vocab, ties=ties)
    specs = make_specs(PARAMS)
    expected = weights.clone()
    sampler._filter(expected, specs)
    least = kernel_filter(weights, PARAMS)
    torch.testing.assert_close(weights.masked_fill(weights < least[:, None], 0.0), expected, rtol=0, atol=0)

    for numbers in (torch.rand(len(PARAMS), dtype=torch.float64), torch.full((len(PARAMS),), 1 - 2**-53).double()):
        numbers = numbers.to(DEVICE)
        cumulative = sampler._whole(expected).cumsum(-1)
        targets = (numbers[:, None] * cumulative[:, -1:]).long().minimum(cumulative[:, -1:] - 1)
        token_ids = torch.searchsorted(cumulative, targets, right=True).squeeze(1)
        assert draw(weights, least, numbers).tolist() == token_ids.tolist()


def test_rows_of_zeros_and_of_one_value_are_kept_and_drawn_from() -> None:
    weights = torch.zeros(3, 200, device=DEVICE)
    weights[1] = 1.0
    weights[2, 7] = 1.0
    params = [SamplingParams(top_k=5, top_p=0.5)] * 3
    expected = weights.clone()
    sampler._filter(expected, make_specs(params))
    least = kernel_filter(weights, params)
    torch.testing.assert_close(weights.masked_fill(weights < least[:, None], 0.0), expected, rtol=0, atol=0)
    numbers = torch.full((3,), 0.5, dtype=torch.float64, device=DEVICE)
    assert draw(weights, least, numbers).tolist() == [0, 100, 7]


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_a_captured_graph_replays_every_kernel_on_new_inputs() -> None:
    """A decoder layer's chain of kernels, so that each starts while the one ahead of it ends."""
    dtype = torch.bfloat16
    hidden, delta = random(1, 512, dtype=dtype), random(1, 512, dtype=dtype)
    norm, qkv = random(512), random(64 * 12, 512, dtype=dtype) / 23
    gate_up, down = random(2 * 1000, 512, dtype=dtype) / 23, random(512, 1000, dtype=dtype) / 32
    rotation, slots = make_rotation(1, 32, dtype), torch.tensor([5], device=DEVICE)
    pool = torch.zeros(2, 2, 2, 16, 64, dtype=dtype, device=DEVICE)
    switches = (torch.zeros(1, device=DEVICE), torch.tensor([40], device=DEVICE), torch.full((1,), 0.9).double().cuda())
    numbers = torch.rand(1, dtype=torch.float64, device=DEVICE)

    def run() -> list[Tensor]:
        summed = hidden.clone()
        x = add_rms_norm(summed, delta, norm, 1e-5)
        heads = gemv(x, qkv).view(1, 12, 64)
        rotate_and_store(heads, rotation.cos, rotation.sin, pool, slots, 8, 2)
        product = gemv_gated(rms_norm(summed, norm, 1e-5), gate_up, "silu")
        summed = add_rms_norm(summed, gemv(gated(torch.cat((product, product), 1), "gelu_tanh"), down), norm, 1e-5)
        weights = (summed.float() - summed.float().amax()).exp()
        least = thresholds(weights, *switches)
        return [heads, pool.clone(), summed, least, draw(weights, least, numbers)]

    expected_first = [each.clone() for each in run()]
    graph, outputs = captured(run)
    for _ in range(3):
        graph.replay()
        assert all(map(torch.equal, outputs, expected_first))
        hidden.copy_(random(1, 512, dtype=dtype))
        graph.replay()
        again = [each.clone() for each in outputs]
        expected_first = [each.clone() for each in run()]
        assert all(map(torch.equal, again, expected_first))


def captured(run: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph, outputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5), (3, 20001), (2, 8192)])
def test_argmax_gives_the_first_of_the_largest(shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits = random(*shape, dtype=dtype)
    assert argmax(logits).tolist() == logits.float().argmax(-1).tolist()
    logits[:, -1] = logits[:, -3] = 100.0
    assert argmax(logits).tolist() == [shape[1] - 3] * shape[0]
    assert argmax(torch.full_like(logits, -torch.inf)).tolist() == [0] * shape[0]
