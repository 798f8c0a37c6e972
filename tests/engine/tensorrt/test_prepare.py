"""From a model to engine files: what is exported, checked, compiled, kept, found again and refitted."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.executors.model_loading import Loaded
from engine.executors.tensorrt import engine_build, prepare
from engine.executors.tensorrt.engine_build import EngineBuildError, Profile
from engine.executors.tensorrt.engine_cache import EngineCache, EngineKey, read_engine, write_engine
from engine.executors.tensorrt.layer_range import LayerRange
from engine.executors.tensorrt.library import Capability, Library
from engine.executors.tensorrt.onnx_check import GraphMismatch
from engine.executors.tensorrt.prepare import (
    EngineOptions,
    PreparedRange,
    graph_hash,
    prepare_ranges,
    refit_file,
)
from tests.engine.tensorrt.conftest import MakeModel
from tests.engine.tensorrt.fake_builder import Fake, make_module, plan_weights

PROFILE = Profile((1, 64, 64), (1, 64, 256))
AHEAD = EngineOptions(PROFILE, Capability(8, 9))
REFITTABLE = EngineOptions(PROFILE, refittable=True)

Prepare = Callable[..., list[PreparedRange]]


@pytest.fixture(scope="module")
def models(make_model: MakeModel) -> dict[str, Loaded]:
    """Float16 models of two layers: two that differ in weights, and one of another graph."""

    def make(**overrides: Any) -> Loaded:
        loaded: Loaded = make_model("llama", "float16", intermediate_size=128, **overrides)
        return loaded

    return {"base": make(seed=0), "tuned": make(seed=1), "other": make(rms_norm_eps=1e-3)}


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines")


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def tensorrt(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Library:
    """TensorRT on a machine with an H200."""
    for module in (engine_build, prepare):
        monkeypatch.setattr(module, "gpu_capability", lambda: Capability(9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _index: "NVIDIA H200")
    return Library(make_module(fake))


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def forbid() -> None:
        monkeypatch.setattr(prepare, "export_range", lambda *_: pytest.fail("exported again"))

    return forbid


def weight_bytes(loaded: Loaded, first: int, end: int) -> dict[str, bytes]:
    return {name: read().numpy().tobytes() for name, read in LayerRange(loaded.model, first, end).weights().items()}


def test_each_group_becomes_an_engine_that_the_next_start_finds(
    models: dict[str, Loaded], cache: EngineCache, no_export: Callable[[], None]
) -> None:
    rtx = Library(pytest.importorskip("tensorrt_rtx_bindings"))
    said: list[tuple[str, float]] = []
    prepared = prepare_ranges(models["base"], (1, 2), AHEAD, rtx, cache, lambda what, part: said.append((what, part)))
    assert [(first, end) for first, end, _ in prepared] == [(0, 1), (1, 2)]
    key = read_engine(prepared[1].path).key
    assert (key.first_layer, key.end_layer, key.dtype, key.capability) == (1, 2, "float16", "8.9")
    assert (key.model_hash, key.library, key.gpu) == (models["base"].model_hash, "tensorrt_rtx", "")
    parts = [part for _, part in said]
    assert (parts == sorted(parts), parts[-1]) == (True, 1.0)
    stages = list(dict.fromkeys(what for what, _ in said))
    assert stages == [f"layer {layer}: {stage}" for layer in (0, 1) for stage in STAGES]
    assert {path.suffix for path in cache.directory.iterdir()} == {".engine", ".lock"}
    no_export()
    assert prepare_ranges(models["base"], (1, 2), AHEAD, rtx, cache) == prepared


STAGES = ("exporting", "checking", "compiling", "ready")


def test_a_graph_that_computes_something_else_is_never_compiled(
    models: dict[str, Loaded], cache: EngineCache, tensorrt: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check is the real one: the graph is of another model."""
    export = prepare.export_range
    monkeypatch.setattr(prepare, "export_range", lambda _, path: export(LayerRange(models["other"].model, 0, 1), path))
    monkeypatch.setattr(prepare, "build_engine", lambda *_: pytest.fail("compiled"))
    with pytest.raises(GraphMismatch):
        prepare_ranges(models["base"], (1,), EngineOptions(PROFILE), tensorrt, cache)
    assert list(cache.directory.glob("*.engine")) == []


