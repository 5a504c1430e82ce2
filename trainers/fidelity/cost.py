"""What a run took to train, from what MLflow recorded of it."""

import re
from collections.abc import Callable, Mapping, Sequence

from cluster.tracking import find_run
from trainers.fidelity.evaluation import TrainingCost

POWER = re.compile(r"system/.*gpu_\d+_power_usage_watts")
History = Sequence[tuple[int, float]]
"""(step, value) in the order of logging."""


def training_cost(
    stages: Mapping[str, int],
    history: Callable[[str], History],
    *,
    num_workers: int,
    on_gpus: bool,
    power_keys: Sequence[str],
) -> TrainingCost:
    """Device-hours of the training steps themselves: without validation, previews, checkpoints and pauses.

    Args:
        stages: global batch size of each stage.
        history: of a metric's name; `STAGE/images_per_second` is the mean since its last value.
        power_keys: metrics in watts, one for each device that was watched; energy is their means' sum times the hours.
    """
    seconds = 0.0
    for stage, global_batch_size in stages.items():
        before = 0
        for step, images_per_second in sorted(dict(history(f"{stage}/images_per_second")).items()):
            seconds += (step - before) * global_batch_size / images_per_second
            before = step
    if not seconds:
        return TrainingCost()
    watts = [[value for _, value in history(key)] for key in power_keys]
    energy = sum(sum(values) / len(values) for values in watts if values) * seconds / 3.6e6
    return TrainingCost(
        gpu_hours=seconds / 3600 * num_workers,
        device="GPU" if on_gpus else "CPU process",
        energy_kwh=energy or None,
    )


def cost_of_run(run_id: str | None) -> TrainingCost:
    """The cost of a training run; empty if it is not known here."""
    run = find_run(run_id) if run_id else None
    if run is None:
        return TrainingCost()
    params = run.params()
    batch = ".training.global_batch_size"
    return training_cost(
        {key.removesuffix(batch): int(value) for key, value in params.items() if key.endswith(batch)},
        run.metric_history,
        num_workers=int(params.get("cluster.num_workers", 1)),
        on_gpus=params.get("cluster.use_gpu") == "True",
        power_keys=[name for name in run.last_metrics() if POWER.fullmatch(name)],
    )
