"""Layer ranges of small random checkpoints."""

from pathlib import Path

import torch

from engine.executors.model_loading import load as load_checkpoint
from engine.executors.model_loading import load_model
from engine.executors.tensorrt.layer_range import LayerRange
from engine.model_config import load_model_config
from engine.models.decoder import CausalLM
from tests.checkpoints import make_checkpoint, make_fp8_checkpoint


def small_model(directory: Path, family: str, dtype: torch.dtype = torch.float32, **overrides: object) -> CausalLM:
    return load(make_checkpoint(directory, family, tokenizer=False, **overrides), dtype)


def fp8_model(directory: Path, **options: object) -> CausalLM:
    """Of an FP8 checkpoint, in bfloat16, its weights in FP8 as on a GPU that can multiply them."""
    path = make_fp8_checkpoint(directory, **options)  # type: ignore[arg-type]
    config, cpu = load_model_config(path), torch.device("cpu")
    return load_checkpoint(path, config, "bfloat16", cpu, dummy=False, progress=None, target=(8, 9)).model


def load(path: Path, dtype: torch.dtype) -> CausalLM:
    return load_model(path, load_model_config(path), dtype, torch.device("cpu"), None)


def last_layer(model: CausalLM) -> LayerRange:
    return LayerRange(model, model.config.num_layers - 1, model.config.num_layers)


def whole_range(model: CausalLM) -> LayerRange:
    return LayerRange(model, 0, model.config.num_layers)
