"""AdamW whose weights and moments are all bf16, rounded stochastically so that small updates are not lost."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

PART_ELEMENTS = 2**24


def round_stochastically(values: Tensor, noise: Tensor) -> Tensor:
    """float32 -> bf16, up or down with the probability that makes the expectation the value itself.

    A bf16 number is a float32 whose lower 16 bits are zero. Adding a uniform 16-bit number before they are cut off
    carries into the upper ones with probability (lower bits) / 2^16, which is the distance to the next lower neighbour.

    Args:
        noise: int32 in [0, 2^16), of the values' shape.
    """
    bits = (values.view(torch.int32) + noise) & -(2**16)
    return bits.view(torch.float32).to(torch.bfloat16)  # exact: the lower bits are zero


def uniform_bits(index: Tensor, key: Tensor) -> Tensor:
    """int32 in [0, 2^16), a hash of element number `index` (int32) and `key` (int32 scalar).

    A function of the element, where a generator would fill memory with numbers that the update reads again: compiled,
    it costs no traffic. The mixing is "lowbias32" (C. Wellons, "Prospecting for Hash Functions", 2018).
    """
    mixed = index + key
    mixed = (mixed ^ _shifted(mixed, 16)) * 0x7FEB352D
    mixed = (mixed ^ _shifted(mixed, 15)) * -0x7B935975  # 0x846CA68B as a signed number
    return _shifted(mixed, 16)


def _shifted(bits: Tensor, places: int) -> Tensor:
    """To the right, with zeros from the left; torch repeats the sign."""
    shifted: Tensor = (bits >> places) & (2 ** (32 - places) - 1)
    return shifted


class Bf16AdamW(torch.optim.Optimizer):
    """Decoupled weight decay (Loshchilov & Hutter 2019, Alg. 2) at 6 bytes a parameter: weight and both moments.

    Computed in float32, stored in bf16. torch's own AdamW would round to the nearest, and at a learning rate of 1e-5
    most weights would never move. With `seed_of`, which gives a step's seed, a resumed run rounds as the run that was
    never stopped; without it, torch's generator gives the seed. Compiled, an update is one kernel that reads each state
    once and writes it once (14 bytes a parameter); uncompiled it is some 60 kernels, on parts.
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
        self._numbers: dict[Tensor, int] = {}  # in the order of their first updates: each rounds in its own way
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
        self._numbers.clear()

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
        number = self._numbers.setdefault(parameter, len(self._numbers))
        key = _as_int32(self._seed(step) + number * 0x9E3779B9)  # far apart for neighbouring numbers
        key_and_first = torch.tensor([key, 0], dtype=torch.int32, device=parameter.device)
        # A part at a time: uncompiled, the float32 copies of all weights would take six times their memory.
        parts = (
            tensor.view(-1).split(PART_ELEMENTS)
            for tensor in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        )
        for part in zip(*parts, strict=True):
            self._update(*part, key_and_first, scalars, *self._constants)
            key_and_first[1] += PART_ELEMENTS

    def _seed(self, step: int) -> int:
        return int(torch.randint(2**31, ())) if self._seed_of is None else self._seed_of(step)


def _as_int32(number: int) -> int:
    return (number + 2**31) % 2**32 - 2**31


def _update(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    key_and_first: Tensor,
    scalars: Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
) -> None:
    """Everything [N]; `scalars` are the learning rate and the corrections of the moments' bias, `key_and_first` (int32)
    the key of the rounding and the number of the first element."""
    learning_rate, *corrections = scalars.unbind()
    gradient = gradient.float()
    mean = exp_avg.float() * beta1 + gradient * (1 - beta1)
    square = exp_avg_sq.float() * beta2 + gradient * gradient * (1 - beta2)
    step = (mean / corrections[0]) / ((square / corrections[1]).sqrt() + eps)
    updated = weight.float() * (1 - learning_rate * weight_decay) - learning_rate * step
    key, first = key_and_first.unbind()
    index = torch.arange(weight.numel(), dtype=torch.int32, device=weight.device) + first
    for number, (target, value) in enumerate(((exp_avg, mean), (exp_avg_sq, square), (weight, updated))):
        target.copy_(round_stochastically(value, uniform_bits(index, key + number * 0x3C6EF372)))
