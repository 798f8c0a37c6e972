"""TensorRT's running half as far as Baton calls it, with the rules of its documentation, computing by onnxruntime.

It takes addresses, and refuses by False or None and a message to the logger: shapes outside the profile or the graph,
names that are none, addresses that are not aligned, and launches before everything is set. A launch that is captured
computes nothing until it is replayed, and then with the addresses of its capture; only what has been launched with
these shapes before can be captured.
"""

import ctypes
import json
import math
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from engine.executors.tensorrt.engine_build import Profile
from engine.executors.tensorrt.library import Library

STREAM = 7
SCRATCH_BYTES = 1 << 12
TYPES = {"tensor(float)": np.float32, "tensor(int32)": np.int32}
Shape = tuple[int, ...]


class ILogger:
    def log(self, severity: int, text: str) -> None:
        raise NotImplementedError


class Mode(IntEnum):
    INPUT = 1
    OUTPUT = 2


class DataType(IntEnum):
    FLOAT = 0
    HALF = 1
    INT32 = 3
    BF16 = 7


class Device:
    """What a test sees and sets. `refuses` names a call that fails next."""

    def __init__(self) -> None:
        self.num_launches = self.num_captures = self.num_replays = 0
        self.num_shapes_set = self.num_addresses_set = 0
        self.refuses = ""
        self.capturing: list[Callable[[], None]] | None = None

    def refuse(self, call: str) -> bool:
        refused = self.refuses == call
        self.refuses = "" if refused else self.refuses
        return refused


