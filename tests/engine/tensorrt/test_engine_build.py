"""Compiling ranges ahead of time with the real TensorRT-RTX, and what a build does besides, with a fake of TensorRT."""

import os
import signal
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engine.executors.tensorrt import engine_build
from engine.executors.tensorrt.build_progress import PhaseTree
from engine.executors.tensorrt.engine_build import (
    BuildOptions,
    EngineBuildError,
    Profile,
    build_engine,
    refit_engine,
)
from engine.executors.tensorrt.library import Capability, Library
from engine.executors.tensorrt.onnx_export import export_range
from tests.engine.tensorrt.conftest import ExportedRange
from tests.engine.tensorrt.fake_builder import Fake, Flag, make_module, plan_weights
from tests.engine.tensorrt.ranges import fp8_model, whole_range

PROFILE = Profile((1, 512, 2048), (1, 1024, 8192))
ADA = Capability(8, 9)


@pytest.fixture(scope="module")
def rtx() -> Library:
    return Library(pytest.importorskip("tensorrt_rtx_bindings"))


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def tensorrt(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Library:
    """TensorRT on a machine with a GPU of 9.0."""
    monkeypatch.setattr(engine_build, "gpu_capability", lambda: Capability(9, 0))
    return Library(make_module(fake))


def small_graph(path: Path, **weights: float) -> Path:
    """hidden [T, 4] and past_0 [2, 1, P, 4], and sums with `weights`."""
    tensors = {name: np.full((4,), value, np.float32) for name, value in weights.items()}
    names = ["hidden", *(f"sum_{name}" for name in tensors)]
    nodes = [
        helper.make_node("Add", [before, name], [after])
        for before, after, name in zip(names, names[1:], tensors, strict=False)
    ]
    graph = helper.make_graph(
        nodes,
        "range",
        [
            helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["T", 4]),
            helper.make_tensor_value_info("past_0", TensorProto.FLOAT, [2, 1, "P", 4]),
        ],
        [helper.make_tensor_value_info(names[-1], TensorProto.FLOAT, ["T", 4])],
        [numpy_helper.from_array(tensor, name) for name, tensor in tensors.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), path)
    return path


@pytest.mark.parametrize("capability", ["8.0", "8.9", "12.0"])
@pytest.mark.parametrize(("family", "dtype"), [("llama", "float16"), ("qwen2", "bfloat16"), ("qwen3", "bfloat16")])
def test_ranges_compile_ahead_of_time(
    rtx: Library, exported_range: ExportedRange, family: str, dtype: str, capability: str
) -> None:
    layers, onnx_path = exported_range(family, dtype)
    parts: list[float] = []
    plan = build_engine(rtx, onnx_path, BuildOptions(PROFILE, Capability.parse(capability)), parts.append)
    num_weight_bytes = sum(weight().nbytes for weight in layers.weights().values())
    assert plan.nbytes > num_weight_bytes
    assert parts == sorted(parts)
    assert len(parts) > 10
    assert parts[-1] > 0.8


def test_fp8_weights_compile_for_gpus_that_have_fp8(rtx: Library, tmp_path: Path) -> None:
    """From a checkpoint with static scales, as ModelOpt makes them."""
    model = fp8_model(tmp_path / "model", form="modelopt", head_dim=64, num_hidden_layers=1)
    layers = whole_range(model)
    (tmp_path / "onnx").mkdir()
    onnx_path = export_range(layers, tmp_path / "onnx")
    for capability in (ADA, Capability(12, 0)):
        assert build_engine(rtx, onnx_path, BuildOptions(PROFILE, capability)).nbytes > 0
    with pytest.raises(EngineBuildError, match=r"Cannot compile for target.* sm80, because .* fp8"):
        build_engine(rtx, onnx_path, BuildOptions(PROFILE, Capability(8, 0)))


def test_a_build_that_is_interrupted_ends_early_and_the_next_one_is_whole(
    rtx: Library, exported_range: ExportedRange
) -> None:
    _, onnx_path = exported_range("llama", "float16")
    options = BuildOptions(PROFILE, ADA)
    interrupts = iter([signal.SIGINT])  # one: a second could come when nobody expects it any more

    def interrupt(_part: float) -> None:
        for number in interrupts:
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt):
        build_engine(rtx, onnx_path, options, interrupt)
    assert build_engine(rtx, onnx_path, options).nbytes > 0


def test_an_interrupt_stops_the_builder_at_its_next_step(tensorrt: Library, fake: Fake, tmp_path: Path) -> None:
    fake.interrupts = True  # for ever, unless it is told to stop
    with pytest.raises(KeyboardInterrupt):
        build_engine(tensorrt, small_graph(tmp_path / "model.onnx", a=1.0), BuildOptions(PROFILE))


