"""AdamW whose weights and moments are all bf16, rounded stochastically so that small updates are not lost."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

PART_ELEMENTS = 2**24


def round_stochastically(values: Tensor, noise: Tensor | None = None) -> Tensor:
    """float32 -> bf16, up or down with the probability that makes the expectation the value itself.

    A bf16 number is a float32 whose lower 16 bits are zero. Adding a uniform 16-bit number before they are cut off
    carries into the upper ones with probability (lower bits) / 2^16, which is the distance to the next lower neighbour.

    Args:
        noise: int32 in [0, 2^16), of the values' shape; drawn here unless given.
    """
    if noise is None:
        noise = torch.randint_like(values, 2**16, dtype=torch.int32)  # unlike randint, it compiles for any shape
    bits = (values.view(torch.int32) + noise) & -(2**16)
    return bits.view(torch.float32).to(torch.bfloat16)  # exact: the lower bits are zero


class Bf16AdamW(torch.optim.Optimizer):
    """Decoupled weight decay (Loshchilov & Hutter 2019, Alg. 2) at 6 bytes a parameter: weight and both moments.

    Computed in float32, stored in bf16. torch's own AdamW would round to the nearest, and at a learning rate of 1e-5
    most weights would never move. With `seed_of`, which gives a step's seed, a resumed run rounds as the run that was
    never stopped. Compiled, an update is one kernel instead of a dozen.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        eps: float = 1e-8,
        seed_of: Callable[[int], int] | None = None,
        compile_backend: str | None = None,
    ) -> None:
        super().__init__(parameters, {"lr": learning_rate})
        self._constants = (*betas, weight_decay, eps)
        self._seed_of = seed_of
        self._update: Callable[..., None] = _update
        if compile_backend is not None:
            self._update = torch.compile(_update, dynamic=True, backend=compile_backend)
            self._compile_now(next(iter(self.param_groups[0]["params"])))

    def _compile_now(self, like: Tensor) -> None:
        """Compile for vectors and for matrices here, and not in the thread of a backward pass that updates."""
        for shape in ((64,), (8, 8)):
            stand_in = torch.zeros(shape, dtype=like.dtype, device=like.device, requires_grad=True)
            stand_in.grad = torch.zeros_like(stand_in)
            self.update(stand_in)
            del self.state[stand_in]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter)

    @torch.no_grad()
    def update(self, parameter: Tensor) -> None:
        """One parameter's step, by its gradient and the first group's learning rate."""
        assert parameter.grad is not None
        state, (beta1, beta2, _, _) = self.state[parameter], self._constants
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        step = int(state["step"])
        # As tensors: as numbers, a compiled update would be compiled again in each step.
        scalars = torch.tensor([self.param_groups[0]["lr"], 1 - beta1**step, 1 - beta2**step], device=parameter.device)
        noise = self._noise(step, parameter.device)
        # A part at a time: the float32 copies of all weights would take six times their memory.
        parts = (
            tensor.view(-1).split(PART_ELEMENTS)
            for tensor in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        )
        for part in zip(*parts, strict=True):
            self._update(*part, noise(part[0]), scalars, *self._constants)

    def _noise(self, step: int, device: torch.device) -> Callable[[Tensor], Tensor | None]:
        """Draws int32 [3, N], for the two moments and the weight; None leaves the drawing to the rounding."""
        if self._seed_of is None:
            return lambda like: None
        generator = torch.Generator(device).manual_seed(self._seed_of(step))
        return lambda like: torch.randint(
            2**16, (3, like.numel()), dtype=torch.int32, device=device, generator=generator
        )


def _update(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    noise: Tensor | None,
    scalars: Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
) -> None:
    """Everything [N]; `scalars` are the learning rate and the corrections of the moments' bias."""
    learning_rate, *corrections = scalars.unbind()
    gradient = gradient.float()
    mean = exp_avg.float() * beta1 + gradient * (1 - beta1)
    square = exp_avg_sq.float() * beta2 + gradient * gradient * (1 - beta2)
    step = (mean / corrections[0]) / ((square / corrections[1]).sqrt() + eps)
    updated = weight.float() * (1 - learning_rate * weight_decay) - learning_rate * step
    for target, value, number in ((exp_avg, mean, 0), (exp_avg_sq, square, 1), (weight, updated, 2)):
        target.copy_(round_stochastically(value, None if noise is None else noise[number]))
