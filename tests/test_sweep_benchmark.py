from pathlib import Path
from typing import Any

import pytest

from benchmarks.sweep_trials import RATE, WARMUP, beside_grid, small_recipe, spec_of, steps_until, workplace
from sweeps.space import check, grid_points, num_trials
from sweeps.spec import ASHA
from trainers.recipe import dump_recipe

TRIALS: list[dict[str, Any]] = [
    {"state": "stopped", "value": 0.09, "steps": 20},  # not trained to its end: its loss does not count
    {"state": "finished", "value": 0.13, "steps": 180},
    {"state": "failed", "value": None, "steps": 40},
    {"state": "finished", "value": 0.102, "steps": 180},
]


def test_steps_until_a_loss_count_all_trials_before_it() -> None:
    assert steps_until(TRIALS, 0.15) == 200
    assert steps_until(TRIALS, 0.11) == 420
    assert steps_until(TRIALS, 0.1) is None


def test_sweeps_are_held_beside_the_grid() -> None:
    grid = {"steps": 400, "best": {"value": 0.1}, "trials": []}
    found = beside_grid([grid, {"steps": 100, "best": {"value": 0.102}, "trials": TRIALS}])
    assert [row["steps_beside_grid"] for row in found] == [1, 0.25]
    assert found[1]["loss_beside_grid"] == pytest.approx(1.02)
    assert found[1]["steps_until_near"] == 420


def test_the_searches_fit_the_small_recipe(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, steps=180, vae_steps=300)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    every = recipe.denoiser.training.validate_every_steps
    grid, random, asha = (spec_of(method, path, seed=3) for method in ("grid", "random", "asha-tpe"))
    for spec in (grid, random, asha):
        check(spec)  # every corner is a recipe, and its loss is known when it is judged
    points = grid_points(grid)
    assert len(points) == 18
    assert points[0] == {RATE: pytest.approx(1e-4), WARMUP: 0}
    assert points[-1] == {RATE: pytest.approx(1e-2), WARMUP: 50}
    assert [num_trials(spec) for spec in (random, asha)] == [12, 12]
    assert random.scheduler is None
    assert isinstance(asha.scheduler, ASHA)
    assert asha.scheduler.grace_steps % every == 0


def test_a_folder_goes_on_only_as_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "HF_HUB_OFFLINE", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "")  # it is put back afterwards
    with workplace(tmp_path, {"steps": 180}):
        pass
    with workplace(tmp_path, {"steps": 180}) as folder:
        assert folder == tmp_path
    with pytest.raises(SystemExit, match="other options"), workplace(tmp_path, {"steps": 60}):
        pass
