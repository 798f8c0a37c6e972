"""TensorRT's building half as far as Baton calls it, with the behaviour its documentation gives.

A plan is the sizes and weights of the graph it was made from, so that a test can see what a refit put there. Weights
that were not marked cannot be exchanged; what a parser, builder or refitter refuses, it refuses by False or None and a
message to the logger, as the real ones do.
"""

import io
import json
import os
import signal
from enum import IntEnum
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper


class Fake:
    """What a test sets and sees: `failure` is what the next build says when it fails."""

    def __init__(self) -> None:
        self.failure: str | None = None
        self.interrupts = False  # press Ctrl-C in the next build, and go on until the monitor says stop
        self.timed: list[str] = []  # kernels that had to be timed
        self.flags: list[Any] = []
        self.profiles: list[dict[str, Any]] = []
        self.workspace: int | None = None


class IProgressMonitor:
    pass


class ILogger:
    def log(self, severity: int, text: str) -> None:
        raise NotImplementedError


class Flag(IntEnum):
    STRONGLY_TYPED = 0
    REFIT_INDIVIDUAL = 22
    WORKSPACE = 0


class Errors:
    """The parsers' way to tell of errors."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, index: int) -> Any:
        text = self.errors[index]
        return SimpleNamespace(node_name=lambda: "", node_operator=lambda: "", desc=lambda: text)


class Network:
    def __init__(self) -> None:
        self.model: Any = None
        self.marked: set[str] = set()

    @property
    def num_inputs(self) -> int:
        return len(self.model.graph.input)

    def get_input(self, index: int) -> Any:
        tensor = self.model.graph.input[index]
        return SimpleNamespace(
            name=tensor.name, shape=[dim.dim_value or -1 for dim in tensor.type.tensor_type.shape.dim]
        )

    def weights(self) -> dict[str, np.ndarray]:
        return {item.name: numpy_helper.to_array(item) for item in self.model.graph.initializer}

    def mark_weights_refittable(self, name: str) -> bool:
        self.marked.add(name)
        return name in self.weights()


class OnnxParser(Errors):
    def __init__(self, network: Network, _logger: ILogger) -> None:
        super().__init__()
        self.network = network

    def parse_from_file(self, path: str) -> bool:
        try:
            self.network.model = onnx.load(path)
        except OSError as error:
            self.errors.append(str(error))
        return not self.errors


class TimingCache:
    def __init__(self, fake: Fake, content: bytes) -> None:
        self.fake = fake
        self.version, self.kernels = "11.4.0", set()
        if content:
            kept = json.loads(content)
            self.version, self.kernels = kept["version"], set(kept["kernels"])

    def combine(self, other: "TimingCache", ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if other.version != self.version:
            return False
        self.kernels |= other.kernels
        return True

    def serialize(self) -> bytes:
        return json.dumps({"version": self.version, "kernels": sorted(self.kernels)}).encode()


class BuilderConfig:
    def __init__(self, fake: Fake) -> None:
        self.fake = fake
        self.progress_monitor: Any = None
        self.cache = TimingCache(fake, b"")

    def add_optimization_profile(self, profile: Any) -> int:
        self.fake.profiles.append(profile.shapes)
        return 0

    def set_flag(self, flag: Any) -> None:
        self.fake.flags.append(flag)

    def set_memory_pool_limit(self, _pool: Any, size: int) -> None:
        self.fake.workspace = size

    def create_timing_cache(self, content: bytes) -> TimingCache | None:
        try:
            return TimingCache(self.fake, content)
        except ValueError:
            return None

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.version != "11.4.0":
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> TimingCache:
        return self.cache


class Builder:
    def __init__(self, fake: Fake, logger: ILogger) -> None:
        self.fake, self.logger = fake, logger

    def create_network(self, flags: int) -> Network:
        assert flags == 1, "strongly typed"
        return Network()

    def create_builder_config(self) -> BuilderConfig:
        return BuilderConfig(self.fake)

    def create_optimization_profile(self) -> Any:
        shapes: dict[str, Any] = {}
        return SimpleNamespace(
            shapes=shapes, set_shape=lambda name, *sizes: shapes.__setitem__(name, tuple(map(tuple, sizes)))
        )

    def build_serialized_network(self, network: Network, config: BuilderConfig) -> bytes | None:
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 2)
        monitor.phase_start("Timing", "Building", 4)
        for step in range(4):
            if self.fake.interrupts:
                os.kill(os.getpid(), signal.SIGINT)
                while monitor.step_complete("Timing", 0):
                    os.sched_yield()
            if not monitor.step_complete("Timing", step):
                self.logger.log(1, "BuildCanceled")
                return None
        monitor.phase_finish("Timing")
        if self.fake.failure is not None:
            self.logger.log(1, self.fake.failure)
            return None
        kernels = {node.op_type for node in network.model.graph.node}
        self.fake.timed = sorted(kernels - config.cache.kernels)
        config.cache.kernels |= kernels
        monitor.step_complete("Building", 1)
        monitor.phase_finish("Building")
        return make_plan(network.weights(), network.marked)


def make_plan(weights: dict[str, np.ndarray], marked: set[str]) -> bytes:
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **{"marked": np.array(sorted(marked), dtype=str)}, **by_bytes(weights))
    return content.getvalue()


def by_bytes(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """numpy files know no bfloat16."""
    return {f"weights {name}": value.reshape(-1).view(np.uint8) for name, value in weights.items()}


def plan_weights(plan: bytes | memoryview) -> dict[str, bytes]:
    content = np.load(io.BytesIO(plan))
    return {name.removeprefix("weights "): content[name].tobytes() for name in content if name != "marked"}


class Engine:
    def __init__(self, plan: bytes) -> None:
        self.weights = plan_weights(plan)
        self.marked = {str(name) for name in np.load(io.BytesIO(plan))["marked"]}
        self.refittable = bool(self.marked)

    def serialize(self) -> bytes:
        weights = {name: np.frombuffer(value, np.uint8) for name, value in self.weights.items()}
        return make_plan(weights, self.marked)


class Runtime:
    def __init__(self, fake: Fake, logger: ILogger) -> None:
        self.fake, self.logger = fake, logger

    def deserialize_cuda_engine(self, plan: bytes | memoryview) -> Engine | None:
        if self.fake.failure is not None:
            self.logger.log(1, self.fake.failure)
            return None
        return Engine(bytes(plan))


class Refitter:
    def __init__(self, engine: Engine, logger: ILogger) -> None:
        self.engine, self.logger = engine, logger
        self.given: dict[str, bytes] = {}

    def get_all_weights(self) -> list[str]:
        return sorted(self.engine.marked)

    def get_missing_weights(self) -> list[str]:
        return []  # names only what is combined with weights that were given

    def refit_cuda_engine(self) -> bool:
        self.engine.weights |= self.given
        return True


class OnnxParserRefitter(Errors):
    def __init__(self, refitter: Refitter, _logger: ILogger) -> None:
        super().__init__()
        self.refitter = refitter

    def refit_from_file(self, path: str) -> bool:
        for item in onnx.load(path).graph.initializer:
            value = numpy_helper.to_array(item).tobytes()
            if item.name not in self.refitter.engine.marked:
                continue
            if len(value) != len(self.refitter.engine.weights[item.name]):
                self.errors.append(f"{item.name} has another size")
            self.refitter.given[item.name] = value
        return not self.errors


def make_module(fake: Fake, name: str = "tensorrt") -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(
        __version__="11.4.0",
        Builder=lambda logger: Builder(fake, logger),
        Runtime=lambda logger: Runtime(fake, logger),
        ILogger=type("ILogger", (ILogger,), {}),
        IProgressMonitor=IProgressMonitor,
        OnnxParser=OnnxParser,
        OnnxParserRefitter=OnnxParserRefitter,
        Refitter=Refitter,
        BuilderFlag=Flag,
        MemoryPoolType=Flag,
        NetworkDefinitionCreationFlag=Flag,
    )
    return module
