"""The seam between a step and what computes a range of decoder layers: a compiled engine, or another in its place."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from engine.executors.model_loading import Loaded
from engine.executors.tensorrt.calls import CallLimits


class SegmentError(RuntimeError):
    """A segment cannot be run; the message names the tensor, where it is about one."""


class Segment(Protocol):
    """Layers `first .. end - 1`. The names, shapes and types of its tensors are those of the exported graph:

    inputs   hidden [T, hidden_size], cos and sin [T, rotary_dim / 2], positions and sequence_ids int32 [T],
             past_positions and past_sequence_ids int32 [P], past_<layer> [k|v, num_kv_heads, P, head_dim]
    outputs  out [T, hidden_size], new_<layer> [k|v, num_kv_heads, T, head_dim]

    A token attends to those of its own sequence id that are at its own position or before. T and P are at least 1.
    """

    @property
    def first(self) -> int: ...
    @property
    def end(self) -> int: ...

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Compute into `outputs`, which are contiguous and of exact shape. On CUDA it is queued on the current stream.

        Raises SegmentError.
        """
        ...


class SegmentLoader(Protocol):
    """Makes the segments of a worker, which take calls within `limits`, one for each of the layer groups.

    Afterwards the decoder layers of `loaded.model` are gone: the segments have weights of their own. None: there are
    no segments, and PyTorch is to compute the layers. Raises ValueError for a model that cannot be run that way.
    """

    def __call__(
        self, loaded: Loaded, layer_groups: Sequence[int], limits: CallLimits, /
    ) -> Sequence[Segment] | None: ...
