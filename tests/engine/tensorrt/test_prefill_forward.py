"""The executor whose layers run outside PyTorch: the one contract, and tokens equal to the torch executor's.

By onnxruntime as a worker on a CPU does it; and by TensorRTSegment over a stand-in for TensorRT, with the sizes,
padding and captured graphs of a worker on a GPU.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import pytest
import torch

from engine.attention.base import Span
from engine.executors import torch_executor
from engine.executors.base import Batch, Chunk, Executor
from engine.executors.model_loading import Loaded
from engine.executors.tensorrt.calls import CallLimits
from engine.executors.tensorrt.forward import PrefillForward
from engine.executors.tensorrt.limits import call_limits
from engine.executors.tensorrt.loading import profile_of
from engine.executors.tensorrt.prepare import ranges
from engine.executors.tensorrt.segment import Segment
from engine.executors.tensorrt.trt_segment import Scratch, TensorRTSegment
from engine.executors.torch_executor import TorchExecutor
from engine.request import RequestId
from tests.engine.executor_contract import CHECKS, decode, prompt_of, start, step
from tests.engine.tensorrt.fake_runtime import Device, FakeQueue, fake_library, make_plan
from tests.exported import Exported

SIZES = {"block_size": 8, "num_blocks": 64, "max_batch_tokens": 256}


def compiled(device: Device, made: Exported) -> Callable[..., Sequence[Segment]]:
    """A SegmentLoader of engines, as TensorRTLoader is, on the stand-in."""

    def load(loaded: Loaded, layer_groups: Sequence[int], limits: CallLimits) -> Sequence[Segment]:
        library, queue, scratch = fake_library(device), FakeQueue(device), Scratch(torch.device("cpu"))
        plans = [make_plan(path, profile_of(limits)) for path in made.export(loaded, layer_groups)]
        segments = [
            TensorRTSegment(library, plan, first, end, queue, scratch)
            for plan, (first, end) in zip(plans, ranges(layer_groups), strict=True)
        ]
        scratch.allocate()
        return segments

    return load


def as_on_a_gpu(made: Exported, device: Device, patch: pytest.MonkeyPatch, **config: object) -> TorchExecutor:
    with patch.context() as patched:
        patched.setattr(
            torch_executor, "call_limits", lambda layout, _device, *sizes: call_limits(layout, "cuda", *sizes)
        )
        return made.executor(compiled(device, made), **config)


@pytest.fixture(scope="module", params=["onnx", "onnx in calls of 16", "tensorrt", "tensorrt in calls of 16"])
def executor(request: pytest.FixtureRequest, exported: Callable[[str], Exported]) -> Iterator[Executor]:
    engine, _, is_cut = request.param.partition(" ")
    config = SIZES | ({"max_call_tokens": 16} if is_cut else {})
    if engine == "onnx":
        executor = exported("llama").executor(**config)
        yield executor
    else:
        device = Device()
        with pytest.MonkeyPatch.context() as patch:
            executor = as_on_a_gpu(exported("llama"), device, patch, **config)
        yield executor
        assert device.num_replays > device.num_captures > 0
    executor.close()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_an_executor_keeps_the_contract(check: Callable[[Executor], None], executor: Executor) -> None:
    check(executor)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_tokens_and_kv_equal_those_of_the_torch_executor(exported: Callable[[str], Exported], family: str) -> None:
    found = []
    for make in (exported(family).in_torch, partial(exported(family).executor, max_call_tokens=24)):
        executor = make(**SIZES)
        runs = [start(executor, prompt_of(executor, size, size), 16 * i) for i, size in enumerate((50, 3, 37, 1))]
        step(runs[:2], [33, 3])
        step(runs, [17, 1, 30, 1])  # all at once: a long past, a decode, a prompt without a past, and a single token
        step(runs[2:], [7, 1])
        tokens = decode(*runs[2:])
        blocks = [block for run in runs for block in run.block_ids[: run.num_computed // 8]]
        kv = [np.frombuffer(bytes(executor.memory.block(block)), np.float32) for block in blocks]
        found.append(([run.token_ids for run in runs], tokens, np.concatenate(kv)))
        executor.close()
    assert found[0][:2] == found[1][:2]
    assert np.abs(found[0][2] - found[1][2]).max() < 1e-5


def test_layers_are_announced_range_by_range_once_every_call_has_written_them(
    exported: Callable[[str], Exported],
) -> None:
    executor = exported("llama").executor(**SIZES, max_call_tokens=16)
    kv = np.frombuffer(executor.memory.buffer, np.float32).reshape(executor.layout.shape(64))
    announced: list[tuple[int, list[bool]]] = []
    chunks = [Chunk(RequestId(str(i)), list(range(5, 25)), 0, range(4 * i, 4 * i + 4)) for i in range(2)]

    def note(group: int) -> None:
        announced.append((group, [bool(kv[[0, 1, 4, 5], layer].all()) for layer in range(2)]))

    executor.submit(Batch(chunks), note).result()
    assert announced == [(0, [True, False]), (1, [True, True])]
    executor.close()


def test_nothing_of_the_layers_stays_in_pytorch(exported: Callable[[str], Exported]) -> None:
    executor = exported("llama").executor(**SIZES)
    names = {name for name, _ in executor._model.named_parameters()}
    assert names == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    executor.close()


def test_a_step_of_many_short_calls_makes_the_buffers_larger(exported: Callable[[str], Exported]) -> None:
    """Each decode has a past of which no two fit into a call; and each call begins at an aligned row."""
    executor = exported("llama").executor(block_size=8, num_blocks=64, max_batch_tokens=40, max_model_len=40)
    assert isinstance(executor._layers, PrefillForward)
    runs = [start(executor, prompt_of(executor, 30, i), 8 * i) for i in range(6)]
    for run in runs:
        step([run], [30])
    num_rows = len(executor._layers._hidden)
    together = decode(*runs)
    assert len(executor._layers._hidden) > num_rows
    alone = [start(executor, prompt_of(executor, 30, i), 8 * i) for i in range(6)]
    for run, tokens in zip(alone, together, strict=True):
        step([run], [30])
        assert decode(run) == [tokens]
    executor.close()


def test_what_a_freed_block_held_is_never_read(exported: Callable[[str], Exported]) -> None:
    """Padding and absent pasts must not bring in what lies in blocks of others, which may be NaN."""
    device = Device()
    with pytest.MonkeyPatch.context() as patch:
        executor = as_on_a_gpu(exported("llama"), device, patch, **SIZES)
    kv = torch.frombuffer(executor.memory.buffer, dtype=torch.float32)
    kv.fill_(torch.nan)
    run = start(executor, prompt_of(executor, 37), first_block=5, scattered=True)
    for size in (16, 16, 5):
        step([run], [size])
    tokens = decode(run)
    torch_alone = exported("llama").in_torch(**SIZES)
    reference = start(torch_alone, prompt_of(torch_alone, 37))
    step([reference], [37])
    assert tokens == decode(reference)
    with torch.inference_mode():
        assert executor._layers.run(torch.tensor([7]), [Span(0, 1, [60])], None, None).isfinite().all()
    executor.close()
    torch_alone.close()


def test_kv_of_another_type_is_refused(exported: Callable[[str], Exported], monkeypatch: pytest.MonkeyPatch) -> None:
    made = exported("llama")
    make_layout = torch_executor.make_layout
    monkeypatch.setattr(
        torch_executor, "make_layout", lambda config, model, _dtype: make_layout(config, model, "bfloat16")
    )
    with pytest.raises(ValueError, match=r"kv_cache\.dtype bfloat16 is for engine torch"):
        made.executor(**SIZES)
