"""The modules of a layer range in a form that can be traced: nothing in place, no kernels of one device.

`layer_range` puts them in the place of a model's own. They own no weights: see `Borrowing`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.attention.base import AttentionLayer
from engine.layers.attention import SelfAttention
from engine.layers.fp8 import FP8, FP8_MAX
from engine.layers.linear import Linear
from engine.layers.norm import RMSNorm
from engine.layers.rotary import Rotation


@dataclass(frozen=True, slots=True)
class Source:
    """A weight of the model. `read` makes it, where the model keeps it in another form."""

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]


class Borrowing(nn.Module):
    """Traced with parameters that have type and shape and no memory; computes with those of the model.

    So an export neither copies weights nor cares where and in which order of memory they are.
    """

    def __init__(self, sources: Mapping[str, Source]) -> None:
        super().__init__()
        self.sources = sources
        for name, source in sources.items():
            placeholder = torch.zeros((), dtype=source.dtype, device="cpu").expand(source.shape)
            self.register_parameter(name, nn.Parameter(placeholder, requires_grad=False))

    def tensor(self, name: str, device: torch.device) -> Tensor:
        if torch.compiler.is_exporting():
            return self.get_parameter(name)
        return self.sources[name].read().to(device)


class RangeLinear(Borrowing):
    """An FP8 weight is dequantized; where the checkpoint has a scale for the input, that becomes FP8 and back before:
    the form in which TensorRT finds products of FP8. Without, activations stay as they are."""

    def __init__(self, source: Linear) -> None:
        sources = {"weight": _weight_source(source)}
        # A layer may know the scale of its input also where its device cannot multiply FP8; it is not used then.
        scales = () if source.weight_scale is None else ("weight_scale", "input_scale")
        for name in ("bias", *scales):
            tensor = getattr(source, name)
            if tensor is not None:
                sources[name] = Source(tensor.shape, tensor.dtype, partial(getattr, source, name))
        if "input_scale" in sources:
            sources["zero_point"] = Source(torch.Size(()), FP8, lambda: torch.zeros((), dtype=FP8))
        super().__init__(sources)
        self.parts = source.parts
        self.dtype = source.dtype
        self.rounds_input = "input_scale" in sources

    def forward(self, x: Tensor) -> Tensor:
        """x [num_tokens, in] -> [num_tokens, out], in the type of `x`"""
        weight = self.tensor("weight", x.device)
        bias = self.tensor("bias", x.device).to(x.dtype) if "bias" in self.sources else None
        if self.rounds_input:
            x = rounded_to_fp8(x, self.tensor("input_scale", x.device), self.tensor("zero_point", x.device))
        if "weight_scale" in self.sources:
            weight = dequantized(weight, self.tensor("weight_scale", x.device), x.dtype)
        return F.linear(x, weight.to(x.dtype), bias)


def _weight_source(source: Linear) -> Source:
    """`source` may get another weight later, of the same form; it is read when it is asked for."""

    def read() -> Tensor:
        return source.weight if source.packed is None else source.packed.to_dense()

    weight = source.weight if source.packed is None else source.packed
    return Source(weight.shape, weight.dtype, read)


def dequantized(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """weight [out, in] FP8 and scale [out] float32 -> [out, in]"""
    if torch.compiler.is_exporting():
        attributes = {"axis": 0, "output_dtype": onnx_type(dtype)}
        return onnx_operator("DequantizeLinear", (weight, scale), attributes, dtype, weight.shape)
    return (weight.float() * scale[:, None]).to(dtype)


def rounded_to_fp8(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """To what FP8 with `scale` [] float32 can hold, in the type of `x`."""
    if torch.compiler.is_exporting():
        quantized = onnx_operator("QuantizeLinear", (x, scale, zero_point), {}, FP8, x.shape)
        attributes = {"output_dtype": onnx_type(x.dtype)}
        return onnx_operator("DequantizeLinear", (quantized, scale, zero_point), attributes, x.dtype, x.shape)
    quantized = (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return (quantized.float() * scale).to(x.dtype)


def onnx_operator(
    name: str, inputs: Sequence[Tensor], attributes: Mapping[str, int], dtype: torch.dtype, shape: Sequence[int]
) -> Tensor:
    out: Tensor = torch.onnx.ops.symbolic(name, inputs, dict(attributes), dtype=dtype, shape=shape)
    return out


def onnx_type(dtype: torch.dtype) -> int:
    """As ONNX's TensorProto.DataType numbers it."""
    return {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16}[dtype]


