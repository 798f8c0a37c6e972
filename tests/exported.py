"""Small checkpoints with their decoder layers exported, in place of compiled engines: made once for a test run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from engine.executors.model_loading import Loaded
from engine.executors.tensorrt.calls import CallLimits
from engine.executors.tensorrt.layer_range import LayerRange
from engine.executors.tensorrt.onnx_export import export_range
from engine.executors.tensorrt.onnx_segment import OnnxSegment
from engine.executors.tensorrt.prepare import ranges
from engine.executors.tensorrt.segment import Segment
from engine.executors.torch_executor import TorchConfig, TorchExecutor
from tests.checkpoints import make_checkpoint

GROUP_SIZES = {"llama": 1, "qwen2": 2, "qwen3": 2}  # layers of a range; each has 2


@dataclass
class Exported:
    """A checkpoint of `family` under `directory`, and the graphs of its ranges once one has been asked for."""

    family: str
    directory: Path

    def __post_init__(self) -> None:
        self.checkpoint = make_checkpoint(self.directory / "checkpoint", self.family)
        self._segments: list[OnnxSegment] = []

    def graph(self, first: int) -> Path:
        return self.directory / f"range-{first}" / "model.onnx"

    def export(self, loaded: Loaded, layer_groups: Sequence[int]) -> list[Path]:
        for first, end in ranges(layer_groups):
            if not self.graph(first).exists():
                self.graph(first).parent.mkdir()
                export_range(LayerRange(loaded.model, first, end), self.graph(first).parent)
        return [self.graph(first) for first, _ in ranges(layer_groups)]

    def load_segments(
        self, loaded: Loaded, layer_groups: Sequence[int], _limits: CallLimits, /
    ) -> Sequence[Segment] | None:
        if not self._segments:
            paths = self.export(loaded, layer_groups)
            self._segments = [
                OnnxSegment(path, first, end, num_threads=1)
                for path, (first, end) in zip(paths, ranges(layer_groups), strict=True)
            ]
        loaded.model.model.layers = nn.ModuleList()
        return self._segments

    def executor(self, load: Callable[..., Sequence[Segment] | None] | None = None, **config: object) -> TorchExecutor:
        """On these segments, or on what `load` gives."""
        settings = {"dtype": "float32", "num_threads": 1, "layers_per_group": GROUP_SIZES[self.family]} | config
        return TorchExecutor(self.checkpoint, TorchConfig(**settings), load_segments=load or self.load_segments)  # type: ignore[arg-type]

    def in_torch(self, **config: object) -> TorchExecutor:
        settings = {"dtype": "float32", "num_threads": 1, "layers_per_group": GROUP_SIZES[self.family]} | config
        return TorchExecutor(self.checkpoint, TorchConfig(**settings))  # type: ignore[arg-type]
