"""Memory at addresses that TensorRT accepts; and a step's index arrays, brought there in one copy."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.executors.tensorrt.calls import Int32s

ALIGNMENT = 256  # bytes, what TensorRT asks of addresses


def aligned_empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Contiguous, at an aligned address on any device."""
    size = math.prod(shape) * dtype.itemsize
    raw = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=device)
    start = -raw.data_ptr() % ALIGNMENT
    return raw[start : start + size].view(dtype).view(*shape)


class Staging:
    """Owns the buffer, where each array has an aligned place that depends only on the sizes of those before it.

    So that equal steps find equal addresses. The copy into it is ordered behind what reads it for the step before.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer = aligned_empty((0,), torch.int32, device)

    def put(self, arrays: Sequence[Int32s]) -> list[Tensor]:
        """int32 tensors with the values of `arrays`, valid until the next call."""
        unit = ALIGNMENT // 4
        places = [0]
        for array in arrays:
            places.append(places[-1] + -(-array.size // unit) * unit)
        # PyTorch's allocator of pinned memory hands it out again only after the copies made of it have run.
        packed = torch.zeros(places[-1], dtype=torch.int32, pin_memory=self._device.type == "cuda")
        for array, place in zip(arrays, places, strict=False):
            packed.numpy()[place : place + array.size] = array
        if self._buffer.numel() < places[-1]:
            self._buffer = aligned_empty((places[-1] + places[-1] // 4,), torch.int32, self._device)
        self._buffer[: places[-1]].copy_(packed, non_blocking=True)
        return [self._buffer[place : place + array.size] for array, place in zip(arrays, places, strict=False)]
