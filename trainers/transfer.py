"""From host memory to the device that trains."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, in its queue of work: only from pinned memory does a GPU take it while it works on, and
    without the process having to wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
