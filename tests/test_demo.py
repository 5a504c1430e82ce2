"""The demo's estimate of its own time, and the options that it names."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from trainers.recipe import MSDMRecipe, load_recipe

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def demo_time() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_time", ROOT / "docs/demo_time.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_estimate_follows_the_processor_and_its_load(demo_time: ModuleType) -> None:
    step = demo_time.PROBE_SECONDS
    assert demo_time.estimate_minutes(step, cores=2, load=0.0) == pytest.approx(9.5)  # as it was timed
    assert demo_time.estimate_minutes(step, cores=16, load=3.0) == pytest.approx(9.5)  # it has two processes
    assert demo_time.estimate_minutes(step, cores=2, load=2.0) == pytest.approx(19)
    assert demo_time.estimate_minutes(2 * step, cores=2, load=0.0) == pytest.approx(16.5)
    assert 0 < demo_time.step_seconds(budget_seconds=0.05) < 10


def test_the_options_that_it_names_are_of_the_recipe(demo_time: ModuleType) -> None:
    recipe = str(ROOT / "recipes/msdm-demo.yaml")
    whole = load_recipe(recipe)
    halved, bf16 = (
        load_recipe(recipe, [word for word in options.split() if word != "--set"])
        for options in (demo_time.FEWER_STEPS, demo_time.IN_BF16)
    )
    assert isinstance(whole, MSDMRecipe)
    assert isinstance(halved, MSDMRecipe)
    assert isinstance(bf16, MSDMRecipe)
    for stage in ("vae", "denoiser"):
        assert getattr(halved, stage).training.steps * 2 == getattr(whole, stage).training.steps
        assert getattr(bf16, stage).training.precision == "bf16"
