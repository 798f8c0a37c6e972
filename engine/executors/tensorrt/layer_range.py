"""A range of a model's decoder layers as one function without memory: KV of the past in, KV of the step's tokens out.

What `onnx_export` writes, and what `onnx_check` holds a graph against. It runs the model's own layers, in which the
modules that run kernels of their own, change tensors in place or keep weights in a device's own order
(`range_modules`) are replaced by others that can be traced.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from engine.attention.base import AttentionLayer
from engine.executors.tensorrt.range_modules import Borrowing, RangeAttention, RangeLinear, RangeNorm, RangeStep
from engine.layers.attention import SelfAttention
from engine.layers.linear import Linear
from engine.layers.norm import RMSNorm
from engine.layers.rotary import Rotation
from engine.models.decoder import CausalLM


class LayerRange(nn.Module):
    """Layers `first .. end - 1` of `model`, whose weights it reads and does not copy.

    Tensors, by the names in `input_names` and `output_names`, for a step of T tokens with P keys past, P at least 1:

    * hidden [T, hidden_size], cos and sin [T, half of the rotated dimensions], in one floating-point type, in which
      all is computed; positions and sequence_ids int32 [T]; past_positions and past_sequence_ids int32 [P];
      past_<layer> [2 (k, v), num_kv_heads, P, head_dim] per layer, by its index in the model, keys rotated.
    * out [T, hidden_size], the residual stream behind the range; new_<layer> [2, num_kv_heads, T, head_dim].

    A token attends to the keys of its sequence at its position or before it, within the layer's window. Sequence ids
    of what is there only to fill up are those of `calls`.
    """

    def __init__(self, model: CausalLM, first: int, end: int) -> None:
        super().__init__()
        if not 0 <= first < end <= model.config.num_layers:
            raise ValueError(f"layers {first} to {end} of a model with {model.config.num_layers}")
        self.first, self.end = first, end
        self.config = model.config
        layers = {str(index): _traceable(model.model.layers[index]) for index in range(first, end)}
        # Under the names that the checkpoint gives them.
        self.model = nn.Module()
        self.model.layers = nn.ModuleDict(layers)
        self.dtype = self.attention_modules()[0].qkv_proj.dtype

    @property
    def input_names(self) -> list[str]:
        names = ["hidden", "cos", "sin", "positions", "sequence_ids", "past_positions", "past_sequence_ids"]
        return names + [f"past_{index}" for index in range(self.first, self.end)]

    @property
    def output_names(self) -> list[str]:
        return ["out"] + [f"new_{index}" for index in range(self.first, self.end)]

    def attention_modules(self) -> list[RangeAttention]:
        return [module for module in self.modules() if isinstance(module, RangeAttention)]

    def attention_layers(self) -> list[AttentionLayer]:
        return [module.layer for module in self.attention_modules()]

    def weights(self) -> Mapping[str, Callable[[], Tensor]]:
        """How to read each weight, by its name in the graph, which is the checkpoint's except that fused matrices are
        one (see `fused`). Each call may make a tensor, on the CPU, in the type of the graph's."""
        return {
            f"{module_name}.{name}": partial(_on_host, source.read)
            for module_name, module in self.named_modules()
            if isinstance(module, Borrowing)
            for name, source in module.sources.items()
        }

    def fused(self) -> Mapping[str, Mapping[str, int]]:
        """By the name of each matrix (without `.weight`): the checkpoint's names of its parts, and their rows."""
        parts: dict[str, Mapping[str, int]] = {}
        for name, module in self.named_modules():
            if isinstance(module, RangeLinear):
                prefix = name.rpartition(".")[0]
                parts[name] = {f"{prefix}.{part}": rows for part, rows in module.parts.items()}
        return parts

    def unit_offset_norms(self) -> list[str]:
        """Names of the weights to which the model adds one."""
        modules = self.named_modules()
        return [f"{name}.weight" for name, module in modules if isinstance(module, RangeNorm) and module.unit_offset]

    @contextmanager
    def unrounded(self) -> Iterator[None]:
        """Meanwhile activations do not become FP8, where they do, so that a graph can be compared closely."""
        rounding = [module for module in self.modules() if isinstance(module, RangeLinear) and module.rounds_input]
        for module in rounding:
            module.rounds_input = False
        try:
            yield
        finally:
            for module in rounding:
                module.rounds_input = True

    def forward(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        sequence_ids: Tensor,
        past_positions: Tensor,
        past_sequence_ids: Tensor,
        *past: Tensor,
    ) -> tuple[Tensor, ...]:
        assert len(past) == self.end - self.first, len(past)
        key_positions = torch.cat((past_positions, positions))
        key_sequence_ids = torch.cat((past_sequence_ids, sequence_ids))
        is_visible = (sequence_ids[:, None] == key_sequence_ids) & (key_positions <= positions[:, None])
        distances = positions[:, None] - key_positions
        step = RangeStep(self.first, past, cos[:, None], sin[:, None], is_visible, distances)
        rotation = Rotation(cos, sin)  # which the layers only hand on
        hidden = hidden.clone()  # layers add to it in place
        delta: Tensor | None = None
        for layer in self.model.layers.values():  # type: ignore[operator]
            attended = layer.attend(hidden, delta, rotation, step)
            delta = layer.feed_forward(hidden, attended)
        assert delta is not None
        return hidden + delta, *step.new


def _traceable(module: nn.Module) -> nn.Module:
    """`module`, with the modules inside that cannot be traced replaced. Shares what it does not replace."""
    match module:
        case Linear():
            return RangeLinear(module)
        case RMSNorm():
            return RangeNorm(module)
        case SelfAttention():
            q_norm, k_norm = (None if norm is None else RangeNorm(norm) for norm in (module.q_norm, module.k_norm))
            return RangeAttention(module, q_norm, k_norm)
    replaced = copy.copy(module)
    replaced._modules = {name: None if child is None else _traceable(child) for name, child in module._modules.items()}
    return replaced


def _on_host(read: Callable[[], Tensor]) -> Tensor:
    return read().detach().cpu()
