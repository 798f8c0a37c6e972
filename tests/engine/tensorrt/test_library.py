"""Which TensorRT is taken, what is said where there is none, and what its logger keeps."""

import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from engine.executors.tensorrt.library import Capability, Library, LibraryMissing, Messages, load_library

Importer = Callable[[str], ModuleType]


def fake_module(name: str, **attributes: Any) -> ModuleType:
    module = ModuleType(name)
    members = {f"SM{target}": target for target in (75, 80, 86, 89, 120, 121)} | {"NONE": 0, "CURRENT": 1}
    module.__dict__.update(
        {"__version__": "11.4.0", "Builder": object, "ILogger": object}
        | {"ComputeCapability": type("ComputeCapability", (), {"__members__": members})}
        | attributes
    )
    return module


def installed(*modules: ModuleType, broken: str | None = None) -> Importer:
    def importer(name: str) -> ModuleType:
        if name == broken:
            raise ImportError("libnvinfer.so.11: cannot open shared object file")
        for module in modules:
            if module.__name__ == name:
                return module
        raise ModuleNotFoundError(name)

    return importer


def test_tensorrt_goes_first_and_rtx_serves_where_it_is_absent() -> None:
    full, rtx = fake_module("tensorrt"), fake_module("tensorrt_rtx_bindings", __version__="1.7.1")
    assert load_library("tensorrt", importer=installed(full, rtx)).title == "TensorRT 11.4.0"
    assert load_library("tensorrt", importer=installed(rtx)).title == "TensorRT-RTX 1.7.1"


def test_a_module_of_that_name_that_is_something_else_is_passed_over() -> None:
    rtx = fake_module("tensorrt_rtx")
    assert load_library("tensorrt", importer=installed(ModuleType("tensorrt"), rtx)).name == "tensorrt_rtx"


def test_only_rtx_builds_ahead_and_only_tensorrt_keeps_timings() -> None:
    full, rtx = Library(fake_module("tensorrt")), Library(fake_module("tensorrt_rtx"))
    assert (full.builds_ahead, full.keeps_timings, full.targets) == (False, True, ())
    assert (rtx.builds_ahead, rtx.keeps_timings) == (True, False)
    assert [str(target) for target in rtx.targets] == ["7.5", "8.0", "8.6", "8.9", "12.0", "12.1"]


def test_an_engine_that_must_be_tensorrt_is_refused_with_the_command_that_installs_it() -> None:
    with pytest.raises(LibraryMissing, match=r"neither TensorRT nor .*; install it: pip install tensorrt-cu1\d$"):
        load_library("tensorrt", Capability(9, 0), installed())
    with pytest.raises(LibraryMissing, match=r"pip install tensorrt-rtx-cu1\d-libs tensorrt-rtx-cu1\d-bindings$"):
        load_library("tensorrt", None, installed())


def test_rtx_is_refused_on_hopper_and_the_command_is_that_of_tensorrt() -> None:
    with pytest.raises(LibraryMissing, match=r"TensorRT-RTX 11.4.0 is for GPUs of 7.5, .*12.1, not 9.0; .*tensorrt-cu"):
        load_library("tensorrt", Capability(9, 0), installed(fake_module("tensorrt_rtx")))
    both = installed(fake_module("tensorrt"), fake_module("tensorrt_rtx"))
    assert load_library("tensorrt", Capability(9, 0), both).name == "tensorrt"


def test_an_old_gpu_is_refused_by_both() -> None:
    both = installed(fake_module("tensorrt"), fake_module("tensorrt_rtx"))
    with pytest.raises(LibraryMissing, match=r"from 7.5 on, not 7.0; TensorRT-RTX"):
        load_library("tensorrt", Capability(7, 0), both)


def test_auto_computes_in_pytorch_and_says_why_in_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert load_library("auto", Capability(9, 0), installed(broken="tensorrt")) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "tensorrt cannot be loaded: libnvinfer.so.11" in caplog.text


@pytest.mark.parametrize("text", ["8", "89", "8.", ".9", "8.10", "x.y", "sm_89", "-8.9"])
def test_what_is_no_compute_capability_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"two numbers such as 8\.9"):
        Capability.parse(text)


def test_capabilities_are_read_and_written_alike() -> None:
    assert [str(Capability.parse(text)) for text in ("8.9", "12.0")] == ["8.9", "12.0"]


def test_errors_are_kept_for_who_raises_and_their_echo_is_left_out() -> None:
    messages = Messages()
    messages.add(1, "of an earlier call")
    with messages.collected() as said:
        assert said() == "it gave no reason"
        messages.add(2, "a warning")
        messages.add(1, "no kernel fits\n")
        messages.add(1, "[checkMacros.cpp::catchCudaError::250] once more")
        messages.add(0, "no kernel fits")
        assert said() == "no kernel fits"


def test_the_real_library_reports_into_the_messages() -> None:
    library = Library(pytest.importorskip("tensorrt_rtx_bindings"))
    with library.messages.collected() as said:
        config = library.builder().create_builder_config()
        assert not config.set_compute_capability(library.module.ComputeCapability.SM80, 3)
        assert "Index of compute capability is not in a valid range" in said()
    assert set(map(str, library.targets)) >= {"8.0", "8.9", "12.0"}
    assert library.why_unsupported(Capability(9, 0)) is not None
    assert importlib.import_module("tensorrt_rtx_bindings").__version__ in library.title


def test_a_build_for_a_gpu_that_is_not_there_takes_rtx() -> None:
    full, rtx = fake_module("tensorrt"), fake_module("tensorrt_rtx_bindings")
    assert load_library("tensorrt", Capability(8, 9), installed(full, rtx), ahead=True).name == "tensorrt_rtx"
    with pytest.raises(LibraryMissing, match=r"compiles only for the GPU that it finds; .*pip install tensorrt-rtx-cu"):
        load_library("tensorrt", Capability(8, 9), installed(full), ahead=True)
    with pytest.raises(LibraryMissing, match=r"not 9\.0; TensorRT compiles on such a GPU itself, there: .*tensorrt-cu"):
        load_library("tensorrt", Capability(9, 0), installed(rtx), ahead=True)
