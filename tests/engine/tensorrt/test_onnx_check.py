import re
import shutil
from pathlib import Path

import onnx
import pytest
import torch

from engine.executors.tensorrt.layer_range import LayerRange
from engine.executors.tensorrt.onnx_check import (
    CASES,
    FP8_TOLERANCE,
    TOLERANCE,
    GraphMismatch,
    check_range,
    in_float32,
    largest_difference,
    make_inputs,
    open_session,
    positions_before,
    without_rounding,
)
from engine.executors.tensorrt.onnx_export import export_range
from tests.engine.tensorrt.ranges import fp8_model, last_layer, small_model, whole_range


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama3", torch.float32),
        ("phi3", torch.float16),
        ("qwen2", torch.float32),
        ("qwen3", torch.float32),
        ("gemma2", torch.bfloat16),
    ],
)
def test_exported_layers_compute_what_those_of_the_model_do(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    layers = last_layer(small_model(tmp_path, family, dtype))
    report = check_range(layers, export_range(layers, tmp_path))
    assert report.num_cases == len(CASES)
    assert report.tolerance == TOLERANCE == 1e-4
    assert report.worst.error < 1e-5


def test_heads_that_rotate_in_part_and_have_keys_of_their_own_are_right(tmp_path: Path) -> None:
    layers = last_layer(small_model(tmp_path, "phi3", partial_rotary_factor=0.5, num_key_value_heads=4))
    assert layers.config.rope.rotary_dim == 8
    assert check_range(layers, export_range(layers, tmp_path)).worst.error < 1e-5


def test_fp8_weights_with_a_scale_per_row_are_right(tmp_path: Path) -> None:
    layers = last_layer(fp8_model(tmp_path, per_row=True))
    assert check_range(layers, export_range(layers, tmp_path)).worst.error < 1e-5


def test_fp8_activations_are_right_and_rounded_by_one_scale(tmp_path: Path) -> None:
    layers = last_layer(fp8_model(tmp_path, static_inputs=True))
    path = export_range(layers, tmp_path)
    assert check_range(layers, path).worst.error < 1e-5
    model = in_float32(path)
    with layers.unrounded():
        assert largest_difference(layers, open_session(model, tmp_path), CASES).error > 1e-3
    assert largest_difference(layers, open_session(model, tmp_path), CASES).error < FP8_TOLERANCE
    [first, second, *_] = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    first.input[1] = second.input[1]
    with pytest.raises(GraphMismatch, match=r"quantizes by model\.layers\.1\..*input_scale and has .*input_scale"):
        without_rounding(model)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> tuple[LayerRange, Path]:
    """Two layers whose window is 12."""
    layers = whole_range(small_model(tmp_path_factory.mktemp("checkpoint"), "mistral"))
    return layers, export_range(layers, tmp_path_factory.mktemp("graph"))


@pytest.fixture
def exported(mistral: tuple[LayerRange, Path], tmp_path: Path) -> tuple[LayerRange, Path]:
    """A copy that a test may change."""
    layers, path = mistral
    shutil.copytree(path.parent, tmp_path / "graph")
    return layers, tmp_path / "graph" / path.name


def test_several_layers_with_windows_are_right(mistral: tuple[LayerRange, Path]) -> None:
    layers, path = mistral
    assert {layer.window for layer in layers.attention_layers()} == {12}
    assert check_range(layers, path).worst.error < 1e-5


def test_a_weight_that_changed_is_found_and_named(exported: tuple[LayerRange, Path]) -> None:
    layers, path = exported
    [tensor] = [
        tensor
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
        if tensor.name == "model.layers.1.mlp.gate_up_proj.weight"
    ]
    offset = int({entry.key: entry.value for entry in tensor.external_data}["offset"])
    content = bytearray((path.parent / "model.onnx.data").read_bytes())
    content[offset + 1001] ^= 1
    (path.parent / "model.onnx.data").write_bytes(content)
    with pytest.raises(GraphMismatch, match=r"layers 0 to 1: .* another model\.layers\.1\.mlp\.gate_up_proj\.weight"):
        check_range(layers, path)


def test_a_weight_that_is_missing_is_named(exported: tuple[LayerRange, Path]) -> None:
    layers, path = exported
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.name == "model.layers.0.input_layernorm.weight":
            tensor.name = "renamed"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(GraphMismatch, match=r"lacks the weight model\.layers\.0\.input_layernorm\.weight"):
        check_range(layers, path)


def test_a_graph_that_computes_something_else_names_the_worst_tensor_its_error_and_place(
    exported: tuple[LayerRange, Path],
) -> None:
    layers, path = exported
    model = onnx.load(path, load_external_data=False)
    norm = [node for node in model.graph.node if node.op_type == "RMSNormalization"][2]  # of layer 1's input
    [epsilon] = [attribute for attribute in norm.attribute if attribute.name == "epsilon"]
    epsilon.f = 1.0
    path.write_bytes(model.SerializeToString())
    with pytest.raises(GraphMismatch) as caught:
        check_range(layers, path)
    message = str(caught.value)
    found = re.fullmatch(
        r"layers 0 to 1: the exported graph computes something else: (\w+) is off by (\S+) of its largest value: "
        r"at \[([\d, ]+)\] it is (\S+) instead of (\S+) \(a step of .* tokens after .*\)",
        message,
    )
    assert found, message
    assert found[1] in ("new_1", "out")  # those of layer 0 are right
    assert float(found[2]) > TOLERANCE
    assert float(found[4]) != float(found[5])


def test_a_window_that_is_off_by_one_is_found(exported: tuple[LayerRange, Path]) -> None:
    layers, path = exported
    model = onnx.load(path, load_external_data=False)
    [less] = [node for node in model.graph.node if node.op_type == "Less"]
    less.op_type = "LessOrEqual"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(GraphMismatch):
        check_range(layers, path)


def test_a_result_that_is_not_a_number_is_found(exported: tuple[LayerRange, Path]) -> None:
    layers, path = exported
    model = onnx.load(path, load_external_data=False)
    norm = next(node for node in model.graph.node if node.op_type == "RMSNormalization")
    [epsilon] = [attribute for attribute in norm.attribute if attribute.name == "epsilon"]
    epsilon.f = float("nan")
    path.write_bytes(model.SerializeToString())
    with pytest.raises(GraphMismatch, match="off by inf"):
        check_range(layers, path)


def test_checked_steps_have_prompts_alone_and_packed_with_and_without_a_past(mistral: tuple[LayerRange, Path]) -> None:
    layers, _ = mistral
    shapes = set()
    for case in CASES:
        inputs = make_inputs(layers, case, torch.Generator())
        num_sequences = inputs["sequence_ids"].unique().numel()
        shapes.add((inputs["hidden"].shape[0], inputs["past_0"].shape[2], num_sequences))
        assert list(inputs) == layers.input_names
    assert (1, 1, 1) in shapes
    assert max(num_sequences for _, _, num_sequences in shapes) >= 3


def test_past_keys_lie_around_the_edges_of_windows() -> None:
    positions = positions_before(6, [12])
    start = positions[-1] + 1
    assert start - 12 in positions  # the first that a token does not see
    assert start - 11 in positions
    assert positions == sorted(set(positions))
    assert positions_before(3, []) == [0, 1, 2]
