"""The learning rate as a pure function of the step."""

import math

from trainers.recipe import Training


def learning_rate_at(step: int, training: Training) -> float:
    """The learning rate of optimizer step `step` (0-based).

    Rises linearly over `warmup_steps` and reaches its full value on the last of them; then stays, or
    falls along a half cosine that would be zero at `steps`.
    """
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    if training.learning_rate_schedule == "constant":
        return training.learning_rate
    progress = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
