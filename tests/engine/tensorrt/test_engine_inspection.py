"""What is read out of a loaded engine, from a fake of one: loading a real one takes a GPU of its kind."""

import json
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from engine.executors.tensorrt.engine_inspection import Binding, inspect_plan
from engine.executors.tensorrt.library import Library
from tests.engine.tensorrt.fake_builder import Fake, make_module

INPUT, OUTPUT = "INPUT", "OUTPUT"
TENSORS = {
    "hidden": (INPUT, (-1, 8), [((1, 8), (4, 8), (16, 8)), ((1, 8), (1, 8), (1, 8))]),
    "new_0": (OUTPUT, (2, 1, -1, 4), []),
}


class FakeEngine:
    num_io_tensors = len(TENSORS)
    num_optimization_profiles = 2
    device_memory_size_v2 = 4096

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers

    def get_tensor_name(self, index: int) -> str:
        return list(TENSORS)[index]

    def get_tensor_mode(self, name: str) -> str:
        return TENSORS[name][0]

    def get_tensor_dtype(self, _name: str) -> Any:
        return Enum("DataType", ["HALF"]).HALF

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return TENSORS[name][1]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return list(TENSORS[name][2][profile])  # asking this of an output is an error

    def create_engine_inspector(self) -> Any:
        return SimpleNamespace(get_engine_information=lambda _format: json.dumps({"Layers": self.layers}))


def library(engine: FakeEngine) -> Library:
    module: ModuleType = make_module(Fake())
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda _plan: engine)
    module.__dict__.update(
        Runtime=lambda _logger: runtime,
        TensorIOMode=SimpleNamespace(INPUT=INPUT),
        LayerInformationFormat=SimpleNamespace(JSON="JSON"),
    )
    return Library(module)


def test_an_engine_is_told_by_its_tensors_profiles_and_kernels() -> None:
    contents = inspect_plan(library(FakeEngine(["qkv", {"Name": "attention", "LayerType": "kgen"}])), b"plan")
    assert contents.bindings == (
        Binding("hidden", True, "HALF", (-1, 8), (((1, 8), (4, 8), (16, 8)), ((1, 8), (1, 8), (1, 8)))),
        Binding("new_0", False, "HALF", (2, 1, -1, 4), ()),
    )
    assert (contents.scratch_bytes, contents.layers) == (4096, ("qkv", "attention"))


def test_an_engine_that_cannot_be_loaded_is_told_by_the_library() -> None:
    fake = Fake()
    fake.failure = "the plan is of another version"
    with pytest.raises(
        ValueError, match=r"TensorRT 11\.4\.0 cannot load the engine here: the plan is of another version"
    ):
        inspect_plan(Library(make_module(fake)), b"plan")
