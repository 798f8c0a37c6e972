"""A range of layers by onnxruntime on the CPU: the exported graph in place of the engine that is compiled from it.

For checking the TensorRT path where there is no GPU: the same executor, bindings, gather and scatter.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from torch import Tensor

from engine.executors.tensorrt.segment import SegmentError

QUIET = 3  # errors only


class OnnxSegment:
    """Implements `engine.executors.tensorrt.segment.Segment` for a graph in float32."""

    def __init__(self, path: Path, first: int, end: int, *, num_threads: int = 0) -> None:
        """`num_threads` 0: onnxruntime's own choice. Raises ValueError for a file that it does not run."""
        self.first, self.end = first, end
        options = onnxruntime.SessionOptions()
        options.log_severity_level = QUIET
        options.intra_op_num_threads = num_threads
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no common base of their own
            raise ValueError(f"onnxruntime does not run {path.name}: {error}") from error
        self._inputs = {each.name for each in self._session.get_inputs()}
        self._outputs = {each.name for each in self._session.get_outputs()}

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        if strange := (self._inputs ^ inputs.keys()) | (self._outputs ^ outputs.keys()):
            raise SegmentError(f"layers {self.first}..{self.end - 1}: the graph and the step differ in {min(strange)}")
        binding = self._session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_input(name, **place(tensor))
        for name, tensor in outputs.items():
            binding.bind_output(name, **place(tensor))
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise SegmentError(f"layers {self.first}..{self.end - 1}: {error}") from error


def place(tensor: Tensor) -> dict[str, Any]:
    """Where onnxruntime finds the tensor."""
    assert tensor.is_contiguous(), tensor.stride()
    return {
        "device_type": "cpu",
        "device_id": 0,
        "element_type": np.dtype(str(tensor.dtype).removeprefix("torch.")),
        "shape": tuple(tensor.shape),
        "buffer_ptr": tensor.data_ptr(),
    }