def test_what_cannot_be_compiled_is_refused_before_the_export(
    make_model: MakeModel, cache: EngineCache, tensorrt: Library, no_export: Callable[[], None]
) -> None:
    no_export()
    loaded = make_model("llama", "float32")
    with pytest.raises(EngineBuildError, match=r"^layers 0 to 1: TensorRT has no attention kernel for float32"):
        prepare_ranges(loaded, (2,), EngineOptions(PROFILE), tensorrt, cache)
    loaded = make_model("llama", "float16")
    with pytest.raises(EngineBuildError, match=r"^layers 0 to 1: TensorRT 11\.4\.0 compiles for the GPU it finds"):
        prepare_ranges(loaded, (2,), AHEAD, tensorrt, cache)


def test_a_refitted_engine_has_the_new_weights_and_serves_the_new_model(
    models: dict[str, Loaded], cache: EngineCache, tensorrt: Library, no_export: Callable[[], None]
) -> None:
    [base] = prepare_ranges(models["base"], (1,), REFITTABLE, tensorrt, cache)
    tuned = refit_file(base.path, models["tuned"], tensorrt, cache)
    assert tuned.path != base.path
    file = read_engine(tuned.path)
    assert file.key == replace(read_engine(base.path).key, model_hash=models["tuned"].model_hash)
    assert file.key.gpu == "NVIDIA H200"
    old, new = (weight_bytes(models[name], 0, 1) for name in ("base", "tuned"))
    assert all(old[name] != new[name] for name in new)
    in_plan = plan_weights(file.plan)
    assert {name: in_plan[name] for name in new} == new
    no_export()
    found = prepare_ranges(models["tuned"], (1,), EngineOptions(PROFILE), tensorrt, cache)
    assert found == [tuned]


def test_only_weights_may_differ_in_a_refit(
    models: dict[str, Loaded], cache: EngineCache, tensorrt: Library, make_model: MakeModel
) -> None:
    layers = LayerRange(models["base"].model, 0, 2)
    key = prepare.range_key(layers, models["base"].model_hash, REFITTABLE, tensorrt)
    shorter = make_model("llama", "float16", num_hidden_layers=1)
    for changed, model, message in (
        (key, models["other"], "its graph is"),
        (key, shorter, "has layers up to 1, the model 1"),
        (replace(key, dtype="bfloat16"), models["tuned"], "its dtype is 'bfloat16', and not 'float16'"),
        (replace(key, quantization="fp8"), models["tuned"], "its quantization is 'fp8', and not ''"),
        (replace(key, version="10.9.0"), models["tuned"], r"its version is '10\.9\.0', and not '11\.4\.0'"),
        (replace(key, refittable=False), models["tuned"], "build it with --refit"),
    ):
        path = write(cache, changed)
        with pytest.raises(EngineBuildError, match=message):
            refit_file(path, model, tensorrt, cache)


def write(cache: EngineCache, key: EngineKey) -> Path:
    path = cache.path(key)
    write_engine(path, key, b"plan")
    return path


def test_the_hash_of_a_graph_tells_constants_apart_and_not_the_rest(models: dict[str, Loaded]) -> None:
    config = models["base"].model.config
    own = graph_hash(config, 0, 1)
    for other in (
        replace(config, norm_eps=1e-3),
        replace(config, attention_scale=0.5),
        replace(config, windows=(7, None)),
        replace(config, attention_softcap=30.0),
        replace(config, num_heads=8),
    ):
        assert graph_hash(other, 0, 1) != own
    same = replace(config, vocab_size=1, eos_token_ids=(9,), num_layers=50, windows=(None, 7))
    assert graph_hash(same, 0, 1) == own
