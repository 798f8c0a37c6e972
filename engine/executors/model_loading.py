"""From a directory to a model with its weights, for the torch executor."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from engine.model_config import DTYPES, ModelConfig
from engine.models.decoder import CausalLM
from engine.models.registry import MAKERS
from engine.weights import (
    KvScales,
    Progress,
    Target,
    dummy_model_hash,
    dummy_weights,
    has_own_head,
    load_weights,
    model_hash,
)


class Loaded(NamedTuple):
    model: CausalLM
    model_hash: str
    kv_scales: KvScales | None  # of FP8 keys and values, where the checkpoint may have some


def load(
    path: Path,
    config: ModelConfig,
    dtype: str,
    device: torch.device,
    *,
    dummy: bool,
    progress: Progress | None,
    target: Target = None,
) -> Loaded:
    """`dummy`: random weights for the config.json in `path`. `target` decides instead of `device` which layers are FP8:
    the model can be exported for such GPUs, and perhaps not run here. Raises ValueError."""
    torch_dtype: torch.dtype = getattr(torch, dtype)
    try:
        if not dummy:
            model, kv_scales = _load(path, config, torch_dtype, device, progress, target)
            return Loaded(model, model_hash(path, config.quantization), kv_scales)
        model = make_model(config, torch_dtype, device)
        dummy_weights(model, quantization=config.quantization, target=target)
        return Loaded(model, dummy_model_hash(config, device), None)
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise ValueError(
            f"the weights do not fit on the GPU: {free / 2**30:.1f} GiB of its {total / 2**30:.1f} GiB are left with "
            "part of them loaded; take a smaller or quantized model, or free memory on the GPU"
        ) from error


def load_model(
    path: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, progress: Progress | None
) -> CausalLM:
    return _load(path, config, dtype, device, progress)[0]


def _load(
    path: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None,
    target: Target = None,
) -> tuple[CausalLM, KvScales]:
    if config.tie_word_embeddings and has_own_head(path):
        config = replace(config, tie_word_embeddings=False)
    model = make_model(config, dtype, device)
    return model, load_weights(model, path, progress, config.quantization, target)


def make_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> CausalLM:
    """On the device, with nothing in its parameters."""
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return MAKERS[config.architecture](config, dtype)
    finally:
        torch.set_default_dtype(default_dtype)


def choose_dtype(asked: str, config: ModelConfig, device: torch.device) -> str:
    """ "auto" is the checkpoint's, except float16 on a CPU, which computes float32 many times faster."""
    if asked == "auto":
        return "float32" if device.type == "cpu" and config.dtype == "float16" else config.dtype
    if asked not in DTYPES:
        raise ValueError(f"dtype must be auto or one of {', '.join(DTYPES)}, not {asked!r}")
    return asked