class FakeQueue:
    """Implements `engine.executors.tensorrt.trt_segment.Queue`."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def run(self, launch: Callable[[int], None]) -> None:
        launch(STREAM)

    def capture(self, launch: Callable[[int], None]) -> Callable[[], None]:
        recorded: list[Callable[[], None]] = []
        self._device.capturing = recorded
        try:
            launch(STREAM)
        finally:
            self._device.capturing = None
        self._device.num_captures += 1

        def replay() -> None:
            self._device.num_replays += 1
            for launched in recorded:
                launched()

        return replay


def make_plan(graph: Path, profile: Profile) -> memoryview:
    return memoryview(json.dumps({"graph": str(graph), "tokens": profile.tokens, "past": profile.past}).encode())


def fake_library(device: Device) -> Library:
    """Its runtime deserializes what `make_plan` gives."""
    module: Any = ModuleType("tensorrt")
    module.__version__ = "11.4.0"
    module.ILogger = ILogger
    module.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED=2)
    module.TensorIOMode = Mode
    module.DataType = DataType
    module.Runtime = lambda logger: Runtime(device, logger)
    return Library(module)


class Runtime:
    def __init__(self, device: Device, logger: ILogger) -> None:
        self._device, self._logger = device, logger

    def deserialize_cuda_engine(self, plan: memoryview) -> "Engine | None":
        try:
            return Engine(self._device, self._logger, json.loads(bytes(plan)))
        except ValueError:
            self._logger.log(1, "Serialization assertion magicTag failed")
            return None


class Engine:
    def __init__(self, device: Device, logger: ILogger, plan: dict[str, Any]) -> None:
        self.device, self.logger = device, logger
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(plan["graph"], options, providers=["CPUExecutionProvider"])
        self.inputs = {each.name: each for each in self.session.get_inputs()}
        self.outputs = {each.name: each for each in self.session.get_outputs()}
        self.tensors = self.inputs | self.outputs
        self.profile = {False: plan["tokens"], True: plan["past"]}
        self.num_io_tensors = len(self.tensors)
        self.device_memory_size_v2 = SCRATCH_BYTES

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.INPUT if name in self.inputs else Mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType.FLOAT if TYPES[self.tensors[name].type] is np.float32 else DataType.INT32

    def create_execution_context(self, strategy: int) -> "Context | None":
        if self.device.refuse("create_execution_context"):
            self.logger.log(1, "out of memory")
            return None
        assert strategy == 2, "Baton brings the scratch memory"
        return Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        self._engine, self._device = engine, engine.device
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._scratch_bytes = 0
        self._launched: set[tuple[Shape, ...]] = set()

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        self._device.num_shapes_set += 1
        if name not in self._engine.inputs:
            return self._error(f"no input named {name}")
        asked = self._engine.inputs[name].shape
        if len(asked) != len(shape):
            return self._error(f"{name} has {len(asked)} dimensions")
        least, _, most = self._engine.profile[name.startswith("past_")]
        for size, wanted in zip(shape, asked, strict=True):
            if isinstance(wanted, int) and size != wanted:
                return self._error(f"a static dimension of {name} is {wanted}, not {size}")
            if not isinstance(wanted, int) and not least <= size <= most:
                return self._error(f"{name} of {size} satisfies no optimization profile: {least} to {most}")
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> Shape:
        """-1 for what the shapes set do not tell."""
        if name in self._shapes:
            return self._shapes[name]
        known = {}
        for given, shape in self._shapes.items():
            known.update(zip(self._engine.inputs[given].shape, shape, strict=True))
        return tuple(
            size if isinstance(size, int) else known.get(size, -1) for size in self._engine.tensors[name].shape
        )

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._device.num_addresses_set += 1
        if name not in self._engine.tensors:
            return self._error(f"no tensor named {name}")
        if address % 256 or not address:
            return self._error(f"the address of {name} is not aligned")
        self._addresses[name] = address
        return True

    def set_device_memory(self, address: int, num_bytes: int) -> None:
        if num_bytes < self._engine.device_memory_size_v2 or address % 256:
            self._error("too little device memory")
        self._scratch_bytes = num_bytes

    def execute_async_v3(self, stream: int) -> bool:
        engine, device = self._engine, self._device
        if device.refuse("execute_async_v3"):
            return self._error("an illegal memory access was encountered")
        if stream != STREAM:
            return self._error(f"{stream} is no stream")
        if missing := engine.inputs.keys() - self._shapes.keys():
            return self._error(f"the shape of {min(missing)} is not set")
        if missing := engine.tensors.keys() - self._addresses.keys():
            return self._error(f"the address of {min(missing)} is not set")
        if not self._scratch_bytes:
            return self._error("device memory is not set")
        sizes: dict[str, set[int]] = {}
        for name, shape in self._shapes.items():
            for dimension, size in zip(engine.inputs[name].shape, shape, strict=True):
                sizes.setdefault(str(dimension), set()).add(size)
        if unlike := [dimension for dimension, found in sizes.items() if len(found) > 1]:
            return self._error(f"inputs differ in {unlike}")
        shapes = {name: self.get_tensor_shape(name) for name in engine.tensors}
        key = tuple(self._shapes.values())
        if device.capturing is not None:
            if device.refuse("capture"):
                return self._error("operation not permitted when stream is capturing")
            if key not in self._launched:
                return self._error("captured before a launch with these shapes")
            addresses = dict(self._addresses)
            device.capturing.append(lambda: self._compute(shapes, addresses))
            return True
        device.num_launches += 1
        self._launched.add(key)
        self._compute(shapes, self._addresses)
        return True

    def _compute(self, shapes: dict[str, Shape], addresses: dict[str, int]) -> None:
        tensors = {name: self._tensor(name, shapes[name], addresses[name]) for name in shapes}
        found = self._engine.session.run(
            list(self._engine.outputs), {name: tensors[name] for name in self._engine.inputs}
        )
        for name, values in zip(self._engine.outputs, found, strict=True):
            tensors[name][...] = values

    def _tensor(self, name: str, shape: Shape, address: int) -> Any:
        dtype = np.dtype(TYPES[self._engine.tensors[name].type])
        memory = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(address)
        return np.frombuffer(memory, dtype).reshape(shape)

    def _error(self, text: str) -> bool:
        self._engine.logger.log(1, text)
        return False
