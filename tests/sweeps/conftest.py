"""A small sweep as plain data, over the small recipe."""

from pathlib import Path
from typing import Any

import pytest


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
