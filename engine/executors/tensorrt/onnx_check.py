"""Holds an exported graph against the layers it was made from, before anything is compiled.

The graph runs in onnxruntime on the CPU, the layers in PyTorch, both in float32: a graph of 16-bit types is rewritten
in float32 first, so that what differs is the graph and not the rounding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.executors.tensorrt.calls import NO_PAST, PADDING
from engine.executors.tensorrt.layer_range import LayerRange

TOLERANCE = 1e-4
# Where activations become FP8, the rounding of a float32 takes some of them to the neighbouring value, up to an eighth
# away, and a few layers on that is as much as the noise of FP8 itself: 0.04 after four layers of an 8B model's shape.
# Such a graph is held to `TOLERANCE` with activations left as they are, and to this as it is.
FP8_TOLERANCE = 0.3


class GraphMismatch(ValueError):
    """The graph computes something else, or has other weights. The message names the worst tensor, or the weight."""


@dataclass(frozen=True, slots=True)
class Case:
    """A step of some sequences, given as (keys past, tokens), followed by tokens and keys of none."""

    sequences: tuple[tuple[int, int], ...]
    padding_tokens: int = 0
    padding_past: int = 0

    def __str__(self) -> str:
        steps = ", ".join(f"{tokens} tokens after {past}" for past, tokens in self.sequences)
        return f"{steps}, padded by {self.padding_tokens} and {self.padding_past}" if self.padding_tokens else steps


CASES = (
    Case(((0, 1),)),
    Case(((0, 7),)),
    Case(((9, 1),)),
    Case(((0, 3), (8, 5), (6, 1))),
    Case(((0, 4), (7, 2), (0, 1)), padding_tokens=3, padding_past=5),
)


@dataclass(frozen=True, slots=True)
class Difference:
    """The largest between a tensor of the graph and the layers' own, in parts of the largest magnitude in the latter
    (inf where either is not finite)."""

    error: float
    tensor: str
    place: tuple[int, ...]
    found: float
    wanted: float
    case: Case

    def __str__(self) -> str:
        place = ", ".join(str(index) for index in self.place)
        return (
            f"{self.tensor} is off by {self.error:.2g} of its largest value: at [{place}] it is {self.found:.6g} "
            f"instead of {self.wanted:.6g} (a step of {self.case})"
        )


@dataclass(frozen=True, slots=True)
class Report:
    num_cases: int
    tolerance: float
    worst: Difference


def check_range(layers: LayerRange, onnx_path: Path, cases: Sequence[Case] = CASES) -> Report:
    """Raises GraphMismatch. The report is of the graph without the rounding of activations to FP8."""
    check_weights(layers, onnx_path)
    model = in_float32(onnx_path)
    with layers.unrounded():
        worst = largest_difference(layers, open_session(without_rounding(model), onnx_path.parent), cases)
    _refuse_beyond(TOLERANCE, worst, layers)
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        rounded = largest_difference(layers, open_session(model, onnx_path.parent), cases[-1:])
        _refuse_beyond(FP8_TOLERANCE, rounded, layers)
    return Report(len(cases), TOLERANCE, worst)


def largest_difference(layers: LayerRange, session: Any, cases: Sequence[Case]) -> Difference:
    generator = torch.Generator().manual_seed(0)
    differences: list[Difference] = []
    for case in cases:
        inputs = make_inputs(layers, case, generator)
        outputs = session.run(layers.output_names, {name: value.numpy() for name, value in inputs.items()})
        with torch.inference_mode():
            wanted = layers(*inputs.values())
        for name, found, right in zip(layers.output_names, outputs, wanted, strict=True):
            differences.append(compare(name, found, right.numpy(), case))
    return max(differences, key=lambda difference: difference.error)


def _refuse_beyond(tolerance: float, worst: Difference, layers: LayerRange) -> None:
    if worst.error > tolerance:
        raise GraphMismatch(f"{_range_name(layers)}: the exported graph computes something else: {worst}")


def check_weights(layers: LayerRange, onnx_path: Path) -> None:
    """That the graph has each weight of the layers under its name, bit by bit. Raises GraphMismatch."""
    import onnx_ir

    initializers = onnx_ir.load(onnx_path).graph.initializers
    for name, read in layers.weights().items():
        found = initializers[name].const_value if name in initializers else None
        if found is None:
            raise GraphMismatch(f"{_range_name(layers)}: the exported graph lacks the weight {name}")
        weight = read().contiguous()
        same_shape = tuple(found.shape.numpy()) == tuple(weight.shape)
        wanted = weight.view(-1).view(torch.uint8).numpy()
        if not same_shape or not np.array_equal(np.frombuffer(found.tobytes(), np.uint8), wanted):
            raise GraphMismatch(f"{_range_name(layers)}: the exported graph has another {name} than the model")
        if isinstance(found, onnx_ir.ExternalTensor):
            found.release()


def _range_name(layers: LayerRange) -> str:
    return f"layers {layers.first} to {layers.end - 1}"


def compare(name: str, found: NDArray[np.float32], wanted: NDArray[np.float32], case: Case) -> Difference:
    if found.shape != wanted.shape:
        raise GraphMismatch(f"{name} has shape {list(found.shape)} instead of {list(wanted.shape)} (a step of {case})")
    difference = np.abs(found - wanted)
    difference[~np.isfinite(difference)] = np.inf
    place = np.unravel_index(int(difference.argmax()), difference.shape)
    error = float(difference[place])
    if math.isfinite(error):
        error /= float(np.abs(wanted).max()) or 1.0
    indices = tuple(int(index) for index in place)
    return Difference(error, name, indices, float(found[place]), float(wanted[place]), case)


def make_inputs(layers: LayerRange, case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """Random, in float32, by name and in the order of the layers' arguments."""
    windows = sorted({layer.window for layer in layers.attention_layers() if layer.window is not None})
    positions: list[int] = []
    sequence_ids: list[int] = []
    past_positions: list[int] = []
    past_sequence_ids: list[int] = []
    for sequence_id, (num_past, num_tokens) in enumerate(case.sequences):
        of_past = positions_before(num_past, windows)
        start = of_past[-1] + 1 if of_past else 0
        past_positions += of_past
        past_sequence_ids += [sequence_id] * num_past
        positions += range(start, start + num_tokens)
        sequence_ids += [sequence_id] * num_tokens
    num_keys_of_none = max(case.padding_past, 0 if past_positions else 1)
    past_positions += [0] * num_keys_of_none
    past_sequence_ids += [NO_PAST] * num_keys_of_none
    positions += [0] * case.padding_tokens
    sequence_ids += [PADDING] * case.padding_tokens

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    config = layers.config
    angles = math.pi * random(len(positions), config.rope.rotary_dim // 2)
    past = [
        random(2, config.num_kv_heads, len(past_positions), config.head_dim) for _ in range(layers.first, layers.end)
    ]
    integers = (positions, sequence_ids, past_positions, past_sequence_ids)
    values = (
        random(len(positions), config.hidden_size),
        angles.cos(),
        angles.sin(),
        *(torch.tensor(items, dtype=torch.int32) for items in integers),
        *past,
    )
    return dict(zip(layers.input_names, values, strict=True))


def positions_before(num: int, windows: Sequence[int]) -> list[int]:
    """`num` ascending positions before a token: just before it, and for each window as many as fit of the last it
    sees, the first it does not, and one far behind. Sequences that long would take long to compute."""
    if not windows:
        return list(range(num))
    start = windows[-1] + num
    near_edges = [start - window + step for window in windows for step in (1, 0)]
    order = [start - 1, *near_edges, 0, *range(start - 2, 0, -1)]
    candidates = dict.fromkeys(position for position in order if 0 <= position < start)
    return sorted(list(candidates)[:num])


def open_session(model: Any, directory: Path) -> Any:
    """`directory` holds the model's external data.

    Graph optimizations would keep all weights of a 16-bit model in float32, the default order makes them all first,
    and an arena gives no memory back: together 15 GB instead of 3 for four layers of an 8B model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.log_severity_level = 3  # errors; `without_rounding` leaves scales unused
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(directory))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def in_float32(onnx_path: Path) -> Any:
    """The graph with float32 in the place of 16-bit types. Weights stay in their file, as they are, and are converted
    where they are used."""
    import onnx
    from onnx import TensorProto, helper

    halves = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    model = onnx.load(onnx_path, load_external_data=False)
    graph = model.graph
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in halves:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    sixteen_bit = {tensor.name for tensor in graph.initializer if tensor.data_type in halves}
    wide: dict[str, str] = {}
    nodes: list[Any] = []
    for node in graph.node:
        for name in node.input:
            if name in sixteen_bit and name not in wide:
                wide[name] = f"{name}.float32"
                nodes.append(helper.make_node("Cast", [name], [wide[name]], to=TensorProto.FLOAT))
        node.input[:] = [wide.get(name, name) for name in node.input]
        nodes.append(node)
        for attribute in node.attribute:
            if attribute.name in ("to", "output_dtype") and attribute.i in halves:
                attribute.i = TensorProto.FLOAT
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def without_rounding(model: Any) -> Any:
    """The graph without the pairs of operators that take activations to FP8 and back. Raises GraphMismatch where those
    of a pair have different scales."""
    import onnx

    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    quantized = {node.output[0]: node for node in plain.graph.node if node.op_type == "QuantizeLinear"}
    pairs = {node.output[0]: node for node in plain.graph.node if node.input and node.input[0] in quantized}
    before: dict[str, str] = {}
    for name, back in pairs.items():
        there = quantized[back.input[0]]
        if back.op_type != "DequantizeLinear" or back.input[1:] != there.input[1:]:
            raise GraphMismatch(f"the exported graph quantizes by {there.input[1]} and has {back.input[1]} afterwards")
        before[name] = there.input[0]
    nodes = [node for node in plain.graph.node if node.output[0] not in quantized and node.output[0] not in pairs]
    for node in nodes:
        node.input[:] = [before.get(name, name) for name in node.input]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del plain.graph.node[:]
    plain.graph.node.extend(kept)
    return plain
