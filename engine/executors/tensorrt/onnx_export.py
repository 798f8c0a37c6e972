"""Writes a layer range as an ONNX graph, with its weights in a file beside it.

The range is traced with placeholders for its weights; each weight is read from the model when it is written, one at a
time, so that an export needs little memory beside the model's. In the graph they have the names of
`LayerRange.weights`, which refitting an engine goes by.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.executors.tensorrt.layer_range import LayerRange

OPSET = 23  # the first with Attention and RMSNormalization
METADATA = "baton.range"  # JSON, see `metadata`
MAX_TOKENS, MAX_PAST = 1 << 24, 1 << 30


def export_range(layers: LayerRange, directory: Path) -> Path:
    """`directory`/model.onnx, its weights in model.onnx.data beside it. `directory` must exist."""
    import onnx_ir

    model = _trace(layers)
    weights = layers.weights()
    _optimize(model, weights)
    for name in set(weights) & set(model.graph.initializers):
        value = model.graph.initializers[name]
        value.const_value = _lazy(name, value.const_value, weights[name])
    for node in model.graph:
        node.metadata_props.clear()  # paths of source files
    model.metadata_props[METADATA] = json.dumps(metadata(layers))
    path = directory / "model.onnx"
    onnx_ir.save(model, path, external_data=f"{path.name}.data", max_workers=1)
    return path


def _trace(layers: LayerRange) -> Any:
    shapes = dynamic_shapes(layers)
    with torch.no_grad(), _quiet():
        traced = torch.export.export(layers, example_inputs(layers), dynamic_shapes=shapes, strict=False)
        program = torch.onnx.export(
            traced,
            dynamo=True,
            opset_version=OPSET,
            input_names=layers.input_names,
            output_names=layers.output_names,
            dynamic_shapes=shapes,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    return program.model


@contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch's exporter warns of packages that it does not need here, and of its own deprecated calls."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def metadata(layers: LayerRange) -> Mapping[str, object]:
    """What turns a checkpoint's weights into those of the graph: `fused` matrices are its parts one below the other,
    and weights of `unit_offset` norms are the checkpoint's plus one."""
    return {
        "first": layers.first,
        "end": layers.end,
        "dtype": str(layers.dtype).removeprefix("torch."),
        "fused": layers.fused(),
        "unit_offset": layers.unit_offset_norms(),
    }


def example_inputs(layers: LayerRange) -> tuple[Tensor, ...]:
    """Zeros of two unlike lengths. Tracing takes lengths of 0 and 1 for constants."""
    num_tokens, num_past = 5, 7
    config, num_layers = layers.config, layers.end - layers.first
    half = config.rope.rotary_dim // 2
    floats = [(num_tokens, config.hidden_size), (num_tokens, half), (num_tokens, half)]
    integers = [num_tokens, num_tokens, num_past, num_past]
    past = [(2, config.num_kv_heads, num_past, config.head_dim)] * num_layers
    return (
        *(torch.zeros(shape, dtype=layers.dtype) for shape in floats),
        *(torch.zeros(size, dtype=torch.int32) for size in integers),
        *(torch.zeros(shape, dtype=layers.dtype) for shape in past),
    )


def dynamic_shapes(layers: LayerRange) -> tuple[object, ...]:
    """As `forward` takes its arguments: those after the seventh as one."""
    tokens = torch.export.Dim("tokens", min=1, max=MAX_TOKENS)
    past = torch.export.Dim("past", min=1, max=MAX_PAST)
    return (*({0: tokens},) * 5, *({0: past},) * 2, ({2: past},) * (layers.end - layers.first))


def _optimize(model: Any, weights: Iterable[str]) -> None:
    """Simplify the graph, with the weights as inputs meanwhile: else it would compute with the placeholders, and make
    one of weights that look alike."""
    import onnxscript.optimizer

    graph = model.graph
    held = {name: graph.initializers.pop(name) for name in weights if name in graph.initializers}
    values = {name: value.const_value for name, value in held.items()}
    num_inputs = len(graph.inputs)
    for value in held.values():
        value.const_value = None
        graph.inputs.append(value)
    onnxscript.optimizer.optimize(model)
    del graph.inputs[num_inputs:]
    for name, value in held.items():
        value.const_value = values[name]
        graph.initializers[name] = value


def _lazy(name: str, placeholder: Any, read: Callable[[], Tensor]) -> Any:
    import onnx_ir
    from onnx_ir.tensor_adapters import TorchTensor

    return onnx_ir.LazyTensor(
        lambda: TorchTensor(read().contiguous(), name=name),
        dtype=placeholder.dtype,
        shape=placeholder.shape,
        name=name,
    )
