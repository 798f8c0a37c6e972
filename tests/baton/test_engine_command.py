"""`baton engine`: what each command prints and keeps, and how each says what is wrong."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from baton.engine_command import Asked, asked_for, binding_text, engine_app
from engine.executors.tensorrt import engine_cache, library, onnx_check, onnx_export, prepare
from engine.executors.tensorrt.engine_cache import EngineCache, read_engine
from engine.executors.tensorrt.onnx_check import GraphMismatch
from tests.checkpoints import make_checkpoint, make_fp8_checkpoint

SIZES = ("--tokens", "64", "--past", "256", "--layers-per-engine", "2")
SHAPE: dict[str, Any] = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), dtype=torch.bfloat16, tokenizer=False, **SHAPE)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def engine(model: Path, engines: Path) -> Path:
    """One that is compiled for 8.9."""
    pytest.importorskip("tensorrt_rtx_bindings")
    result = run("build", model, "--capability", "8.9", "--output", engines, *SIZES)
    assert result.exit_code == 0, result.output
    [path] = result.stdout.split()
    return Path(path)


def run(*arguments: object) -> Any:
    """In one wide line each, as a terminal of any width may break them."""
    return CliRunner().invoke(engine_app, [str(item) for item in arguments], env={"COLUMNS": "1000"})


def test_build_prints_files_that_are_whole(engine: Path, engines: Path) -> None:
    assert engine.parent == engines
    key = read_engine(engine).key
    assert (key.first_layer, key.end_layer, key.dtype, key.capability) == (0, 2, "bfloat16", "8.9")
    assert (key.tokens, key.past) == ((1, 64, 64), (1, 64, 256))


def test_build_keeps_what_is_there(engine: Path, model: Path, engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "export_range", lambda *_: pytest.fail("exported again"))
    result = run("build", model, "--capability", "8.9", "--output", engines, *SIZES)
    assert (result.exit_code, result.stdout) == (0, f"{engine}\n")
    assert "TensorRT-RTX" in result.stderr
    assert result.stderr.splitlines()[-1] == "layers 0 to 1: ready"
    assert "calls of up to 64 tokens after up to 256" in result.stderr


def test_engines_go_to_the_cache_of_the_user_unless_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert engine_cache.default_directory() == tmp_path / ".cache/baton/engines"


def test_a_spec_says_what_its_prefill_workers_need(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(
        "model: some/model\nload: dummy\ndtype: float16\nmax_model_len: 1000\n"
        "prefill: {engine: tensorrt, device: cuda, scheduler: {max_batch_tokens: 4096}}\n"
        "decode: {device: cuda}\ntensorrt: {max_tokens: 512, cache_dir: engines}\n"
    )
    asked = asked_for(str(path), None)
    assert asked.cache_dir is not None
    assert Path(asked.cache_dir).name == "engines"
    assert asked == Asked("some/model", "dummy", "float16", None, 4096, 512, 1000, asked.cache_dir)
    assert asked_for(str(path), "bfloat16").dtype == "bfloat16"
    assert asked_for("some/model", None) == Asked("some/model")


def test_check_tells_the_largest_difference_of_each_range(model: Path) -> None:
    result = run("check", model, "--layers-per-engine", "2")
    assert result.exit_code == 0, result.output
    assert re.fullmatch(
        r"layers 0 to 1: right in \d+ steps; largest difference \S+e-0[5-9] of 1e-04 allowed, in \S+\n", result.stdout
    )


def test_check_fails_where_a_graph_computes_something_else(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mismatch(*_: object) -> None:
        raise GraphMismatch("layers 0..1: out is off by 0.3 of its largest value")

    monkeypatch.setattr(onnx_check, "check_range", mismatch)
    monkeypatch.setattr(onnx_export, "export_range", lambda *_: None)
    result = run("check", model)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "out is off by 0.3" in result.stderr


def test_inspect_shows_the_key_and_why_it_shows_no_more(engine: Path) -> None:
    result = run("inspect", engine)
    assert result.exit_code == 0, result.output
    lines = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert (lines["capability"], lines["tokens"], lines["quantization"]) == ("8.9", "(1, 64, 64)", "-")
    if not torch.cuda.is_available():
        assert "cannot load the engine here" in lines["contents"]
    about = json.loads(run("inspect", engine, "--json").stdout)
    assert about["plan_bytes"] == read_engine(engine).plan.nbytes
    assert about["past"] == [1, 64, 256]


def test_a_binding_is_one_line() -> None:
    profiles = (((1, 8), (4, 8), (16, 8)),)
    binding = {"name": "hidden", "is_input": True, "dtype": "HALF", "shape": (-1, 8), "profiles": profiles}
    assert binding_text(binding) == "in  hidden HALF [-1, 8] [1, 8] | [4, 8] | [16, 8]"
    assert binding_text(binding | {"is_input": False, "profiles": ()}) == "out hidden HALF [-1, 8]"


def test_a_file_that_is_damaged_or_none_is_said_to_be(engine: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.engine"
    damaged.write_bytes(engine.read_bytes()[:-1])
    for path, message in (
        (damaged, "is cut off"),
        (Path(__file__), "is not an engine of Baton"),
        (tmp_path / "none.engine", "No such file or directory"),
    ):
        result = run("inspect", path)
        assert (result.exit_code, result.stdout) == (1, "")
        assert str(path) in result.stderr
        assert message in result.stderr


def test_an_engine_of_fixed_weights_is_not_refitted(engine: Path, model: Path) -> None:
    result = run("refit", engine, model)
    assert result.exit_code == 1
    assert "was not compiled to be refitted; build it with --refit" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU these are allowed")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "there is no GPU here to compile for; name one: --capability 8.9"),
        (("--capability", "8.9", "--refit"), "needs a GPU to compile an engine that can be refitted"),
        (("--capability", "9.0"), "not 9.0; TensorRT compiles on such a GPU itself, there: pip install tensorrt-cu"),
        (("--capability", "sm89"), "a compute capability is two numbers such as 8.9, not 'sm89'"),
        (("--capability", "8.9", "--dtype", "float32"), "TensorRT has no attention kernel for float32"),
    ],
)
def test_what_cannot_be_compiled_here_is_refused_in_words(
    model: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    result = run("build", model, "--output", tmp_path, *options)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert list(tmp_path.glob("*.engine")) == []


@pytest.mark.parametrize(("capability", "quantization"), [("8.9", "fp8"), ("8.0", "")])
def test_an_fp8_model_stays_fp8_for_gpus_that_multiply_it(tmp_path: Path, capability: str, quantization: str) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    model = make_fp8_checkpoint(tmp_path / "model", form="modelopt", dtype=torch.bfloat16, **SHAPE)
    result = run("build", model, "--capability", capability, "--output", tmp_path, *SIZES)
    assert result.exit_code == 0, result.output
    [path] = map(Path, result.stdout.split())
    file = read_engine(path)
    assert (file.key.capability, file.key.quantization) == (capability, quantization)


def test_without_a_library_the_command_that_installs_it_is_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "MODULES", ("tensorrt_of_nobody",))
    result = run("build", model, "--capability", "8.9")
    assert result.exit_code == 1
    assert "install it: pip install tensorrt-rtx-cu" in result.stderr


def test_a_model_or_type_that_is_none_is_refused(tmp_path: Path, model: Path) -> None:
    result = run("check", tmp_path / "nowhere")
    assert result.exit_code == 1
    assert "is not a directory" in result.stderr
    assert run("check", model, "--dtype", "int4").exit_code == 2


def test_a_build_that_is_interrupted_leaves_no_engine(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "export_range", interrupted)
    result = run("build", model, "--capability", "8.9", "--output", tmp_path, *SIZES)
    assert result.exit_code == 130
    assert "stopped" in result.stderr
    assert [path.suffix for path in EngineCache(tmp_path).directory.iterdir()] == [".lock"]
