import json
from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch

from engine.executors.tensorrt.layer_range import LayerRange
from engine.executors.tensorrt.onnx_export import METADATA, export_range
from engine.layers.norm import RMSNorm
from tests.engine.tensorrt.ranges import fp8_model, last_layer, small_model


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[LayerRange, Path]:
    model = small_model(tmp_path_factory.mktemp("checkpoint"), "llama", num_hidden_layers=3)
    layers = LayerRange(model, 1, 3)
    return layers, export_range(layers, tmp_path_factory.mktemp("graph"))


def test_a_layer_is_the_operators_that_tensorrt_has_kernels_for(llama: tuple[LayerRange, Path]) -> None:
    layers, path = llama
    counts = operators(path)
    num_layers = layers.end - layers.first
    assert {name: counts[name] for name in ("Attention", "RMSNormalization", "Gemm")} == {
        "Attention": num_layers,
        "RMSNormalization": 2 * num_layers,
        "Gemm": 4 * num_layers,
    }
    # The mask and rotations are made once or by elements; nothing is scattered or gathered.
    assert counts["LessOrEqual"] == counts["Equal"] == 1
    assert not {"ScatterND", "GatherND", "Gather", "Expand", "Loop", "If", "MatMul"} & set(counts)


def test_its_inputs_and_outputs_have_their_names_and_dynamic_lengths(llama: tuple[LayerRange, Path]) -> None:
    layers, path = llama
    graph = onnx.load(path, load_external_data=False).graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert list(shapes) == [*layers.input_names, *layers.output_names]
    assert shapes["hidden"] == shapes["out"] == ["tokens", 64]
    assert shapes["cos"] == ["tokens", 8]
    assert shapes["positions"] == ["tokens"]
    assert shapes["past_sequence_ids"] == ["past"]
    assert shapes["past_2"] == [2, 2, "past", 16]
    assert shapes["new_1"] == [2, 2, "tokens", 16]


def test_its_weights_are_the_initializers_in_a_file_beside_it(llama: tuple[LayerRange, Path]) -> None:
    layers, path = llama
    graph = onnx.load(path, load_external_data=False).graph
    external = {tensor.name for tensor in graph.initializer if tensor.external_data}
    matrices = {name for name, read in layers.weights().items() if read().dim() == 2}
    assert matrices <= external <= set(layers.weights())
    assert set(layers.weights()) <= {tensor.name for tensor in graph.initializer}
    size = sum(tensor.numel() * tensor.itemsize for tensor in (read() for read in layers.weights().values()))
    assert (path.parent / "model.onnx.data").stat().st_size == pytest.approx(size, rel=0.01)


def test_it_says_how_weights_are_made_of_the_checkpoint_s(llama: tuple[LayerRange, Path]) -> None:
    _, path = llama
    model = onnx.load(path, load_external_data=False)
    metadata = json.loads({entry.key: entry.value for entry in model.metadata_props}[METADATA])
    assert (metadata["first"], metadata["end"], metadata["dtype"]) == (1, 3, "float32")
    attention = "model.layers.1.self_attn"
    assert metadata["fused"][f"{attention}.qkv_proj"] == {
        f"{attention}.q_proj": 64,
        f"{attention}.k_proj": 32,
        f"{attention}.v_proj": 32,
    }
    assert metadata["unit_offset"] == []


def test_nothing_in_it_tells_where_it_was_made(llama: tuple[LayerRange, Path]) -> None:
    content = llama[1].read_bytes()
    assert b".py" not in content
    assert str(Path(__file__).parents[3]).encode() not in content


def test_weights_that_are_equal_stay_apart(tmp_path: Path) -> None:
    """Else refitting one would change both."""
    model = small_model(tmp_path, "gemma2")
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.weight.fill_(1.0)
    layers = last_layer(model)
    graph = onnx.load(export_range(layers, tmp_path), load_external_data=False).graph
    assert set(layers.weights()) <= {tensor.name for tensor in graph.initializer}
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    assert sorted(layers.unit_offset_norms()) == sorted(f"model.layers.2.{name}_layernorm.weight" for name in norms)


def test_only_norms_compute_in_float32_in_a_graph_of_16_bits(tmp_path: Path) -> None:
    counts = operators(export_range(last_layer(small_model(tmp_path, "qwen3", torch.bfloat16)), tmp_path))
    assert counts["RMSNormalization"] == 4
    assert counts["Cast"] == 8


def test_fp8_products_are_between_quantize_and_dequantize_layers(tmp_path: Path) -> None:
    path = export_range(last_layer(fp8_model(tmp_path, static_inputs=True)), tmp_path)
    counts = operators(path)
    assert (counts["QuantizeLinear"], counts["DequantizeLinear"], counts["Gemm"]) == (4, 8, 4)
    onnx.checker.check_model(str(path), full_check=True)
    initializers = {tensor.name: tensor for tensor in onnx.load(path, load_external_data=False).graph.initializer}
    for name in ("weight", "zero_point"):
        assert initializers[f"model.layers.1.mlp.down_proj.{name}"].data_type == onnx.TensorProto.FLOAT8E4M3FN
