"""Engines: how a step is taken. The loop knows this interface and nothing of what stands behind it."""

from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

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


class Arriving:
    """A step's outcome on its way from the device, which finds it while the process prepares what comes next."""

    def __init__(self, loss: Tensor, grad_norm: Tensor, applied: Tensor, stop_votes: Tensor) -> None:
        values = torch.stack([value.detach().float() for value in (loss, grad_norm, applied, stop_votes)])
        self._values = values.to("cpu", non_blocking=True)
        self._arrival = torch.cuda.Event() if values.is_cuda else None
        if self._arrival:
            self._arrival.record()

    def read(self) -> StepOutcome:
        """Waits until it is there."""
        if self._arrival:
            self._arrival.synchronize()
        loss, grad_norm, applied, stop_votes = self._values.tolist()
        return StepOutcome(loss, grad_norm, applied > 0, stop_votes > 0)


class Saving(NamedTuple):
    """A rank's part of a checkpoint, which may still be written while the training goes on."""

    folder: Path
    written: Future[None]


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

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[object]:
        """Forward and backward of one run under this context; ranks exchange gradients on a step's last."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of `loss`, a scalar."""
        ...

    def step(self, learning_rate: float, loss: Tensor, *, stop_requested: bool) -> Arriving:
        """Agree over ranks, clip, update weights and their moving average, clear gradients.

        If the loss or the gradient is not finite, the weights stay as they are.
        """
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

    def save(self, folder: Path, step: int) -> Saving | None:
        """Begin to write this rank's part of a checkpoint of the state as it is now; None if this rank has none."""
        ...

    def load(self, folder: Path) -> int:
        """Restore what `save` wrote and return its step."""
        ...
