"""Learning-rate range tests: what curves suggest, and a whole test under Ray Train until its loss blows up."""

import json
import math
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from cluster.errors import UserError
from cluster.evaluations import KIND
from sweeps.figures import png
from sweeps.lr_find import Curve, draw, range_test, smoothed, suggest
from sweeps.lr_find_cli import run_lr_find
from tests.trainers.test_loop import vae_model
from trainers.recipe import Fidelity, MSDMRecipe
from trainers.run_folder import RunFolder

STEPS = 100
Loss = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def curve_of(loss: Loss, *, noise: float = 0.0, seed: int = 0, steps: int = STEPS) -> Curve:
    """A curve from 1e-6 to 1 of a loss that is given over log10 of the learning rate."""
    rates = np.geomspace(1e-6, 1, steps)
    losses = loss(np.log10(rates)) * np.exp(noise * np.random.default_rng(seed).standard_normal(steps))
    return Curve.of(zip(rates.tolist(), losses.tolist(), strict=True), steps)


def fall_and_rise(log_rate: NDArray[np.float64]) -> NDArray[np.float64]:
    """Falls from 1 to 0.3, most steeply at 1e-3, and blows up from about 1e-1."""
    return 1 - 0.7 / (1 + np.exp(-4 * (log_rate + 3))) + np.exp(6 * (log_rate + 1))


def test_smoothing_is_a_debiased_moving_average() -> None:
    values = np.random.default_rng(0).standard_normal(50)
    weights = [0.9 ** np.arange(count)[::-1] for count in range(1, 51)]
    expected = [float(w @ values[: len(w)] / w.sum()) for w in weights]
    assert smoothed(values, 10) == pytest.approx(expected, rel=1e-10)
    assert smoothed(values, 1) == pytest.approx(values)  # no memory


def test_a_power_law_is_smoothed_to_itself() -> None:
    """Loss and learning rate lag alike."""
    curve = curve_of(lambda x: 10 ** (-x / 2))
    assert curve.smoothed_losses == pytest.approx(curve.smoothed_learning_rates**-0.5, rel=1e-12)


def test_a_bowl_is_lowest_at_its_optimum() -> None:
    """The loss 1 + u^2 over u decades from the optimum, 1e-2: its logarithm falls most steeply at u = -1."""
    suggestion = suggest(curve_of(lambda x: 1 + (x + 2) ** 2))
    assert math.log10(suggestion.minimum) == pytest.approx(-2, abs=0.4)
    assert suggestion.tenth_of_minimum == pytest.approx(suggestion.minimum / 10)
    assert math.log10(suggestion.learning_rate) == pytest.approx(-3, abs=0.5)


@pytest.mark.parametrize(("noise", "within"), [(0.0, 0.25), (0.1, 0.65)])
def test_the_steepest_descent_is_suggested(noise: float, within: float) -> None:
    found = [suggest(curve_of(fall_and_rise, noise=noise, seed=seed)) for seed in range(20)]
    logs = np.log10([suggestion.learning_rate for suggestion in found])
    assert logs == pytest.approx(-3, abs=within)
    assert np.median(logs) == pytest.approx(-3, abs=0.3)
    assert all(suggestion.learning_rate < suggestion.minimum < 0.05 for suggestion in found)


def test_what_blows_up_takes_no_part() -> None:
    """Losses that are not finite, a fall after the blow-up that is steeper than any before: as if they were not."""
    whole = suggest(curve_of(fall_and_rise))

    def blows_up(log_rate: NDArray[np.float64]) -> NDArray[np.float64]:
        losses = fall_and_rise(log_rate)
        losses[-12:-8] = 1e6
        losses[-8:-4] = 1e-6
        losses[-4:] = math.nan
        return losses

    curve = curve_of(blows_up)
    assert len(curve.losses) == STEPS - 4
    assert curve.has_blown_up
    assert curve.end < STEPS - 11
    assert suggest(curve) == whole
    figure = draw(curve, whole, "blown up")
    assert figure.axes[0].get_ylim()[1] < 4


def test_what_suggests_nothing_is_refused() -> None:
    refused: list[tuple[Loss, float, str]] = [
        (lambda x: np.ones_like(x), 0.0, "does not clearly fall between learning rates 1e-06 and 1"),
        (lambda x: np.ones_like(x), 0.1, "more --steps or a larger global_batch_size"),
        (lambda x: 2 + x / 10, 0.0, "give a lower --lr-min or a larger --lr-max"),
        (lambda x: np.where(x > -5, math.nan, 1.0), 0.0, "only 17 of 100 steps had a finite loss .* lower --lr-min"),
        (lambda x: x * math.nan, 0.0, "only 0 of 100 steps"),
    ]
    for loss, noise, said in refused:
        curve = curve_of(loss, noise=noise)
        with pytest.raises(UserError, match=said):
            suggest(curve)


