"""A run's figures for Ray's metrics exporter, where Prometheus reads them. One of the two that import Ray here.

What is exported is named below and nowhere else: Ray puts `ray_` before each name, and `_total` behind a counter's.
Nothing raises here: a figure that cannot be exported is no reason to end a training.
"""

import logging
import string
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar
from urllib.parse import quote

from ray.util.metrics import Counter, Gauge

from cluster import counters
from cluster.errors import first_line

logger = logging.getLogger(__name__)

M = TypeVar("M", Gauge, Counter)

PREFIX = "medsynth_"

GAUGES = {
    "step": "Finished steps of the stage.",
    "loss": "Mean loss of the steps since the report before.",
    "validation_loss": "Mean loss of the averaged weights over the validation split.",
    "images_per_second": "Images that all ranks together trained on in a second, since the report before.",
    "teraflops_per_second": "Model FLOPs of a rank's passes in a second, in 10^12, since the report before.",
    "mfu": "Model FLOP utilisation: share of the device's highest rate that a rank's passes reach.",
    "grad_norm": "Norm of the gradient before it is clipped, of the last step.",
    "learning_rate": "Learning rate of the last step.",
    "world_size": "Ranks that train.",
    "skipped_steps": "Steps without an update since the report before: loss or gradient was not finite.",
}
"""Equal on all ranks, or rank 0's for all: by run and stage, under the loop's own names."""

RANK_GAUGES = {
    "data_wait_fraction": "Share of its steps' time that a rank waited for data, since the report before.",
    "data_seconds": "Seconds of a step that a rank waited for data, mean since the report before.",
    "forward_seconds": "Seconds of a step that a rank's forward passes took, mean since the report before.",
    "backward_seconds": "Seconds of a step that a rank's backward passes took, mean since the report before.",
    "optimizer_seconds": "Seconds of a step that a rank's update of the weights took, mean since the report before.",
    "stall_seconds": "Seconds of a step that checkpoints and reports held a rank up, mean since the report before.",
}
"""Each rank's own: by run, stage and rank."""

RUN_GAUGES = {
    "checkpoint_timestamp_seconds": "Unix time when the last checkpoint was whole in storage; until then, the start's.",
    "restarts": "Times that ranks of the stage have failed and were started again, of cluster.max_failures.",
    "reports_waiting": "Reports that wait in the run's folder because MLflow does not take them.",
}
"""The run's own, which MLflow does not have: by run and stage. The first is rank 0's, the others the controller's."""

COUNTERS: dict[counters.Event, str] = {
    "storage_read_retries": "Requests of a rank that read from S3 and were sent again.",
    "storage_write_retries": "Requests of a rank that write to S3 and were sent again.",
    "replaced_samples": "Samples that a rank could not decode and replaced by another.",
    "cache_hits": "Blocks of shards that a rank found in its cache.",
    "cache_misses": "Blocks of shards that a rank fetched into its cache.",
}
"""Each rank's own, since it began: by run, stage and rank. There is none before the first event."""


class Exporter:
    """Sets what one process exports. Ray sends it from there to the node's agent, every ten seconds by itself."""

    def __init__(self, *, run: str, stage: str, gauges: Mapping[str, str]) -> None:
        self._has_warned = False
        self._tags = {"run": _label(run), "stage": _label(stage)}
        self._gauges: dict[str, Gauge] = {}
        self._make(gauges, self._tags)

    def set(self, name: str, value: float) -> None:
        """Export a gauge's value, if this process exports that gauge."""
        if gauge := self._gauges.get(name):
            with self._harmless():
                gauge.set(value)

    def _make(self, gauges: Mapping[str, str], tags: Mapping[str, str]) -> None:
        for name, text in gauges.items():
            with self._harmless():
                self._gauges[name] = _made(Gauge, name, text, tags)

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """Whatever Ray raises is told once, and ends nothing."""
        try:
            yield
        except Exception as error:
            if not self._has_warned:
                self._has_warned = True
                logger.warning("some figures are not exported to Prometheus: %s", first_line(error))


class RankExporter(Exporter):
    """What a rank exports: its own figures, and of rank 0 those of the run."""

    def __init__(self, *, run: str, stage: str, rank: int) -> None:
        super().__init__(run=run, stage=stage, gauges=GAUGES if rank == 0 else {})
        if rank == 0:
            self._make({name: RUN_GAUGES[name] for name in ("checkpoint_timestamp_seconds",)}, self._tags)
        own = self._tags | {"rank": str(rank)}
        self._make(RANK_GAUGES, own)
        self._counters: dict[counters.Event, Counter] = {}
        for name, text in COUNTERS.items():
            with self._harmless():
                self._counters[name] = _made(Counter, name, text, own)
        self._counted = counters.counted()
        self._checkpointed = time.time()

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Export what this rank's loop reports, and what was counted in this process since it last did."""
        # Ray's agent forgets a gauge that is not set again, so this one is set although it has not changed.
        for name, value in {"step": step, **metrics, "checkpoint_timestamp_seconds": self._checkpointed}.items():
            self.set(name, value)
        before, self._counted = self._counted, counters.counted()
        for event, times in (self._counted - before).items():
            if counter := self._counters.get(event):
                with self._harmless():
                    counter.inc(times)

    def checkpointed(self) -> None:
        """A checkpoint is whole in storage now: the next report exports that."""
        self._checkpointed = time.time()


def controller_exporter(*, run: str, stage: str) -> Exporter:
    """What the controller of a stage exports."""
    return Exporter(run=run, stage=stage, gauges={name: RUN_GAUGES[name] for name in ("restarts", "reports_waiting")})


def _label(text: str) -> str:
    """The text in ASCII, for Ray's labels hold nothing else: other characters are percent-encoded, as is "%"."""
    return quote(text, safe=string.punctuation.replace("%", "") + " ")


def _made(kind: type[M], name: str, description: str, tags: Mapping[str, str]) -> M:
    metric = kind(PREFIX + name, description, tuple(tags))
    metric.set_default_tags(dict(tags))
    return metric