class RangeNorm(Borrowing):
    """The sum of `add` is in place, as the layers expect; tracing makes it an operation with a result."""

    def __init__(self, source: RMSNorm) -> None:
        super().__init__({"weight": Source(source.weight.shape, source.weight.dtype, lambda: source.weight)})
        self.shape, self.eps = source.shape, source.eps
        self.unit_offset = source.unit_offset  # the weight has it already

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.shape, self.tensor("weight", x.device), self.eps).to(x.dtype)

    def add(self, hidden: Tensor, delta: Tensor | None) -> Tensor:
        if delta is not None:
            hidden.add_(delta)
        return self.forward(hidden)


class RangeStep:
    """What the layers of a range share, made once, and the new keys and values that they leave.

    cos and sin [T, 1, half]; is_visible, distances [T, P + T] of keys back from the tokens; past as of `LayerRange`.
    """

    def __init__(
        self, first: int, past: Sequence[Tensor], cos: Tensor, sin: Tensor, is_visible: Tensor, distances: Tensor
    ) -> None:
        self.first, self.past = first, past
        self.cos, self.sin = cos, sin
        self.distances = distances
        self.masks: dict[int | None, Tensor] = {None: is_visible}
        self.new: list[Tensor] = []

    def mask(self, window: int | None) -> Tensor:
        """[T, P + T], true where attended to"""
        if window is not None and window not in self.masks:
            self.masks[window] = self.masks[None] & (self.distances < window)
        return self.masks[window]

    def rotate(self, heads: Tensor) -> Tensor:
        """heads [T, num_heads, head_dim]"""
        half = self.cos.shape[-1]
        first, second, *rest = torch.split(heads, split_sizes(half, heads.shape[-1]), dim=-1)
        turned = (first * self.cos - second * self.sin, second * self.cos + first * self.sin)
        return torch.cat((*turned, *rest), dim=-1)

    def extend(self, layer: AttentionLayer, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """key and value [T, num_kv_heads, head_dim] -> those of past and step [1, num_kv_heads, P + T, head_dim]"""
        key, value = key.transpose(0, 1)[None], value.transpose(0, 1)[None]
        self.new.append(torch.cat((key, value)))
        past_key, past_value = torch.split(self.past[layer.index - self.first], 1)
        return torch.cat((past_key, key), dim=2), torch.cat((past_value, value), dim=2)


def split_sizes(half: int, head_dim: int) -> list[int]:
    """Of a head: the two halves that rotate, and what does not, if there is any."""
    rest = head_dim - 2 * half
    return [half, half, rest] if rest else [half, half]


class RangeAttention(nn.Module):
    def __init__(self, source: SelfAttention, q_norm: RangeNorm | None, k_norm: RangeNorm | None) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = source.num_heads, source.num_kv_heads, source.head_dim
        self.layer = source.layer
        self.qkv_proj, self.o_proj = RangeLinear(source.qkv_proj), RangeLinear(source.o_proj)
        self.q_norm, self.k_norm = q_norm, k_norm

    def attend(self, x: Tensor, _rotation: Rotation, step: RangeStep) -> Tensor:
        """x [T, hidden_size] -> [T, num_heads * head_dim]"""
        heads = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)
        query, key, value = torch.split(heads, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        keys, values = step.extend(self.layer, step.rotate(key), value)
        queries = step.rotate(query).transpose(0, 1)[None]
        attend = attend_fused if self.layer.softcap is None else attend_softcapped
        out = attend(queries, keys, values, step.mask(self.layer.window), self.layer)
        return out.transpose(1, 2).reshape(x.shape[0], -1)


def attend_fused(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, layer: AttentionLayer) -> Tensor:
    """queries [1, num_heads, T, head_dim], keys and values [1, num_kv_heads, P + T, head_dim] -> as `queries`"""
    is_grouped = queries.shape[1] > keys.shape[1]
    return F.scaled_dot_product_attention(
        queries, keys, values, mask[None, None], scale=layer.scale, enable_gqa=is_grouped
    )


def attend_softcapped(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, layer: AttentionLayer) -> Tensor:
    """The same in plain operators, since TensorRT's attention has no cap. Scores in float32, as in the model."""
    assert layer.softcap is not None
    # [1, kv_head, query head of it, token, position]
    scaled = (queries.float() * layer.scale).to(queries.dtype)  # the scale itself may not fit 16 bits
    grouped = torch.unflatten(scaled, 1, (keys.shape[1], -1))
    scores = torch.matmul(grouped, keys[:, :, None].transpose(-1, -2)).float()
    scores = torch.tanh(scores / layer.softcap) * layer.softcap
    weights = torch.where(mask, scores, -torch.inf).softmax(-1).to(queries.dtype)
    return torch.matmul(weights, values[:, :, None]).flatten(1, 2)
