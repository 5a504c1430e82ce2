"""The learning rate as a pure function of the step."""

import math

from trainers.recipe import Training


def learning_rate_at(step: int, training: Training) -> float:
    """The learning rate of optimizer step `step` (0-based).

    Rises linearly over `warmup_steps` and reaches its full value on the last of them; then stays, or
    falls along a half cosine that would be zero at `steps`. Or rises by the same factor at each step, from its initial
    value on the first to its full one on the last.
    """
    if training.initial_learning_rate is not None:
        rise = training.learning_rate / training.initial_learning_rate
        return training.initial_learning_rate * float(rise ** (step / max(1, training.steps - 1)))
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    if training.learning_rate_schedule == "constant":
        return training.learning_rate
    progress = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
