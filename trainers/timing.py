"""Where the time of training steps goes, without waiting for the device that takes them."""

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, cast

import torch

from trainers.engines import StepOutcome

Activity = Literal["data", "forward", "backward", "optimizer", "stall"]
TRAINING: tuple[Activity, ...] = ("data", "forward", "backward", "optimizer")

Mark = float | torch.cuda.Event


class Interval:
    """What happened in the steps since the last report.

    A GPU works behind the process that hands it its work, so there time is what passes in its own stream between two
    marks: waiting for data counts only as far as the GPU stood still. Reading the marks waits for the last of them.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[Activity, Mark, Mark]] = []
        self._losses: list[float] = []
        self._steps = 0
        self._grad_norm = math.nan

    @contextmanager
    def time(self, activity: Activity) -> Iterator[None]:
        begin = self._mark()
        yield
        self._marks.append((activity, begin, self._mark()))

    def add(self, outcome: StepOutcome) -> None:
        self._steps += 1
        self._grad_norm = outcome.grad_norm
        if outcome.applied:
            self._losses.append(outcome.loss)

    def metrics(self, global_batch_size: int) -> dict[str, float]:
        """Mean loss of the applied steps (NaN if there is none), the last step's gradient norm, throughput, and the
        mean seconds of a step by what they went into.

        Throughput is that of the steps themselves. `stall_seconds` is what checkpoints and reports held them up in
        addition; validation and previews are no stall, for they were asked for.
        """
        spent: dict[Activity, float] = defaultdict(float)
        for activity, begin, end in self._marks:
            spent[activity] += _seconds(begin, end)
        seconds = sum(spent[activity] for activity in TRAINING)
        return {
            "loss": math.fsum(self._losses) / len(self._losses) if self._losses else math.nan,
            "grad_norm": self._grad_norm,
            "images_per_second": self._steps * global_batch_size / seconds,
            "data_wait_fraction": spent["data"] / seconds,
            "skipped_steps": float(self._steps - len(self._losses)),
            **{f"{activity}_seconds": spent[activity] / self._steps for activity in (*TRAINING, "stall")},
        }

    def _mark(self) -> Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(begin: Mark, end: Mark) -> float:
    if isinstance(begin, float):
        return cast(float, end) - begin
    event = cast(torch.cuda.Event, end)
    event.synchronize()
    return float(begin.elapsed_time(event)) / 1e3
