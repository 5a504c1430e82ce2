import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from trainers.learning_rate import learning_rate_at
from trainers.recipe import Training


def training(schedule: str, **changes: Any) -> Training:
    return Training.model_validate(
        {
            "steps": 110,
            "global_batch_size": 4,
            "micro_batch_size": 4,
            "learning_rate": 2.0,
            "warmup_steps": 10,
            "learning_rate_schedule": schedule,
            **changes,
        }
    )


def test_warmup_rises_linearly_to_the_full_rate() -> None:
    assert [learning_rate_at(step, training("constant")) for step in range(10)] == pytest.approx(
        [0.2 * (step + 1) for step in range(10)]
    )


def test_constant_stays() -> None:
    assert {learning_rate_at(step, training("constant")) for step in range(9, 110)} == {2.0}


def test_cosine_falls_to_nearly_zero() -> None:
    rates = [learning_rate_at(step, training("cosine")) for step in range(10, 110)]
    assert rates == pytest.approx([1 + math.cos(math.pi * i / 100) for i in range(100)])
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(("start", "steps"), [(1e-6, 110), (1e-8, 1000), (1.0, 2)])
def test_exponential_rises_by_a_constant_factor(start: float, steps: int) -> None:
    exponential = training("exponential", initial_learning_rate=start, warmup_steps=0, steps=steps)
    rates = [learning_rate_at(step, exponential) for step in range(steps)]
    assert rates[0] == start
    assert rates[-1] == pytest.approx(2.0, rel=1e-15)
    closed_form = np.exp(np.log(start) + np.arange(steps, dtype=np.float64) * (np.log(2 / start) / (steps - 1)))
    assert rates == pytest.approx(list(closed_form), rel=1e-13)


@pytest.mark.parametrize(
    ("schedule", "changes", "said"),
    [
        ("constant", {"initial_learning_rate": 1.0}, "1 needs learning_rate_schedule exponential, not constant"),
        ("exponential", {}, "an initial_learning_rate below learning_rate 2, not none"),
        ("exponential", {"initial_learning_rate": 2.0}, "an initial_learning_rate below learning_rate 2, not 2"),
        ("exponential", {"initial_learning_rate": 1.0}, "no warm-up: warmup_steps 10"),
    ],
)
def test_a_schedule_has_what_it_needs_and_no_more(schedule: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        training(schedule, **changes)
