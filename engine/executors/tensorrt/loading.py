"""From a loaded model to the segments that a worker runs."""

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from engine.executors.model_loading import Loaded
from engine.executors.tensorrt.calls import CallLimits
from engine.executors.tensorrt.engine_build import EngineBuildError, Profile
from engine.executors.tensorrt.engine_cache import EngineCache, read_engine
from engine.executors.tensorrt.layer_range import LayerRange
from engine.executors.tensorrt.library import Library
from engine.executors.tensorrt.onnx_check import GraphMismatch
from engine.executors.tensorrt.prepare import (
    EngineOptions,
    Progress,
    export_checked,
    prepare_ranges,
    ranges,
)
from engine.executors.tensorrt.segment import Segment, SegmentError, SegmentLoader
from engine.executors.tensorrt.trt_segment import CudaQueue, Scratch, TensorRTSegment
from engine.models.decoder import CausalLM

log = logging.getLogger(__name__)


def profile_of(limits: CallLimits) -> Profile:
    """Tuned for whole chunks with a chunk before them."""
    tuned = min(limits.max_tokens, limits.max_past)
    return Profile((1, limits.max_tokens, limits.max_tokens), (1, tuned, limits.max_past))


@dataclass(frozen=True, slots=True)
class OnnxLoader:
    """A SegmentLoader for the CPU: the graphs that engines are compiled from, checked, by onnxruntime."""

    num_threads: int = 0  # 0: onnxruntime's own choice

    def __call__(self, loaded: Loaded, layer_groups: Sequence[int], _limits: CallLimits, /) -> list[Segment]:
        if loaded.model.rotary.dtype is not torch.float32:
            dtype = str(loaded.model.rotary.dtype).removeprefix("torch.")
            raise ValueError(f"engine onnx computes in float32, not {dtype}: set dtype to float32")
        from engine.executors.tensorrt.onnx_segment import OnnxSegment  # engines run without onnxruntime

        segments: list[Segment] = []
        for first, end in ranges(layer_groups):
            with tempfile.TemporaryDirectory(prefix="baton-onnx-") as scratch:
                path = export_checked(LayerRange(loaded.model, first, end), Path(scratch), lambda _what, _part: None)
                segments.append(OnnxSegment(path, first, end, num_threads=self.num_threads))
        free_layers(loaded.model)
        return segments


@dataclass(frozen=True, slots=True)
class TensorRTLoader:
    """A SegmentLoader for a GPU. Engines come from the `cache`, and are compiled where it has none."""

    library: Library
    cache: EngineCache
    device: torch.device
    progress: Progress | None = None

    def __call__(self, loaded: Loaded, layer_groups: Sequence[int], limits: CallLimits, /) -> list[Segment]:
        options = EngineOptions(profile_of(limits))
        prepared = prepare_ranges(loaded, layer_groups, options, self.library, self.cache, self.progress)
        free_layers(loaded.model)
        torch.cuda.empty_cache()  # engines allocate their weights outside PyTorch
        queue, scratch = CudaQueue(self.device), Scratch(self.device)
        try:
            segments: list[Segment] = [
                TensorRTSegment(self.library, read_engine(path).plan, first, end, queue, scratch)
                for first, end, path in prepared
            ]
            scratch.allocate()
        except (SegmentError, torch.OutOfMemoryError) as error:
            raise ValueError(f"the engines cannot be loaded: {error}") from error
        return segments


def or_pytorch(loader: SegmentLoader) -> SegmentLoader:
    """Leaves the layers to PyTorch, with a line that says why, where no engine can be made of them."""

    def load(loaded: Loaded, layer_groups: Sequence[int], limits: CallLimits, /) -> Sequence[Segment] | None:
        try:
            return loader(loaded, layer_groups, limits)
        except (EngineBuildError, GraphMismatch) as error:
            log.warning("layers are computed in PyTorch: %s", error)
            return None

    return load


def free_layers(model: CausalLM) -> None:
    """Give up the weights that nobody needs once segments compute the layers. Embedding, norm and head remain."""
    model.model.layers = nn.ModuleList()
