"""Population-based training (Jaderberg et al. 2017, arXiv 1711.09846), as functions of the trials so far.

Trial number n is member n mod P of generation n div P. A generation begins when all of the one before have ended, so
who goes on from whom is settled by the journal alone, and a sweep that was killed goes on as if it had not been.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from data_shards import derive_seed
from sweeps.spec import PBT, Axis, SweepSpec, Trial

CHANGEABLE = ("training.learning_rate", "training.max_grad_norm", "training.ema_decay", "caption_dropout")
"""Keys of a stage that a checkpoint goes on with other values of. Others are part of its weights or its optimizer's
state, or change what the loss means."""


def num_generations(pbt: PBT, steps: int) -> int:
    """How many it takes to train `steps`."""
    return -(-steps // pbt.perturb_steps)


def steps_of(pbt: PBT, number: int, steps: int) -> tuple[int, int]:
    """The steps that a trial begins and ends at, of `steps` altogether."""
    generation = number // pbt.population
    return generation * pbt.perturb_steps, min(steps, (generation + 1) * pbt.perturb_steps)


def last_generation(pbt: PBT, trials: Sequence[Trial]) -> Sequence[Trial]:
    """The trials that the next one has to do with: all of the generation before its own; empty in the first."""
    begin = (len(trials) // pbt.population - 1) * pbt.population
    return trials[begin : begin + pbt.population] if begin >= 0 else ()


def next_member(spec: SweepSpec, pbt: PBT, trials: Sequence[Trial]) -> tuple[dict[str, Any], int]:
    """Values of the next trial, which is not of the first generation, and the number of the one it goes on from.

    Raises ValueError if none of the generation before was trained to its end.
    """
    before = last_generation(pbt, trials)
    own = before[len(trials) % pbt.population]
    sign = 1 if spec.objective.mode == "min" else -1
    ended = [trial for trial in before if trial.state == "finished" and trial.value is not None]
    ranked = sorted(ended, key=lambda trial: sign * (trial.value or 0))
    if not ranked:
        raise ValueError("no trial of the generation before was trained to its end")
    best, rest = ranked[: pbt.num_replaced], ranked[pbt.num_replaced :]
    num_failed = len(before) - len(ranked)
    num_worst = max(0, pbt.num_replaced - num_failed)
    worst = rest[max(0, len(rest) - num_worst) :]
    if own in ended and own not in worst:
        return dict(own.params), own.number
    rng = random.Random(derive_seed(spec.seed, "population", len(trials)))
    parent = rng.choice(best)
    return {key: _perturbed(pbt, spec.space[key], value, rng) for key, value in parent.params.items()}, parent.number


def misfits(space: Mapping[str, Axis], stage: str) -> list[str]:
    """Keys of the space that no checkpoint of the stage can go on with other values of."""
    return [key for key in space if key not in {f"{stage}.{name}" for name in CHANGEABLE}]


def _perturbed(pbt: PBT, axis: Axis, value: Any, rng: random.Random) -> Any:
    if rng.random() < pbt.resample_probability:
        return _drawn(axis, rng)
    if axis.choice:
        place = axis.choice.index(value) + rng.choice((-1, 1))
        return axis.choice[min(max(place, 0), len(axis.choice) - 1)]
    low, high = axis.extremes
    return min(max(value * rng.choice(pbt.factors), low), high)


def _drawn(axis: Axis, rng: random.Random) -> Any:
    if axis.choice:
        return rng.choice(axis.choice)
    low, high = axis.extremes
    return low * (high / low) ** rng.random() if axis.loguniform else rng.uniform(low, high)
