import logging
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from baton import segments
from baton.compose import found_pool, make_executor
from baton.segments import segment_loader
from cluster.spec import ClusterSpec, PoolSettings
from cluster.spec_errors import SpecError
from cluster.spec_file import parse_spec
from engine.executors.model_loading import Loaded
from engine.executors.tensorrt import library
from engine.executors.tensorrt.engine_build import EngineBuildError
from engine.executors.tensorrt.loading import TensorRTLoader, or_pytorch
from engine.executors.tensorrt.onnx_check import GraphMismatch
from engine.executors.torch_executor import TorchExecutor
from tests.checkpoints import make_checkpoint
from tests.engine.executor_contract import decode, prompt_of, start, step

GPU = library.Capability(9, 0)


def prefill(engine: str, **fields: object) -> ClusterSpec:
    return parse_spec({"model": "tiny", "prefill": {"engine": engine}} | fields)


def on_a_gpu(spec: ClusterSpec) -> PoolSettings:
    return spec.pool("prefill", "cuda")


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ModuleType:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(library, "gpu_capability", lambda: GPU)
    monkeypatch.setattr(library, "load_library", partial(library.load_library, importer=missing))


@pytest.mark.usefixtures("nothing_installed")
def test_tensorrt_that_is_missing_is_refused_with_the_line_that_installs_it() -> None:
    spec = prefill("tensorrt")
    with pytest.raises(SpecError, match=r"prefill\.engine: 'tensorrt' is not possible here: .*pip install tensorrt"):
        segment_loader(spec, on_a_gpu(spec), 1)


@pytest.mark.usefixtures("nothing_installed")
def test_auto_computes_in_pytorch_where_tensorrt_is_missing_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    spec = prefill("auto")
    assert segment_loader(spec, on_a_gpu(spec), 1) is None
    [record] = caplog.records
    assert "layers are computed in PyTorch: neither TensorRT nor TensorRT-RTX is installed" in record.message


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"device": "cpu"}, "needs a GPU"), ({"device": "cuda", "kv_cache": {"dtype": "fp8"}}, "fp8")],
)
def test_auto_computes_in_pytorch_where_engines_cannot(
    fields: dict[str, object], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    spec = prefill("auto", **fields)
    assert segment_loader(spec, spec.pool("prefill"), 1) is None
    [record] = caplog.records
    assert "layers are computed in PyTorch" in record.message
    assert reason in record.message


def test_engines_are_kept_where_the_spec_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    monkeypatch.setattr(library, "gpu_capability", lambda: library.Capability(8, 9))
    spec = prefill("tensorrt", tensorrt={"cache_dir": str(tmp_path / "engines")})
    loader = segment_loader(spec, on_a_gpu(spec), 1)
    assert isinstance(loader, TensorRTLoader)
    assert loader.cache.directory == tmp_path / "engines"
    assert loader.library.name == "tensorrt_rtx"


@pytest.mark.parametrize("error", [EngineBuildError("no kernel"), GraphMismatch("out is off by 2")])
def test_auto_computes_in_pytorch_what_cannot_be_compiled(error: ValueError, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_args: object) -> None:
        raise error

    assert or_pytorch(fail)(Loaded(None, "hash", None), (2,), None) is None  # type: ignore[arg-type]
    [record] = caplog.records
    assert record.message == f"layers are computed in PyTorch: {error}"


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "find_spec", lambda name: None if name == "onnxscript" else find_spec(name))
    spec = prefill("onnx")
    with pytest.raises(SpecError, match="'onnx' needs onnxscript; install: pip install onnxscript"):
        segment_loader(spec, spec.pool("prefill"), 1)


def test_tensorrt_is_refused_where_there_is_no_gpu() -> None:
    spec = prefill("tensorrt", device="auto")
    if found_pool(prefill("torch"), "prefill").device == "cuda":
        pytest.skip("there is a GPU")
    with pytest.raises(SpecError, match=r"prefill\.engine: 'tensorrt' is not allowed on device cpu"):
        found_pool(spec, "prefill")


def test_a_worker_runs_the_checked_graphs_of_its_layers(tmp_path: Path) -> None:
    """From the spec to tokens, as `baton prefill` composes it."""
    fields = {"dtype": "float32", "kv_cache": {"num_blocks": 32}, "prefill": {"engine": "onnx", "threads": 1}}
    checkpoint = make_checkpoint(tmp_path, "qwen3", num_hidden_layers=1)
    spec = parse_spec({"model": str(checkpoint)} | fields)
    found = []
    for role in ("prefill", "decode"):
        executor = make_executor(spec, found_pool(spec, role))
        assert isinstance(executor, TorchExecutor)
        run = start(executor, prompt_of(executor, 37))
        step([run], [37])
        found.append((executor.model_hash, decode(run)))
        executor.close()
    assert found[0] == found[1]


def test_graphs_compute_in_float32_only(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, num_hidden_layers=1)
    spec = parse_spec({"model": str(checkpoint), "dtype": "bfloat16", "prefill": {"engine": "onnx"}})
    with pytest.raises(SpecError, match="engine onnx computes in float32, not bfloat16: set dtype to float32"):
        make_executor(spec, found_pool(spec, "prefill"))


def test_progress_is_logged_a_few_times(caplog: pytest.LogCaptureFixture) -> None:
    tell = segments._ProgressLog()
    with caplog.at_level(logging.INFO):
        for i in range(101):
            tell("layers 0 to 7: compiling", i / 200)
        tell("layers 0 to 7: ready", 0.5)
    assert [record.message for record in caplog.records][::3] == [
        "engines: 0 %, layers 0 to 7: compiling",
        "engines: 30 %, layers 0 to 7: compiling",
        "engines: 50 %, layers 0 to 7: ready",
    ]
