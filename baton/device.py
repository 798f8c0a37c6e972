"""What device `auto` is in this process. Loads torch, so only what is about to compute asks."""

from typing import get_args

from cluster.devices import Device, FoundDevice
from cluster.spec_errors import SpecError


def find_device(asked: Device) -> FoundDevice:
    """Raises SpecError when a GPU is asked for and PyTorch sees none, and for what is no kind of device."""
    if asked not in get_args(Device):
        raise SpecError(
            [f"device: {asked!r} is not allowed; allowed: auto, cpu, cuda (CUDA_VISIBLE_DEVICES says which GPU)"]
        )
    if asked == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if asked == "cuda":
        reason = "sees no GPU" if torch.version.cuda else "was built without CUDA"
        raise SpecError([f"device: 'cuda' is not allowed here: PyTorch {torch.__version__} {reason}; allowed: cpu"])
    return "cpu"
