"""What a killed sweep finds again."""

from pathlib import Path
from typing import Any

import pytest

from cluster.errors import UserError
from sweeps.journal import Journal
from sweeps.spec import Budget, SweepSpec, Trial
from trainers.recipe import MSDMRecipe, load_recipe


def test_trials_are_read_as_they_were_written(tmp_path: Path, recipe: MSDMRecipe) -> None:
    journal = Journal(f"{tmp_path}/rates-1")
    assert journal.trials() == []
    running = Trial(1, "running", {"a.b": 1e-5, "a.c": "cosine", "a.d": [1, 2]}, 0.25, 4, 1.5, "run", {2: 0.5, 4: 0.25})
    ended = Trial(0, "failed", {"a.b": 1}, None, 0, 0.0, None)
    journal.write(Trial(1, "running", running.params, None, 0, 0.0, None))
    journal.write(running)
    journal.write(ended)
    journal.write_recipe(1, recipe)
    assert journal.trials() == [ended, running]
    assert load_recipe(journal.recipe(1)) == recipe
    assert journal.run_name(1) == "rates-1-001"
    assert journal.run_folder(1).uri == f"{tmp_path}/rates-1/rates-1-001"


def test_a_sweep_goes_on_only_as_it_began(tmp_path: Path, recipe: MSDMRecipe, sweep_document: dict[str, Any]) -> None:
    journal, spec = Journal(f"{tmp_path}/rates"), SweepSpec.model_validate(sweep_document)
    assert journal.previous(spec, recipe) is None
    mlflow_run = {"run_id": "1", "tracking_uri": "http://somewhere"}
    journal.begin(spec, recipe, mlflow_run)
    larger = spec.model_copy(update={"budget": Budget(trials=9), "concurrency": 1})
    assert journal.previous(larger, recipe) == mlflow_run
    with pytest.raises(UserError, match="begun with another specification; seed differ"):
        journal.previous(spec.model_copy(update={"seed": 1}), recipe)
    with pytest.raises(UserError, match="begun with another recipe; seed differ"):
        journal.previous(spec, recipe.model_copy(update={"seed": 1}))
