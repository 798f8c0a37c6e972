"""Layers outside PyTorch on a GPU: everything around the engines with ranges that PyTorch runs, then engines."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engine.executors.base import Batch, Chunk, Executor
from engine.executors.model_loading import Loaded
from engine.executors.tensorrt.calls import CallLimits
from engine.executors.tensorrt.engine_cache import EngineCache
from engine.executors.tensorrt.layer_range import LayerRange
from engine.executors.tensorrt.library import LibraryMissing, gpu_capability, load_library
from engine.executors.tensorrt.loading import TensorRTLoader
from engine.executors.tensorrt.prepare import ranges
from engine.executors.tensorrt.segment import Segment
from engine.executors.tensorrt.trt_segment import CudaQueue
from engine.executors.torch_executor import TorchConfig, TorchExecutor
from engine.request import RequestId
from tests.checkpoints import make_checkpoint
from tests.engine.executor_contract import CHECKS, prompt_of

pytestmark = pytest.mark.gpu
SIZES = {"device": "cuda", "block_size": 8, "num_blocks": 64, "max_batch_tokens": 256, "layers_per_group": 1}


class RangeSegment:
    """A segment that PyTorch runs, on a queue as an engine would be."""

    def __init__(self, layers: LayerRange, queue: CudaQueue) -> None:
        self.first, self.end = layers.first, layers.end
        self._layers, self._queue = layers, queue

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        def launch(handle: int) -> None:
            with torch.cuda.stream(torch.cuda.ExternalStream(handle)):
                found = self._layers(*(inputs[name] for name in self._layers.input_names))
                for name, values in zip(self._layers.output_names, found, strict=True):
                    outputs[name].copy_(values)

        assert all(tensor.data_ptr() % 256 == 0 for tensor in (*inputs.values(), *outputs.values()))
        self._queue.run(launch)


def in_pytorch(loaded: Loaded, layer_groups: Sequence[int], _limits: CallLimits, /) -> Sequence[Segment]:
    queue = CudaQueue(torch.device("cuda:0"))
    segments = [RangeSegment(LayerRange(loaded.model, *ends), queue) for ends in ranges(layer_groups)]
    loaded.model.model.layers = nn.ModuleList()
    return segments


@pytest.fixture(scope="module", params=[None, 16], ids=["whole", "in calls of 16"])
def executor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Executor]:
    path = make_checkpoint(tmp_path_factory.mktemp("llama"), "llama", tokenizer=False)
    config = TorchConfig(dtype="float32", max_call_tokens=request.param, **SIZES)  # type: ignore[arg-type]
    executor = TorchExecutor(path, config, load_segments=in_pytorch)
    yield executor
    executor.close()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_an_executor_keeps_the_contract(check: Callable[[Executor], None], executor: Executor) -> None:
    check(executor)


def test_a_queue_runs_in_order_with_the_current_stream_also_when_captured() -> None:
    queue = CudaQueue(torch.device("cuda:0"))
    x, y = torch.zeros(1 << 24, device="cuda"), torch.zeros(1 << 24, device="cuda")

    def launch(handle: int) -> None:
        with torch.cuda.stream(torch.cuda.ExternalStream(handle)):
            torch.add(x, 1, out=y)

    queue.run(launch)
    replay = queue.capture(launch)
    for value in range(20):
        x.fill_(value)
        queue.run(launch) if value % 2 else replay()
        x.copy_(y)
        assert (x == value + 1).all()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_log_probabilities_by_engines_are_as_close_as_those_in_pytorch(tmp_path: Path, family: str) -> None:
    """In bfloat16, against float32; prompts in chunks, several in a step."""
    try:
        library = load_library("tensorrt", gpu_capability())
    except LibraryMissing as error:
        pytest.skip(str(error))
    heads = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    path = make_checkpoint(tmp_path / "model", family, tokenizer=False, **heads)
    loader = TensorRTLoader(library, EngineCache(tmp_path / "engines"), torch.device("cuda:0"))
    found = [
        logprobs(TorchExecutor(path, TorchConfig(dtype=dtype, **SIZES), load_segments=load))  # type: ignore[arg-type]
        for dtype, load in (("float32", None), ("bfloat16", None), ("bfloat16", loader))
    ]
    exact, in_pytorch, by_engines = found
    noise = (in_pytorch - exact).abs()
    assert (by_engines - exact).abs().mean() < 2 * noise.mean()
    assert (by_engines - exact).abs().max() < 3 * noise.max()


def logprobs(executor: TorchExecutor) -> Tensor:
    """Of the tokens of two prompts in three steps."""
    prompts = [prompt_of(executor, 60, seed) for seed in (1, 2)]
    found: list[float] = []
    for start, end in ((0, 16), (16, 40), (40, 60)):
        chunks = [
            Chunk(
                RequestId(str(i)),
                prompt[start:end],
                start,
                range(8 * i, 8 * i + 8),
                None,
                0,
                prompt[start + 1 : end + 1],
            )
            for i, prompt in enumerate(prompts)
        ]
        result = executor.submit(Batch(chunks)).result()
        found += [entry.logprob for entries in result.prompt_logprobs for entry in entries or ()]
    executor.close()
    return torch.tensor(found)
