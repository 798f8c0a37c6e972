"""What all kernels share about being launched."""

import torch
from torch import Tensor

HOPPER = 9


def overlaps(x: Tensor) -> bool:
    """Whether kernels on x's device may start before the one ahead of them in the stream has ended.

    Such a kernel (programmatic dependent launch) waits itself, before it reads what others wrote, and so
    hides its start behind the other's end. Every program of it must wait: the kernel after it relies on
    "the one before me is done" meaning that all earlier ones are.
    """
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= HOPPER
