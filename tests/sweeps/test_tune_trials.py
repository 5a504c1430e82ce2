"""Sweeps on a real Ray cluster whose trials go on from others, and whose trials are judged at their best guidance."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from cluster import runtime, storage
from cluster.registry import RegisteredModel
from cluster.tracking import Tracker
from sweeps import space
from sweeps.guidance_document import GuidanceSweep
from sweeps.journal import Journal
from sweeps.spec import SweepSpec
from sweeps.tune import run_sweep
from tests.sweeps.conftest import in_full
from tests.sweeps.test_tune import RATE, Watcher
from tests.trainers.test_launch import assert_equal, begin_with_vae
from tests.trainers.test_loop import CPU, Reports
from trainers.recipe import MSDMRecipe, load_recipe
from trainers.run_folder import RunFolder
from trainers.worker import train_rank

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with runtime.connect(min_cpus=2):
        yield


def begin_with_shared_vae(spec: SweepSpec, name: str) -> None:
    """Put a barely trained autoencoder where the sweep would train one: that it does is another test's point."""
    recipe = space.recipe_of(spec, {})
    assert isinstance(recipe, MSDMRecipe)
    journal = Journal(storage.join(recipe.cluster.storage, name))
    cluster = recipe.cluster.model_copy(update={"storage": journal.uri})
    begin_with_vae(recipe.model_copy(update={"cluster": cluster}), journal.shared_run)


def weights(run: RunFolder) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(Path(run.model("denoiser"), "unet", "diffusion_pytorch_model.safetensors"))
    return found


def test_a_population_goes_on_from_checkpoints(
    sweep_document: dict[str, Any], tracking_uri: str, tmp_path: Path
) -> None:
    spec = SweepSpec.model_validate(
        in_full(sweep_document, vae=2, denoiser=4)
        | {
            "fixed": {
                "denoiser.training.validate_every_steps": 2,
                "denoiser.training.learning_rate_schedule": "constant",
            },
            "space": {RATE: {"loguniform": [1e-4, 1e-2]}},
            "search": "random",
            "scheduler": {"kind": "pbt", "population": 2, "perturb_steps": 2, "resample_probability": 0},
            "budget": {},
        }
    )
    begin_with_shared_vae(spec, "population-1")
    watcher = Watcher(steps=4)
    swept = run_sweep(spec, "population-1", is_new=True, watch=watcher)
    first, second = swept.trials[:2], swept.trials[2:]
    assert [trial.state for trial in swept.trials] == ["finished"] * 4, watcher.said
    assert [(trial.begin, trial.steps) for trial in swept.trials] == [(0, 2), (0, 2), (2, 4), (2, 4)]
    best, worst = sorted(first, key=lambda trial: trial.value or 0)
    kept, replaced = second[best.number], second[worst.number]
    assert (kept.parent, kept.params) == (best.number, best.params)
    assert replaced.parent == best.number
    assert replaced.params[RATE] / best.params[RATE] in (pytest.approx(0.8), pytest.approx(1.25))

    # Two generations are one training: to the bit, where the rate stayed; and both began with the best's weights.
    run, whole = swept.journal.run_folder, Reports()
    recipe = space.recipe_of(spec, best.params)
    train_rank(recipe, "denoiser", run(best.number), device=CPU, report=whole, resume_from=None)
    averages = {name.removeprefix("ema/"): value for name, value in whole.weights.items() if name.startswith("ema/")}
    assert_equal(weights(run(kept.number)), averages)
    with pytest.raises(AssertionError):
        assert_equal(weights(run(replaced.number)), averages)
    for trial in second:
        assert trial.run_id is not None
        assert [step for step, _ in Tracker(tracking_uri, trial.run_id).metric_history("denoiser/loss")] == [4]

    assert swept.best in second
    text = Path(swept.journal.best_recipe).read_text()
    assert f"#   to step 2: {RATE} {best.params[RATE]}" in text
    kept_recipe = load_recipe(swept.journal.best_recipe)
    assert isinstance(kept_recipe, MSDMRecipe)
    assert kept_recipe.denoiser.training.steps == 4
    assert swept.model_uri == "models:/tiny/1"


def test_every_trial_is_judged_at_its_own_best_guidance(
    sweep_document: dict[str, Any], real_shards: str, extractor: str, tracking_uri: str, tmp_path: Path
) -> None:
    grid = {"guidance_scales": [1, 4], "num_inference_steps": [1], "num_samples": 16, "extractors": [extractor]}
    metric = "guidance/kid_transformers_tiny_vit"
    spec = SweepSpec.model_validate(
        in_full(sweep_document, vae=2, denoiser=2)
        | {
            "fixed": {"data.shards": real_shards},
            "space": {RATE: {"grid": [1e-3]}},
            "search": "grid",
            "objective": {"metric": metric},
            "guidance": grid,
            "budget": {},
        }
    )
    begin_with_shared_vae(spec, "joint-1")
    watcher = Watcher(steps=2)
    swept = run_sweep(spec, "joint-1", is_new=True, watch=watcher)
    assert [trial.state for trial in swept.trials] == ["finished"], watcher.said
    (trial,) = swept.trials
    found = GuidanceSweep.load(swept.journal.guidance(0))
    assert len(found.settings) == 2
    assert trial.value == found.best.measures["kid_transformers_tiny_vit"].value
    assert trial.run_id is not None
    assert Tracker(tracking_uri, trial.run_id).metric_history(metric) == [(2, trial.value)]

    # The setting goes with the model, and into the recipe.
    setting = found.best.setting
    _, version = RegisteredModel.of("models:/tiny@candidate")
    assert version.tags["sampling.guidance_scale"] == str(setting["guidance_scale"])
    recipe = load_recipe(swept.journal.best_recipe)
    assert isinstance(recipe, MSDMRecipe)
    assert recipe.sampling.guidance_scale == setting["guidance_scale"]
    assert (recipe.sampling.num_inference_steps, recipe.sampling.scheduler) == (1, setting["sampler"])
