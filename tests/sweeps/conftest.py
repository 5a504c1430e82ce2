"""A small sweep as plain data; a tiny model, real images and an extractor, as evaluations have them."""

from pathlib import Path
from typing import Any

import pytest

from tests.trainers.conftest import pipeline
from tests.trainers.test_evaluate import extractor, real_shards

__all__ = ["extractor", "pipeline", "real_shards", "sweep_document"]


@pytest.fixture
def sweep_document(recipe_file: Path) -> dict[str, Any]:
    return {
        "name": "rates",
        "recipe": str(recipe_file),
        "fixed": {"denoiser.training.validate_every_steps": 2},
        "space": {"denoiser.training.learning_rate": {"loguniform": [1e-4, 1e-2]}},
        "objective": {"metric": "denoiser/validation_loss"},
        "budget": {"trials": 4},
    }
