"""Moving small tensors between host and device without making either wait for the other."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: NDArray[np.generic] | Sequence[int], device: torch.device) -> Tensor:
    """A tensor with the values, integers as int64. The copy to a GPU is ordered before what is queued next there.

    From memory that is not pinned PyTorch would wait for everything queued so far.
    """
    array = values if isinstance(values, np.ndarray) else np.fromiter(values, np.int64, len(values))
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """The tensor in host memory; from a GPU its bytes are there when what was queued until now has run."""
    return tensor.to("cpu", non_blocking=True)
