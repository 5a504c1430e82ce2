import math

import pytest

from trainers.learning_rate import learning_rate_at
from trainers.recipe import Training


def training(schedule: str) -> Training:
    return Training.model_validate(
        {
            "steps": 110,
            "global_batch_size": 4,
            "micro_batch_size": 4,
            "learning_rate": 2.0,
            "warmup_steps": 10,
            "learning_rate_schedule": schedule,
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
