"""Floating-point operations of a training pass, counted and not tabled."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def pass_flops(build: Callable[[], nn.Module], objective: Callable[..., Tensor], **inputs: Tensor) -> float:
    """FLOPs (a multiplication and an addition are two) of the forward and backward pass of one image.

    `inputs` are the objective's, for one image. The model is built anew without storage: only shapes are multiplied.
    """
    with torch.device("meta"):
        model = build()
    with FlopCounterMode(display=False) as counter:
        objective(model, **{name: value.to("meta") for name, value in inputs.items()}).mean().backward()
    return float(counter.get_total_flops())
