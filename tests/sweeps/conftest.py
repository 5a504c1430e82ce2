"""A small sweep as plain data; a tiny model, real images and an extractor, as evaluations have them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.trainers.conftest import pipeline
from tests.trainers.test_evaluate import extractor, real_shards

__all__ = ["extractor", "in_full", "pipeline", "real_shards", "sweep_document"]


def in_full(sweep_document: dict[str, Any], **steps: int) -> dict[str, Any]:
    """The sweep with a recipe whose file itself says so many steps of each stage: its best model is registered."""
    path = Path(sweep_document["recipe"])
    recipe = yaml.safe_load(path.read_text())
    for stage, count in steps.items():
        recipe[stage]["training"]["steps"] = count
    path.write_text(yaml.safe_dump(recipe))
    return sweep_document


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
