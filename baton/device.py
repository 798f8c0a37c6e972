"""What device `auto` is in this process. Loads torch, so only what is about to compute asks."""

from cluster.devices import Device, FoundDevice
from cluster.spec_errors import SpecError


def find_device(asked: Device) -> FoundDevice:
    """Raises SpecError when a GPU is asked for and PyTorch sees none."""
    if asked == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if asked == "cuda":
        reason = "sees no GPU" if torch.version.cuda else "was built without CUDA"
        raise SpecError([f"device: 'cuda' is not allowed here: PyTorch {torch.__version__} {reason}; allowed: cpu"])
    return "cpu"
