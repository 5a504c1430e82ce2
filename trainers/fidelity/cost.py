"""What a run took to train, from what MLflow recorded of it."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence

from cluster.errors import UserError
from cluster.tracking import default_tracking_uri, explained, find_run
from trainers.fidelity.evaluation import TrainingCost

logger = logging.getLogger(__name__)

POWER = re.compile(r"system/.*gpu_\d+_power_usage_watts")
History = Sequence[tuple[int, float]]
"""(step, value) in the order of logging."""


def training_cost(
    stages: Mapping[str, int],
    history: Callable[[str], History],
    *,
    num_ranks: int,
    device: str,
    power_keys: Sequence[str],
) -> TrainingCost:
    """Device-hours of the training steps themselves: without validation, previews, checkpoints and pauses.

    Args:
        stages: global batch size of each stage.
        history: of a metric's name; `STAGE/images_per_second` is the mean since its last value.
        num_ranks: where `STAGE/world_size` does not tell, as runs of before it do not.
        device: what each rank trained on.
        power_keys: metrics in watts, one for each GPU that was watched; energy is their means' sum times the hours.
    """
    seconds = device_seconds = 0.0
    for stage, global_batch_size in stages.items():
        before, world_sizes = 0, dict(history(f"{stage}/world_size"))
        for step, images_per_second in sorted(dict(history(f"{stage}/images_per_second")).items()):
            took = (step - before) * global_batch_size / images_per_second
            seconds += took
            device_seconds += took * world_sizes.get(step, num_ranks)
            before = step
    if not seconds:
        return TrainingCost()
    watts = [[value for _, value in history(key)] for key in power_keys]
    energy = sum(sum(values) / len(values) for values in watts if values) * seconds / 3.6e6
    return TrainingCost(
        gpu_hours=device_seconds / 3600,
        device=device,
        energy_kwh=energy or None,
    )


def cost_of_run(run_id: str | None) -> TrainingCost:
    """The cost of a training run; empty if it is not known here, or, with a warning, if MLflow does not tell.

    Of a run that was resumed on other devices, it is what it would be with those it began with: MLflow has no others.
    Energy is that of every GPU of the nodes it ran on, for NVML sees them all: on a node that it shared, also of GPUs
    that others used.
    """
    if not run_id:
        return TrainingCost()
    try:
        with explained(default_tracking_uri(), f"run {run_id}"):
            return _recorded_cost(run_id)
    except UserError as error:
        logger.warning("the cost of training is left out: %s", error)
        return TrainingCost()


def _recorded_cost(run_id: str) -> TrainingCost:
    run = find_run(run_id)
    if run is None:
        return TrainingCost()
    params = run.params()
    batch = ".training.global_batch_size"
    # Runs of before the tag say no more than this.
    unnamed = "GPU" if params.get("cluster.use_gpu") == "True" else "CPU process"
    return training_cost(
        {key.removesuffix(batch): int(value) for key, value in params.items() if key.endswith(batch)},
        run.metric_history,
        num_ranks=max(map(int, re.findall(r"\d+", params.get("cluster.num_workers", "1")))),
        device=run.client.get_run(run_id).data.tags.get("device", unnamed),
        power_keys=[name for name in run.last_metrics() if POWER.fullmatch(name)],
    )