def test_noise_alone_seldom_suggests_anything() -> None:
    suggested = 0
    for seed in range(200):
        try:
            suggest(curve_of(lambda x: np.ones_like(x), noise=0.2, seed=seed))
            suggested += 1
        except UserError:
            pass
    assert suggested <= 10


def test_a_curve_is_drawn_with_and_without_a_suggestion() -> None:
    curve = curve_of(fall_and_rise, noise=0.05)
    pictures = [png(draw(curve, suggestion, "a curve")) for suggestion in (suggest(curve), None)]
    assert pictures[0] != pictures[1]


def test_the_recipe_of_a_test(recipe: MSDMRecipe, tmp_path: Path) -> None:
    measured = recipe.model_copy(update={"fidelity": Fidelity(every_steps=2)})
    tested = range_test(measured, lr_min=1e-5, lr_max=0.1, steps=40)
    training = tested.denoiser.training  # type: ignore[union-attr]
    assert (training.steps, training.log_every_steps, training.checkpoint_every_steps) == (40, 1, 40)
    assert (training.initial_learning_rate, training.learning_rate) == (1e-5, 0.1)
    assert (training.validate_every_steps, training.ema_decay) == (1, 0), "its loss is of the weights after each step"
    assert (tested.fidelity, tested.tracking.register_as) == (None, None)
    assert tested.vae == recipe.vae  # type: ignore[union-attr]
    assert tested.data == recipe.data
    for rates in ((0.1, 0.1), (0.0, 0.1), (1.0, 0.1)):
        with pytest.raises(UserError, match="from --lr-min to a larger --lr-max, not from"):
            range_test(recipe, lr_min=rates[0], lr_max=rates[1], steps=40)
    with pytest.raises(UserError, match="at least 20 --steps, not 19"):
        range_test(recipe, lr_min=1e-5, lr_max=0.1, steps=19)


@pytest.mark.slow
def test_a_range_test_until_the_loss_blows_up(
    recipe_document: dict[str, Any], tmp_path: Path, tracking_uri: str
) -> None:
    recipe_document["denoiser"]["noise"] = {"prediction_type": "epsilon"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_document))
    autoencoder = RunFolder(str(tmp_path / "runs" / "tested"))  # as if it was trained before the test was cut off
    vae_model(MSDMRecipe.model_validate(recipe_document), autoencoder)
    autoencoder.mark_complete("vae")
    console = Console(file=StringIO(), width=200)
    overrides = ["denoiser.training.global_batch_size=8", "denoiser.training.micro_batch_size=8"]
    found = run_lr_find(str(path), overrides, console, run="tested", lr_min=1e-4, lr_max=1e4, steps=60)

    rates = found.curve.learning_rates
    assert 30 < len(rates) < 60  # from about 10 on, no loss is finite
    assert found.curve.has_blown_up
    assert rates == pytest.approx(np.geomspace(1e-4, 1e4, 60)[: len(rates)], rel=1e-12)
    assert 1e-3 < found.suggestion.learning_rate < found.suggestion.minimum < 1
    folder = tmp_path / "runs" / "tested"
    document = json.loads((folder / "lr-find.json").read_text())
    assert document["suggestion"] == found.suggestion.learning_rate
    assert len(document["losses"]) == len(document["smoothed_losses"]) == len(rates)
    assert min(Image.open(folder / "lr-find.png").size) > 400

    run = MlflowClient().get_run(found.tracker.run_id)
    assert (run.info.status, run.data.tags[KIND]) == ("FINISHED", "lr-find")
    assert run.data.metrics["lr-find/suggestion"] == found.suggestion.learning_rate
    artifacts = {entry.path for entry in MlflowClient().list_artifacts(found.tracker.run_id, "lr-find")}
    assert artifacts == {"lr-find/lr-find.json", "lr-find/lr-find.png"}
    assert not MlflowClient().search_registered_models()
    said = console.file.getvalue()  # type: ignore[attr-defined]
    rate = f"{found.suggestion.learning_rate:.2g}"
    command = f"medsynth train {path} --set {' --set '.join(overrides)} --set denoiser.training.learning_rate={rate}"
    assert said.rstrip().endswith(command)