def test_a_node_that_the_parser_does_not_know_is_named(rtx: Library, tmp_path: Path) -> None:
    path = small_graph(tmp_path / "model.onnx", a=1.0)
    model = onnx.load(path)
    model.graph.node[0].CopyFrom(helper.make_node("Odd", ["hidden"], ["sum_a"], "layers.7.odd", domain="elsewhere"))
    model.opset_import.append(helper.make_opsetid("elsewhere", 1))
    onnx.save(model, path)
    with pytest.raises(EngineBuildError, match=r"TensorRT-RTX .* node layers\.7\.odd \(Odd\): .*Plugin not found"):
        build_engine(rtx, path, BuildOptions(PROFILE, ADA))


def test_a_file_that_is_not_there_or_lacks_its_weights_is_refused(
    rtx: Library, exported_range: ExportedRange, tmp_path: Path
) -> None:
    with pytest.raises(EngineBuildError, match="cannot read the graph"):
        build_engine(rtx, tmp_path / "none.onnx", BuildOptions(PROFILE, ADA))
    _, onnx_path = exported_range("llama", "float16")
    (tmp_path / "model.onnx").write_bytes(onnx_path.read_bytes())
    with pytest.raises(EngineBuildError, match="Failed to import initializer"):
        build_engine(rtx, tmp_path / "model.onnx", BuildOptions(PROFILE, ADA))


def test_a_graph_with_other_inputs_than_a_range_is_refused(rtx: Library, tmp_path: Path) -> None:
    path = small_graph(tmp_path / "model.onnx", a=1.0)
    model = onnx.load(path)
    model.graph.input[1].type.tensor_type.shape.dim[1].dim_param = "heads"
    onnx.save(model, path)
    with pytest.raises(EngineBuildError, match=r"past_0 \[2, -1, -1, 4\] has not exactly one size that varies"):
        build_engine(rtx, path, BuildOptions(PROFILE, ADA))


@pytest.mark.parametrize("sizes", [(0, 1, 2), (2, 1, 3), (1, 5, 4), (1, 2, 1 << 31)])
def test_sizes_of_a_profile_must_ascend(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="past of a profile must ascend"):
        Profile((1, 1, 1), sizes)


def test_what_rtx_cannot_do_here_is_refused_before_it_is_tried(rtx: Library, tmp_path: Path) -> None:
    path = small_graph(tmp_path / "model.onnx", a=1.0)
    for capability, refit, message in (
        (None, (), "no GPU here to compile for; name one: --capability 8.9"),
        (Capability(9, 0), (), r"TensorRT-RTX .* is for GPUs of .*, not 9\.0"),
        (ADA, ("a",), "needs a GPU to compile an engine that can be refitted"),
    ):
        with pytest.raises(EngineBuildError, match=message):
            build_engine(rtx, path, BuildOptions(PROFILE, capability, refit))
    with pytest.raises(EngineBuildError, match="refits an engine on the GPU that runs it"):
        refit_engine(rtx, b"", path)


