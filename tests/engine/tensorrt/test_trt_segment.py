"""TensorRTSegment on a stand-in for TensorRT that keeps its rules; and on the library, until that needs a GPU."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.executors.model_loading import load
from engine.executors.tensorrt import trt_segment
from engine.executors.tensorrt.engine_build import Profile
from engine.executors.tensorrt.library import Capability, Library, load_library
from engine.executors.tensorrt.onnx_segment import OnnxSegment
from engine.executors.tensorrt.segment import SegmentError
from engine.executors.tensorrt.staging import aligned_empty
from engine.executors.tensorrt.trt_segment import Scratch, TensorRTSegment
from engine.model_config import load_model_config
from tests.engine.tensorrt.fake_runtime import Device, FakeQueue, fake_library, make_plan
from tests.exported import Exported

CPU = torch.device("cpu")
PROFILE = Profile((1, 16, 32), (1, 16, 64))
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def llama(exported: Callable[[str], Exported]) -> Exported:
    made = exported("llama")
    config = load_model_config(made.checkpoint)
    made.export(load(made.checkpoint, config, "float32", CPU, dummy=False, progress=None), (1, 2))
    return made


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def segment(llama: Exported, device: Device) -> TensorRTSegment:
    scratch = Scratch(CPU)
    made = TensorRTSegment(fake_library(device), make_plan(llama.graph(0), PROFILE), 0, 1, FakeQueue(device), scratch)
    scratch.allocate()
    return made


def filled(tensor: Tensor) -> Tensor:
    return tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel())))


def tensors_of(num_tokens: int, num_past: int) -> tuple[Tensors, Tensors]:
    """Of layer 0 of the tiny Llama: one sequence, the past before the tokens."""

    def floats(*shape: int) -> Tensor:
        return filled(aligned_empty(shape, torch.float32, CPU))

    def integers(start: int, step: int, size: int) -> Tensor:
        values = aligned_empty((size,), torch.int32, CPU)
        return values.copy_(start + step * torch.arange(size))

    inputs = {
        "hidden": floats(num_tokens, 64),
        "cos": floats(num_tokens, 8),
        "sin": floats(num_tokens, 8),
        "positions": integers(num_past, 1, num_tokens),
        "sequence_ids": integers(0, 0, num_tokens),
        "past_positions": integers(0, 1, num_past),
        "past_sequence_ids": integers(0, 0, num_past),
        "past_0": floats(2, 2, num_past, 16),
    }
    outputs = {"out": floats(num_tokens, 64), "new_0": floats(2, 2, num_tokens, 16)}
    return inputs, outputs


def expected(llama: Exported, inputs: Tensors, outputs: Tensors) -> Tensors:
    right = {name: torch.empty_like(tensor) for name, tensor in outputs.items()}
    OnnxSegment(llama.graph(0), 0, 1, num_threads=1).run(inputs, right)
    return right


def test_it_computes_what_the_graph_says(llama: Exported, segment: TensorRTSegment) -> None:
    for num_tokens, num_past in ((5, 9), (32, 64), (1, 1)):
        inputs, outputs = tensors_of(num_tokens, num_past)
        segment.run(inputs, outputs)
        for name, right in expected(llama, inputs, outputs).items():
            assert torch.equal(outputs[name], right), name


def test_only_what_changed_is_told(segment: TensorRTSegment, device: Device) -> None:
    inputs, outputs = tensors_of(5, 9)
    segment.run(inputs, outputs)
    assert (device.num_shapes_set, device.num_addresses_set) == (8, 10)
    segment.run(inputs, outputs)
    assert (device.num_shapes_set, device.num_addresses_set) == (8, 10)
    inputs |= {name: tensor for name, tensor in tensors_of(5, 8)[0].items() if name.startswith("past_")}
    segment.run(inputs, outputs)
    assert (device.num_shapes_set, device.num_addresses_set) == (11, 13)


def test_what_comes_again_is_captured_and_then_replayed(
    llama: Exported, segment: TensorRTSegment, device: Device
) -> None:
    calls = [tensors_of(5, 9), tensors_of(8, 1)]
    for _ in range(4):
        for inputs, outputs in calls:
            filled(inputs["hidden"]).mul_(1 + device.num_launches)
            outputs["out"].zero_()
            segment.run(inputs, outputs)
            assert torch.equal(outputs["out"], expected(llama, inputs, outputs)["out"])
    assert (device.num_launches, device.num_captures, device.num_replays) == (4, 2, 4)


def test_a_captured_graph_is_not_used_for_other_addresses(
    llama: Exported, segment: TensorRTSegment, device: Device
) -> None:
    inputs, outputs = tensors_of(5, 9)
    for _ in range(3):
        segment.run(inputs, outputs)
    assert device.num_replays == 1
    elsewhere = {name: aligned_empty(tensor.shape, tensor.dtype, CPU) for name, tensor in outputs.items()}
    segment.run(inputs, elsewhere)
    assert device.num_replays == 1
    assert torch.equal(elsewhere["new_0"], expected(llama, inputs, outputs)["new_0"])


def test_as_many_graphs_are_kept_as_are_allowed(
    segment: TensorRTSegment, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt_segment, "MAX_GRAPHS", 2)
    calls = [tensors_of(num_tokens, 1) for num_tokens in (1, 2, 3)]
    for call in calls * 3:
        segment.run(*call)
    assert device.num_captures == 0  # each had gone when it came again
    for call in [calls[0], calls[1]] * 3:
        segment.run(*call)
    assert (device.num_captures, device.num_replays) == (2, 2)


def test_where_capturing_fails_launches_go_on(
    segment: TensorRTSegment, device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    inputs, outputs = tensors_of(5, 9)
    segment.run(inputs, outputs)
    device.refuses = "capture"
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            segment.run(inputs, outputs)
    assert (device.num_launches, device.num_captures) == (4, 0)
    [record] = caplog.records
    assert "layers 0..0: launched without CUDA graphs" in record.message
    assert "operation not permitted when stream is capturing" in record.message


def unaligned(inputs: Tensors, _outputs: Tensors) -> None:
    inputs["cos"] = aligned_empty((41,), torch.float32, CPU)[1:].view(5, 8)


def other_type(inputs: Tensors, _outputs: Tensors) -> None:
    inputs["positions"] = inputs["positions"].long()


def strided(inputs: Tensors, _outputs: Tensors) -> None:
    inputs["sin"] = aligned_empty((5, 16), torch.float32, CPU)[:, :8]


def too_long(inputs: Tensors, _outputs: Tensors) -> None:
    inputs["past_0"] = aligned_empty((2, 2, 65, 16), torch.float32, CPU)


def other_heads(inputs: Tensors, _outputs: Tensors) -> None:
    inputs["past_0"] = aligned_empty((2, 3, 9, 16), torch.float32, CPU)


def unknown(inputs: Tensors, _outputs: Tensors) -> None:
    inputs["past_9"] = inputs.pop("past_0")


def swapped(inputs: Tensors, outputs: Tensors) -> None:
    outputs["sin"] = inputs.pop("sin")


def small_output(_inputs: Tensors, outputs: Tensors) -> None:
    outputs["out"] = aligned_empty((4, 64), torch.float32, CPU)


def unlike(inputs: Tensors, _outputs: Tensors) -> None:
    inputs["past_positions"] = aligned_empty((8,), torch.int32, CPU)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (unaligned, r"cos is at 0x[0-9a-f]+, not at a multiple of 256 bytes"),
        (other_type, r"positions is torch\.int32 in the engine, not torch\.int64"),
        (strided, "sin is not contiguous"),
        (too_long, r"the shape \(2, 2, 65, 16\) of past_0: past_0 of 65 satisfies no optimization profile: 1 to 64"),
        (other_heads, r"refused the shape .* of past_0: a static dimension of past_0 is 2, not 3"),
        (unknown, "the engine and the step differ in past_0"),
        (swapped, "the engine and the step differ in sin"),
        (small_output, r"out has the shape \(5, 64\), not \(4, 64\)"),
        (unlike, r"TensorRT 11\.4\.0 refused a launch: inputs differ in"),
    ],
)
def test_what_is_wrong_is_named_and_the_next_call_is_right(
    llama: Exported, segment: TensorRTSegment, spoil: Callable[[Tensors, Tensors], None], message: str
) -> None:
    inputs, outputs = tensors_of(5, 9)
    spoil(inputs, outputs)
    with pytest.raises(SegmentError, match=r"layers 0\.\.0: .*" + message):
        segment.run(inputs, outputs)
    inputs, outputs = tensors_of(5, 9)
    segment.run(inputs, outputs)
    assert torch.equal(outputs["out"], expected(llama, inputs, outputs)["out"])


def test_a_launch_that_fails_says_what_the_library_said(segment: TensorRTSegment, device: Device) -> None:
    device.refuses = "execute_async_v3"
    with pytest.raises(SegmentError, match="refused a launch: an illegal memory access was encountered"):
        segment.run(*tensors_of(5, 9))


def test_an_error_that_is_only_reported_is_an_error(llama: Exported, device: Device) -> None:
    library, scratch = fake_library(device), Scratch(CPU)
    segment = TensorRTSegment(library, make_plan(llama.graph(0), PROFILE), 0, 1, FakeQueue(device), scratch)
    scratch._num_bytes = 5
    scratch.allocate()
    with pytest.raises(SegmentError, match="refused its scratch memory: too little device memory"):
        segment.run(*tensors_of(5, 9))


def test_an_engine_that_cannot_be_loaded_is_refused(llama: Exported, device: Device) -> None:
    def make(plan: memoryview) -> TensorRTSegment:
        return TensorRTSegment(fake_library(device), plan, 0, 1, FakeQueue(device), Scratch(CPU))

    with pytest.raises(SegmentError, match=r"layers 0\.\.0: .* refused its engine: Serialization assertion"):
        make(make_plan(llama.graph(0), PROFILE)[:20])
    device.refuses = "create_execution_context"
    with pytest.raises(SegmentError, match="refused its context: out of memory"):
        make(make_plan(llama.graph(0), PROFILE))


@pytest.fixture(scope="module")
def real() -> Library:
    pytest.importorskip("tensorrt_rtx_bindings")
    return load_library("tensorrt", Capability(8, 0), ahead=True)


@pytest.mark.parametrize("plan", [b"", b"no engine" * 1000])
def test_the_library_refuses_what_is_no_engine_with_its_reason(real: Library, plan: bytes) -> None:
    reason = "Serialization assertion" if plan else "empty memory buffer"
    with pytest.raises(SegmentError, match=rf"layers 3\.\.4: TensorRT-RTX .* refused its engine: .*{reason}"):
        TensorRTSegment(real, memoryview(plan), 3, 5, FakeQueue(Device()), Scratch(CPU))
