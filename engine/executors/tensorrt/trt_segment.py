"""A range of layers by a TensorRT engine, queued on a CUDA stream.

TensorRT takes addresses, not tensors: 256-byte aligned, bound by name, valid until what was queued has run. A context
is told of shapes and addresses that changed only. Shapes that come again are captured as a CUDA graph, for as long as
the addresses are the same; what TensorRT allocates or compiles for new shapes it does in the run before.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from engine.executors.tensorrt.library import Library
from engine.executors.tensorrt.segment import SegmentError
from engine.executors.tensorrt.staging import ALIGNMENT, aligned_empty

MAX_GRAPHS = 64  # of one segment
log = logging.getLogger(__name__)

Bindings = tuple[tuple[str, tuple[int, ...], int], ...]  # name, shape and address of every tensor


class Queue(Protocol):
    """Where engines run: behind what is queued on the current stream, and before what comes next there."""

    def run(self, launch: Callable[[int], None]) -> None:
        """`launch` with the handle of the stream to launch on."""
        ...

    def capture(self, launch: Callable[[int], None]) -> Callable[[], None]:
        """What `launch` queues on the stream given, to be queued on the current one by each call."""
        ...


class CudaQueue:
    """A stream beside the current one: on the default stream TensorRT would wait for the device at every launch."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, launch: Callable[[int], None]) -> None:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        launch(self._stream.cuda_stream)
        current.wait_stream(self._stream)

    def capture(self, launch: Callable[[int], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Not torch.cuda.graph, which waits for the device first.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                launch(self._stream.cuda_stream)
            finally:
                graph.capture_end()
        return graph.replay


class Scratch:
    """Memory that engines need while they run, shared by those that run one after the other on one queue.

    Reserved while they are loaded, then allocated once: captured graphs hold its address.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._num_bytes = 1

    def reserve(self, num_bytes: int) -> None:
        assert not self._buffer.numel(), "an engine was loaded after memory was allocated for the others"
        self._num_bytes = max(self._num_bytes, num_bytes)

    def allocate(self) -> None:
        self._buffer = aligned_empty((self._num_bytes,), torch.uint8, self._device)

    def give(self, context: Any) -> None:
        assert self._buffer.numel(), "an engine runs before memory was allocated for it"
        context.set_device_memory(self._buffer.data_ptr(), self._buffer.numel())


class TensorRTSegment:
    """Implements `engine.executors.tensorrt.segment.Segment`. One thread makes all calls, on one queue.

    `plan` is what TensorRT's builder made of the layers' graph. Raises SegmentError, naming the tensor in question,
    wherever TensorRT says no or reports an error.
    """

    def __init__(
        self, library: Library, plan: memoryview, first: int, end: int, queue: Queue, scratch: Scratch
    ) -> None:
        self.first, self.end = first, end
        self._library, self._queue, self._scratch = library, queue, scratch
        self._runtime = self._checked("its runtime", library.runtime, None)  # outlives what it deserialized
        self._engine = self._checked("its engine", lambda: self._runtime.deserialize_cuda_engine(plan), None)
        by_user = library.module.ExecutionContextAllocationStrategy.USER_MANAGED
        self._context = self._checked("its context", lambda: self._engine.create_execution_context(by_user), None)
        scratch.reserve(self._engine.device_memory_size_v2)
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._dtypes = {name: torch_dtype(library.module, self._engine.get_tensor_dtype(name)) for name in names}
        is_input = library.module.TensorIOMode.INPUT
        self._inputs = {name for name in names if self._engine.get_tensor_mode(name) == is_input}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._captures = True
        # None: run once, and captured when it comes again. The one that was not used for longest goes first.
        self._graphs: OrderedDict[Bindings, Callable[[], None] | None] = OrderedDict()

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        tensors = {**inputs, **outputs}
        bindings = tuple((name, tuple(tensor.shape), tensor.data_ptr()) for name, tensor in tensors.items())
        graph = self._graphs.get(bindings)
        if graph is not None:
            self._graphs.move_to_end(bindings)
            graph()
            return
        self._bind(inputs, tensors)
        self._queue.run(self._launch)
        if bindings in self._graphs:  # once before: this run has made ready for capturing
            self._capture(bindings)
        else:
            self._remember(bindings, None)

    def _bind(self, inputs: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        if not self._shapes:  # the first time
            self._checked("its scratch memory", lambda: self._scratch.give(self._context))
        if strange := (self._dtypes.keys() ^ tensors.keys()) | (self._inputs ^ inputs.keys()):
            raise SegmentError(f"{self._title}: the engine and the step differ in {min(strange)}")
        for name, tensor in tensors.items():
            if tensor.dtype != self._dtypes[name]:
                raise SegmentError(f"{self._title}: {name} is {self._dtypes[name]} in the engine, not {tensor.dtype}")
            if not tensor.is_contiguous():
                raise SegmentError(f"{self._title}: {name} is not contiguous")
        for name, tensor in inputs.items():
            self._set_shape(name, tuple(tensor.shape))
        for name, tensor in tensors.items():
            expected = tuple(self._context.get_tensor_shape(name))
            if tuple(tensor.shape) != expected:
                raise SegmentError(f"{self._title}: {name} has the shape {expected}, not {tuple(tensor.shape)}")
            self._set_address(name, tensor.data_ptr())

    def _set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if self._shapes.get(name) != shape:
            self._shapes.pop(name, None)  # unknown, if this fails
            self._checked(f"the shape {shape} of {name}", lambda: self._context.set_input_shape(name, shape), False)
            self._shapes[name] = shape

    def _set_address(self, name: str, address: int) -> None:
        if self._addresses.get(name) != address:
            check_aligned(f"{self._title}: {name}", address)
            self._checked(f"the address of {name}", lambda: self._context.set_tensor_address(name, address), False)
            self._addresses[name] = address

    def _launch(self, handle: int) -> None:
        self._checked("a launch", lambda: self._context.execute_async_v3(handle), False)

    def _capture(self, bindings: Bindings) -> None:
        """Of what has just been run, so that capturing allocates and compiles nothing."""
        if not self._captures:
            return
        try:
            self._remember(bindings, self._queue.capture(self._launch))
        except RuntimeError as error:
            self._captures = False
            log.warning("%s: launched without CUDA graphs, for capturing one failed: %s", self._title, error)

    def _remember(self, bindings: Bindings, graph: Callable[[], None] | None) -> None:
        self._graphs[bindings] = graph
        self._graphs.move_to_end(bindings)
        if len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)

    def _checked(self, what: str, call: Callable[[], Any], *failures: Literal[False] | None) -> Any:
        """What `call` gives. Raises SegmentError where that is one of `failures` or an error was reported."""
        with self._library.messages.collected() as said:
            try:
                done = call()
            except (RuntimeError, TypeError) as error:
                raise SegmentError(f"{self._title}: {self._library.title} refused {what}: {error}") from error
            if any(done is failure for failure in failures) or self._library.messages.has_errors:
                raise SegmentError(f"{self._title}: {self._library.title} refused {what}: {said()}")
            return done

    @property
    def _title(self) -> str:
        return f"layers {self.first}..{self.end - 1}"


def check_aligned(what: str, address: int) -> None:
    if address % ALIGNMENT:
        raise SegmentError(f"{what} is at {address:#x}, not at a multiple of {ALIGNMENT} bytes")


def torch_dtype(module: Any, dtype: Any) -> torch.dtype | None:
    """None: one that no tensor of a step has."""
    types = {
        module.DataType.FLOAT: torch.float32,
        module.DataType.HALF: torch.float16,
        module.DataType.BF16: torch.bfloat16,
        module.DataType.INT32: torch.int32,
    }
    return types.get(dtype)
