"""Exponential moving average of a model's weights."""

import torch
from torch import Tensor, nn


def ramped_decay(decay: float, update: int) -> float:
    """min(decay, (1 + n) / (10 + n)) for update n (1-based), the ramp of the TensorFlow reference implementation:
    without it the initial weights would dominate short runs."""
    return min(decay, (1 + update) / (10 + update))


class EMA:
    """A float32 moving average of `model`'s floating-point state, kept beside the model on its device; frozen weights
    are their own average and have none (of FLUX with adapters they would take 48 GB).

    After update n (1-based) the average is  a_n = d_n a_{n-1} + (1 - d_n) w_n  with a_0 the initial weights
    and d_n = `ramped_decay(decay, n)`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.average = {name: value.detach().clone().float() for name, value in _weights(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's present weights."""
        self.num_updates += 1
        decay = ramped_decay(self.decay, self.num_updates)
        weights = [value.detach().float() for value in _weights(model).values()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - decay)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the model's weights and the average; a second call puts both back."""
        for name, value in _weights(model).items():
            present = value.detach().clone()
            value.copy_(self.average[name])
            self.average[name].copy_(present)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state less its frozen weights, which nothing changes and so nobody need keep."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in trained_state(model).items() if value.is_floating_point()}
