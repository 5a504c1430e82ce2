"""A rank's figures for Ray's metrics exporter, where Prometheus reads them. One of the two that import Ray here.

What is exported is named below and nowhere else: Ray puts `ray_` before each name, and `_total` behind a counter's.
"""

from collections.abc import Mapping
from typing import TypeVar

from ray.util.metrics import Counter, Gauge

from cluster import counters

M = TypeVar("M", Gauge, Counter)

PREFIX = "medsynth_"

GAUGES = {
    "step": "Finished steps of the stage.",
    "loss": "Mean loss of the steps since the report before.",
    "validation_loss": "Mean loss of the averaged weights over the validation split.",
    "images_per_second": "Images that all ranks together trained on in a second, since the report before.",
    "teraflops_per_second": "Model FLOPs of a rank's passes in a second, in 10^12, since the report before.",
    "mfu": "Model FLOP utilisation: their share of what the device can do at most.",
    "grad_norm": "Norm of the gradient before it is clipped, of the last step.",
    "learning_rate": "Learning rate of the last step.",
    "world_size": "Ranks that train.",
    "skipped_steps": "Steps without an update since the report before: loss or gradient was not finite.",
}
"""Equal on all ranks, or rank 0's for all: by run and stage, under the loop's own names."""

RANK_GAUGES = {
    "data_wait_fraction": "Share of its steps' time that a rank waited for data, since the report before.",
    "data_seconds": "Seconds of a step that a rank waited for data, mean since the report before.",
    "forward_seconds": "The same, of its forward passes.",
    "backward_seconds": "The same, of its backward passes.",
    "optimizer_seconds": "The same, of its updates.",
    "stall_seconds": "The same, that checkpoints and reports held it up.",
}
"""Each rank's own: by run, stage and rank."""

COUNTERS: dict[counters.Event, str] = {
    "storage_read_retries": "Requests of a rank that read from S3 and were sent again.",
    "storage_write_retries": "Requests of a rank that write to S3 and were sent again.",
    "replaced_samples": "Samples that a rank could not decode, and another took their place.",
    "cache_hits": "Blocks of shards that a rank found in its cache.",
    "cache_misses": "Blocks of shards that a rank fetched into its cache.",
}
"""Each rank's own, since it began: by run, stage and rank. There is none before the first event."""


class Exporter:
    """Sets what a rank exports. Ray sends it from this process to the node's agent, every ten seconds by itself."""

    def __init__(self, *, run: str, stage: str, rank: int) -> None:
        tags = {"run": run, "stage": stage}
        own = tags | {"rank": str(rank)}
        self._gauges = {name: _made(Gauge, name, text, tags) for name, text in GAUGES.items() if rank == 0}
        self._gauges |= {name: _made(Gauge, name, text, own) for name, text in RANK_GAUGES.items()}
        self._counters = {name: _made(Counter, name, text, own) for name, text in COUNTERS.items()}
        self._counted = counters.counted()

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Export what this rank's loop reports, and what was counted in this process since it last did."""
        for name, value in {"step": step, **metrics}.items():
            if gauge := self._gauges.get(name):
                gauge.set(value)
        before, self._counted = self._counted, counters.counted()
        for event, times in (self._counted - before).items():
            self._counters[event].inc(times)


def _made(kind: type[M], name: str, description: str, tags: dict[str, str]) -> M:
    metric = kind(PREFIX + name, description, tuple(tags))
    metric.set_default_tags(tags)
    return metric
