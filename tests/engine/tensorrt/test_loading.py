from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from engine.executors.model_loading import Loaded, load
from engine.executors.tensorrt import loading
from engine.executors.tensorrt.calls import CallLimits, ladder
from engine.executors.tensorrt.engine_cache import EngineCache, write_engine
from engine.executors.tensorrt.layer_range import LayerRange
from engine.executors.tensorrt.loading import TensorRTLoader, profile_of
from engine.executors.tensorrt.prepare import EngineOptions, PreparedRange, range_key, ranges
from engine.executors.tensorrt.trt_segment import TensorRTSegment
from engine.model_config import load_model_config
from tests.engine.tensorrt.fake_runtime import Device, FakeQueue, fake_library, make_plan
from tests.exported import Exported

CPU = torch.device("cpu")
LIMITS = CallLimits(64, 256, ladder(8))


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def loaded(exported: Callable[[str], Exported]) -> Loaded:
    path = exported("llama").checkpoint
    return load(path, load_model_config(path), "float32", CPU, dummy=False, progress=None)


@pytest.fixture
def loader(
    exported: Callable[[str], Exported],
    loaded: Loaded,
    device: Device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> TensorRTLoader:
    """With engines of the stand-in in the cache, as if they had been compiled."""
    graphs = exported("llama").export(loaded, (1, 2))

    def prepared(
        loaded: Loaded,
        layer_groups: Sequence[int],
        options: EngineOptions,
        library: object,
        cache: EngineCache,
        _progress: object,
    ) -> list[PreparedRange]:
        found = []
        for graph, (first, end) in zip(graphs, ranges(layer_groups), strict=True):
            key = range_key(LayerRange(loaded.model, first, end), loaded.model_hash, options, library)  # type: ignore[arg-type]
            write_engine(cache.path(key), key, make_plan(graph, options.profile))
            found.append(PreparedRange(first, end, cache.path(key)))
        return found

    monkeypatch.setattr(loading, "prepare_ranges", prepared)
    monkeypatch.setattr(loading, "CudaQueue", lambda _device: FakeQueue(device))
    return TensorRTLoader(fake_library(device), EngineCache(tmp_path), CPU)


def test_engines_take_the_place_of_the_layers(loader: TensorRTLoader, loaded: Loaded, device: Device) -> None:
    segments = loader(loaded, (1, 2), LIMITS)
    assert [(segment.first, segment.end) for segment in segments] == [(0, 1), (1, 2)]
    assert len(loaded.model.model.layers) == 0
    assert all(isinstance(segment, TensorRTSegment) for segment in segments)
    assert device.num_launches == 0


def test_an_engine_that_cannot_be_loaded_is_a_problem_of_the_start(
    loader: TensorRTLoader, loaded: Loaded, device: Device
) -> None:
    device.refuses = "create_execution_context"
    with pytest.raises(ValueError, match=r"the engines cannot be loaded: layers 0\.\.0: .* out of memory"):
        loader(loaded, (1, 2), LIMITS)


def test_a_profile_is_tuned_for_whole_chunks() -> None:
    profile = profile_of(CallLimits(2048, 16384, ladder(8)))
    assert (profile.tokens, profile.past) == ((1, 2048, 2048), (1, 2048, 16384))
    assert profile_of(CallLimits(2048, 512, ladder(8))).past == (1, 512, 512)