def test_tensorrt_compiles_for_the_gpu_at_hand_only(
    tensorrt: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_graph(tmp_path / "model.onnx", a=1.0)
    assert build_engine(tensorrt, path, BuildOptions(PROFILE, Capability(9, 0))).nbytes > 0
    with pytest.raises(EngineBuildError, match=r"compiles for the GPU it finds, here 9\.0, not 8\.9"):
        build_engine(tensorrt, path, BuildOptions(PROFILE, ADA))
    monkeypatch.setattr(engine_build, "gpu_capability", lambda: None)
    with pytest.raises(EngineBuildError, match="PyTorch finds none here"):
        build_engine(tensorrt, path, BuildOptions(PROFILE))


def test_every_input_gets_the_sizes_of_the_profile(tensorrt: Library, fake: Fake, tmp_path: Path) -> None:
    options = BuildOptions(PROFILE, workspace=1 << 28)
    build_engine(tensorrt, small_graph(tmp_path / "model.onnx", a=1.0), options)
    assert fake.profiles == [
        {
            "hidden": ((1, 4), (512, 4), (2048, 4)),
            "past_0": ((2, 1, 1, 4), (2, 1, 1024, 4), (2, 1, 8192, 4)),
        }
    ]
    assert fake.workspace == 1 << 28


def test_a_failed_build_says_what_the_library_said(tensorrt: Library, fake: Fake, tmp_path: Path) -> None:
    fake.failure = "Could not find any implementation for node Add"
    with pytest.raises(EngineBuildError, match=r"^TensorRT 11\.4\.0 cannot compile the graph: Could not find any impl"):
        build_engine(tensorrt, small_graph(tmp_path / "model.onnx", a=1.0), BuildOptions(PROFILE))


def test_timings_are_kept_for_the_next_build(tensorrt: Library, fake: Fake, tmp_path: Path) -> None:
    path, options = (
        small_graph(tmp_path / "model.onnx", a=1.0),
        BuildOptions(PROFILE, timing_cache=tmp_path / "timings"),
    )
    build_engine(tensorrt, path, options)
    assert fake.timed == ["Add"]
    build_engine(tensorrt, path, options)
    assert fake.timed == []


@pytest.mark.parametrize("content", [b"torn", b'{"version": "10.0.0", "kernels": ["Add"]}'])
def test_timings_that_are_damaged_or_of_another_version_are_replaced(
    tensorrt: Library, fake: Fake, tmp_path: Path, content: bytes
) -> None:
    path, timings = small_graph(tmp_path / "model.onnx", a=1.0), tmp_path / "timings"
    timings.write_bytes(content)
    build_engine(tensorrt, path, BuildOptions(PROFILE, timing_cache=timings))
    assert fake.timed == ["Add"]
    build_engine(tensorrt, path, BuildOptions(PROFILE, timing_cache=timings))
    assert fake.timed == []


def test_timings_of_a_build_that_ended_meanwhile_are_not_lost(tensorrt: Library, tmp_path: Path) -> None:
    path, timings = small_graph(tmp_path / "model.onnx", a=1.0), tmp_path / "timings"
    timings.write_bytes(b'{"version": "11.4.0", "kernels": []}')

    def other_build(_part: float) -> None:
        timings.write_bytes(b'{"version": "11.4.0", "kernels": ["MatMul"]}')

    build_engine(tensorrt, path, BuildOptions(PROFILE, timing_cache=timings), other_build)
    assert timings.read_bytes() == b'{"version": "11.4.0", "kernels": ["Add", "MatMul"]}'


def test_refitting_exchanges_the_marked_weights_alone(tensorrt: Library, fake: Fake, tmp_path: Path) -> None:
    old, new = (small_graph(tmp_path / f"{a}.onnx", a=a, b=b) for a, b in ((1.0, 2.0), (3.0, 4.0)))
    plan = build_engine(tensorrt, old, BuildOptions(PROFILE, refit={"a"}))
    assert fake.flags == [Flag.REFIT_INDIVIDUAL]
    weights = plan_weights(refit_engine(tensorrt, plan, new))
    assert weights == {"a": np.full(4, 3.0, np.float32).tobytes(), "b": np.full(4, 2.0, np.float32).tobytes()}


def test_weights_that_the_graph_does_not_have_cannot_be_marked(tensorrt: Library, tmp_path: Path) -> None:
    with pytest.raises(EngineBuildError, match=r"no weights of its own for a, c$"):
        build_engine(
            tensorrt, small_graph(tmp_path / "model.onnx", b=1.0), BuildOptions(PROFILE, refit={"a", "b", "c"})
        )


def test_a_refit_without_all_weights_is_refused(tensorrt: Library, tmp_path: Path) -> None:
    plan = build_engine(
        tensorrt, small_graph(tmp_path / "1.onnx", a=1.0, b=2.0), BuildOptions(PROFILE, refit={"a", "b"})
    )
    with pytest.raises(EngineBuildError, match=r"the new weights lack b$"):
        refit_engine(tensorrt, plan, small_graph(tmp_path / "2.onnx", a=1.0))


def test_a_refit_with_weights_of_another_size_is_refused(tensorrt: Library, tmp_path: Path) -> None:
    path = small_graph(tmp_path / "model.onnx", a=1.0)
    plan = build_engine(tensorrt, path, BuildOptions(PROFILE, refit={"a"}))
    model = onnx.load(path)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((3, 4), np.float32), "a"))
    onnx.save(model, path)
    with pytest.raises(EngineBuildError, match="do not fit the engine: a has another size"):
        refit_engine(tensorrt, plan, path)


def test_an_engine_of_fixed_weights_or_that_cannot_be_loaded_is_not_refitted(
    tensorrt: Library, fake: Fake, tmp_path: Path
) -> None:
    path = small_graph(tmp_path / "model.onnx", a=1.0)
    plan = build_engine(tensorrt, path, BuildOptions(PROFILE))
    with pytest.raises(EngineBuildError, match="build it with --refit"):
        refit_engine(tensorrt, plan, path)
    fake.failure = "the engine is of another version"
    with pytest.raises(EngineBuildError, match=r"cannot refit the engine: the engine is of another version"):
        refit_engine(tensorrt, plan, path)


def test_the_part_done_counts_the_phases_inside_a_step_and_never_falls() -> None:
    parts: list[float] = []
    phases = PhaseTree(parts.append)
    phases.start("build", None, 2)
    phases.start("time", "build", 4)
    phases.step("time", 0)
    phases.start("reformat", "time", 2)
    phases.step("reformat", 0)
    phases.finish("reformat")
    phases.step("time", 1)
    phases.finish("time")
    phases.step("build", 0)
    phases.start("link", "build", 1000)
    phases.step("link", 0)  # too small a part to tell
    phases.finish("link")
    phases.step("build", 1)
    phases.step("of no phase that was started", 0)
    assert parts == [0.125, 0.1875, 0.25, 0.5, 1.0]
