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
        self.average = {name: value.detach().clone().float() for name, value in _weights(model).items()}
        devices = [value.device for value in self.average.values()]
        self.num_updates = torch.zeros((), dtype=torch.int64, device=devices[0] if devices else None)

    @torch.no_grad()
    def update(self, model: nn.Module, applied: Tensor | bool = True) -> None:
        """Move the average towards the model's present weights, if the step that led to them was applied.

        Whether it was may still be on its way from the device: nobody waits for it.
        """
        self.num_updates += applied
        averages = list(self.average.values())
        weights = [value.detach().float() for value in _weights(model).values()]
        if self.decay == 0:  # the average is the weights, bit for bit
            torch._foreach_copy_(averages, weights)
            return
        decay = ((1 + self.num_updates) / (10 + self.num_updates)).clamp(max=self.decay)  # `ramped_decay`
        changes = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(changes, (1 - decay) * applied)
        torch._foreach_add_(averages, changes)

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
