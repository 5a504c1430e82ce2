"""Engines: how a step is taken. The loop knows this interface and nothing of what stands behind it."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class StepOutcome:
    """What every rank knows after a step; the same values on each."""

    loss: float  # mean over the global batch
    grad_norm: float  # before clipping
    applied: bool  # False: loss or gradient was not finite, and the weights are as they were
    stop_requested: bool  # some rank was asked to stop


class Engine(Protocol):
    """One model on `world_size` ranks: forward, backward, step, save, load.

    Every method is called by every rank, in the same order.
    """

    model: nn.Module
    device: torch.device
    rank: int
    world_size: int

    def autocast(self) -> AbstractContextManager[object]:
        """Forward passes run under this context, in the precision of the recipe."""
        ...

    def backward(self, loss: Tensor, *, is_last_micro_batch: bool) -> None:
        """Accumulate the gradient of `loss` (a scalar); ranks exchange gradients on the last micro-batch."""
        ...

    def step(self, learning_rate: float, loss: Tensor, *, stop_requested: bool) -> StepOutcome:
        """Agree over ranks, clip, update weights and their moving average, clear gradients."""
        ...

    def averaged_model(self) -> AbstractContextManager[nn.Module]:
        """Yield the model with its moving-average weights, in eval mode and without gradients."""
        ...

    def mean(self, total: float, count: int) -> float:
        """Sum of `total` over ranks divided by the sum of `count` over ranks."""
        ...

    def any_rank(self, fact: bool) -> bool:
        """Whether `fact` holds on some rank."""
        ...

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, in rank order, on rank 0; an empty list elsewhere."""
        ...

    def save(self, folder: Path, step: int) -> bool:
        """Write this rank's part of a checkpoint; return whether this rank wrote anything."""
        ...

    def load(self, folder: Path) -> int:
        """Restore what `save` wrote and return its step."""
        ...
