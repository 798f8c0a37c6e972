"""Small ranges with heads of real sizes, exported once for all tests that compile them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.executors.model_loading import Loaded, load
from engine.executors.tensorrt.layer_range import LayerRange
from engine.executors.tensorrt.onnx_export import export_range
from engine.model_config import load_model_config
from tests.checkpoints import make_checkpoint

HEAD_DIMS = {"llama": 128, "qwen2": 64, "qwen3": 128}

MakeModel = Callable[..., Loaded]
ExportedRange = Callable[[str, str], tuple[LayerRange, Path]]


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    def make(family: str, dtype: str, **overrides: object) -> Loaded:
        num_heads = 4
        sizes = {
            "hidden_size": num_heads * HEAD_DIMS[family],
            "num_attention_heads": num_heads,
            "num_key_value_heads": 2,
            "intermediate_size": 512,
            "head_dim": HEAD_DIMS[family],
        }
        path = tmp_path_factory.mktemp(f"{family}-{dtype}")
        make_checkpoint(path, family, dtype=getattr(torch, dtype), tokenizer=False, **(sizes | overrides))
        config = load_model_config(path)
        return load(path, config, dtype, torch.device("cpu"), dummy=False, progress=None)

    return make


@pytest.fixture(scope="session")
def exported_range(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> ExportedRange:
    """The ONNX file of a model's first layer, by family and type."""
    exported: dict[tuple[str, str], tuple[LayerRange, Path]] = {}

    def get(family: str, dtype: str) -> tuple[LayerRange, Path]:
        if (family, dtype) not in exported:
            layers = LayerRange(make_model(family, dtype).model, 0, 1)
            directory = tmp_path_factory.mktemp(f"{family}-{dtype}-onnx")
            exported[family, dtype] = layers, export_range(layers, directory)
        return exported[family, dtype]

    return get
