"""What an engine's plan holds: its tensors, the sizes they may have, and its kernels. Needs a GPU that can run it."""

import json
from dataclasses import dataclass
from typing import Any

from engine.executors.tensorrt.library import Library


@dataclass(frozen=True, slots=True)
class Binding:
    """A tensor of the engine. -1 varies; `profiles` are an input's least, tuned and largest shape in each profile."""

    name: str
    is_input: bool
    dtype: str
    shape: tuple[int, ...]
    profiles: tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True, slots=True)
class PlanContents:
    bindings: tuple[Binding, ...]
    scratch_bytes: int  # of GPU memory while it runs, beside its weights
    layers: tuple[str, ...]  # as the library names what it made of the graph


def inspect_plan(library: Library, plan: bytes | memoryview) -> PlanContents:
    """Raises ValueError with the library's words where it cannot load the plan, as without a GPU."""
    with library.messages.collected() as said:
        runtime = library.runtime()
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise ValueError(f"{library.title} cannot load the engine here: {said()}")
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        return PlanContents(
            tuple(_binding(library.module, engine, name) for name in names),
            engine.device_memory_size_v2,
            _layers(library.module, engine),
        )


def _binding(module: Any, engine: Any, name: str) -> Binding:
    is_input = engine.get_tensor_mode(name) == module.TensorIOMode.INPUT
    profiles = range(engine.num_optimization_profiles if is_input else 0)
    return Binding(
        name,
        is_input,
        engine.get_tensor_dtype(name).name,
        tuple(engine.get_tensor_shape(name)),
        tuple(tuple(tuple(shape) for shape in engine.get_tensor_profile_shape(name, index)) for index in profiles),
    )


def _layers(module: Any, engine: Any) -> tuple[str, ...]:
    """Names, or objects with a name where the engine was built with more detail."""
    inspector = engine.create_engine_inspector()
    information = json.loads(inspector.get_engine_information(module.LayerInformationFormat.JSON))
    return tuple(layer if isinstance(layer, str) else str(layer.get("Name")) for layer in information.get("Layers", ()))
