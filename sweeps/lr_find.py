"""How large a learning rate a recipe bears: a range test (Smith 2017, "Cyclical Learning Rates for Training Neural
Networks", arXiv 1506.01186), the rate rising exponentially, as fastai has it.

The recipe's last stage is trained for some steps, each with a larger rate than the one before, until the loss blows
up. The loss that is watched is that of a few validation samples with their own noise, the same after each step: that
of the batches depends more on the timesteps that they drew than on the learning rate. It is a run like any other, on
as many workers and recorded in MLflow, but its model is of no use.

RUN/lr-find.json, RUN/lr-find.png    what was found, beside what any run's folder holds
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter
from numpy.typing import NDArray

from cluster import storage
from cluster.errors import UserError
from cluster.evaluations import KIND
from cluster.tracking import Tracker, default_tracking_uri
from sweeps.figures import png
from trainers.families import family_of
from trainers.launch import Progress, RunStopped, train_recipe
from trainers.loop import DivergedError
from trainers.recipe import Recipe, at_absolute_paths
from trainers.run_folder import RunFolder

DOCUMENT, PICTURE = "lr-find.json", "lr-find.png"
KIND_OF_RUN = "lr-find"
VALIDATION_SAMPLES = 64
WATCHED = ("learning_rate", "loss", "validation_loss")  # of each step
MIN_STEPS, MIN_POINTS = 20, 10  # asked for; that a suggestion is made from
BLOWN_UP = 4.0  # times the lowest smoothed loss, as in fastai
CLEAR = 6.0  # standard deviations of the smoothed log loss; by noise alone, one test in twenty falls by more
RAW, SMOOTHED, SUGGESTED, LOWEST = "#9aa7b1", "#2c5f8a", "#c0392b", "#555555"

RULE = (
    "the learning rate at which the smoothed loss falls most steeply before its minimum, both on logarithmic scales; "
    "slopes are over a fifth of the test; its first tenth does not count, nor what follows a loss of 4 times the lowest"
)


@dataclass(frozen=True)
class Curve:
    """The loss over the learning rate, as it was and smoothed; steps whose loss was not finite are left out."""

    steps: int  # that the test was to have; there may be fewer points
    learning_rates: NDArray[np.float64]
    losses: NDArray[np.float64]

    @classmethod
    def of(cls, points: Iterable[tuple[float, float]], steps: int) -> "Curve":
        """From (learning rate, loss) of each step."""
        finite = [point for point in points if math.isfinite(point[1])]
        rates, losses = np.array(finite, dtype=np.float64).reshape(-1, 2).T
        return cls(steps, rates, losses)

    @property
    def time_constant(self) -> float:
        """Of the smoothing, in steps: a tenth of the test."""
        return max(1.0, self.steps / 10)

    @property
    def smoothed_losses(self) -> NDArray[np.float64]:
        """Geometric means: which timesteps a batch drew scales its loss, and one outlier must not shape the curve."""
        return np.exp(smoothed(np.log(self.losses), self.time_constant))

    @property
    def smoothed_learning_rates(self) -> NDArray[np.float64]:
        """Where the smoothed losses belong: an average lags, so the same one is taken of the learning rates."""
        return np.exp(smoothed(np.log(self.learning_rates), self.time_constant))

    @property
    def first(self) -> int:
        """The point that counts first; before it, the average is of too few."""
        return self.steps // 10

    @property
    def end(self) -> int:
        """How many points there are before the loss blew up."""
        counted = self.smoothed_losses[self.first :]
        blown_up = np.flatnonzero(counted > BLOWN_UP * np.minimum.accumulate(counted))
        return self.first + int(blown_up[0]) if len(blown_up) else len(self.losses)

    @property
    def has_blown_up(self) -> bool:
        return self.end < len(self.losses)


@dataclass(frozen=True)
class Suggestion:
    """What a curve says of the learning rate."""

    learning_rate: float  # by RULE
    minimum: float  # where the smoothed loss is lowest: too large, as the loss is about to rise

    @property
    def tenth_of_minimum(self) -> float:
        """The other rule in use, of fastai: a tenth of the rate where the loss is lowest."""
        return self.minimum / 10


@dataclass(frozen=True)
class Found:
    """Where an ended range test's results are."""

    stage: str
    suggestion: Suggestion
    curve: Curve
    folder: RunFolder
    tracker: Tracker

    @property
    def picture(self) -> str:
        return storage.join(self.folder.uri, PICTURE)


def find_learning_rate(
    recipe: Recipe,
    name: str,
    *,
    lr_min: float,
    lr_max: float,
    steps: int,
    on_progress: Callable[[Progress], None],
    on_stop_requested: Callable[[], None],
    on_starting: Callable[[str], None] = lambda what: None,
) -> Found:
    """Train the recipe's last stage with learning rates from `lr_min` to `lr_max` and suggest one: see RULE.

    Earlier stages are trained first, as the recipe says. The test ends early where the loss has blown up, or is not
    finite any more. A test that was stopped goes on under its name.

    Raises UserError where the curve suggests nothing (it is drawn even so) and, as `train_recipe` does, for what the
    user can mend; RunStopped when it was interrupted.
    """
    recipe = at_absolute_paths(range_test(recipe, lr_min=lr_min, lr_max=lr_max, steps=steps))
    stage, run = family_of(recipe).STAGES[-1], RunFolder.of(recipe, name)
    seen: dict[int, tuple[float, float]] = {}
    has_blown_up = False

    def watch(progress: Progress) -> None:
        nonlocal has_blown_up
        if progress.stage == stage and "loss" in progress.metrics:
            seen[progress.step] = (progress.metrics["learning_rate"], _loss_of(progress.metrics))
            if not has_blown_up and Curve.of(seen.values(), steps).has_blown_up:
                has_blown_up = True
                run.request_stop()
        on_progress(progress)

    try:
        train_recipe(
            recipe,
            name,
            on_progress=watch,
            on_stop_requested=on_stop_requested,
            on_starting=on_starting,
            tags={KIND: KIND_OF_RUN},
        )
    except RunStopped:
        if not has_blown_up:
            raise
    except DivergedError:  # the end to be expected, unless it is an earlier stage's
        if not seen:
            raise
    run.clear_stop()
    return _conclude(recipe, stage, run, steps)


def _loss_of(metrics: Mapping[str, float]) -> float:
    """A step's validation loss; not finite if the step was not, for then the weights are those before it."""
    return metrics["validation_loss"] if math.isfinite(metrics["loss"]) else metrics["loss"]


def range_test(recipe: Recipe, *, lr_min: float, lr_max: float, steps: int) -> Recipe:
    """The recipe with its last stage as the test trains it: one report a step, of the weights themselves.

    Raises UserError if the learning rates or the steps make no test.
    """
    if not 0 < lr_min < lr_max:
        raise UserError(f"a range test rises from --lr-min to a larger --lr-max, not from {lr_min:g} to {lr_max:g}")
    if steps < MIN_STEPS:
        raise UserError(f"a range test needs at least {MIN_STEPS} --steps, not {steps}")
    document = recipe.model_dump() | {"fidelity": None}
    document["tracking"]["register_as"] = None
    document[family_of(recipe).STAGES[-1]]["training"] |= {
        "steps": steps,
        "learning_rate": lr_max,
        "learning_rate_schedule": "exponential",
        "initial_learning_rate": lr_min,
        "warmup_steps": 0,
        "log_every_steps": 1,
        "validate_every_steps": 1,
        "validation_samples": VALIDATION_SAMPLES,
        "ema_decay": 0.0,
        "preview_every_steps": steps,
        "checkpoint_every_steps": steps,
    }
    return type(recipe).model_validate(document)


def smoothed(values: NDArray[np.float64], time_constant: float) -> NDArray[np.float64]:
    """Exponential moving average of `values`, debiased as Adam's moments are (Kingma & Ba 2015, section 3)."""
    decay, average = 1 - 1 / time_constant, 0.0
    averages: list[float] = []
    for count, value in enumerate(values, start=1):
        average = decay * average + (1 - decay) * float(value)
        averages.append(average / (1 - decay**count))
    return np.array(averages)


def suggest(curve: Curve) -> Suggestion:
    """The learning rate by RULE. Raises UserError if the loss does not clearly fall, or there are too few points."""
    losses, rates, first, end = curve.smoothed_losses, curve.smoothed_learning_rates, curve.first, curve.end
    if end - first < MIN_POINTS:
        raise UserError(
            f"only {end} of {curve.steps} steps had a finite loss before it blew up, the first {first} of no account: "
            "give more --steps, or a lower --lr-min and --lr-max"
        )
    lowest = first + int(losses[first:end].argmin())
    before = slice(first, lowest + 1)
    # An average over a time constant T has 1 / (2 T - 1) of the variance of what it averages.
    spread = float(np.log(curve.losses / losses)[before].std()) / math.sqrt(2 * curve.time_constant - 1)
    fall, clear_fall = float(losses[before].max() / losses[lowest]), math.exp(CLEAR * spread)
    half = max(1, curve.steps // 10)
    starts = np.arange(first, min(lowest - half + 1, len(losses) - 2 * half))
    if not len(starts) or fall <= clear_fall:
        raise UserError(
            f"the loss does not clearly fall between learning rates {curve.learning_rates[0]:.2g} and "
            f"{curve.learning_rates[-1]:.2g} (by a factor of {fall:.3g}; noise alone may show {clear_fall:.3g}): "
            "give a lower --lr-min or a larger --lr-max, or, against noise, more --steps or a larger global_batch_size"
        )
    slopes = np.log(losses[starts + 2 * half] / losses[starts]) / np.log(rates[starts + 2 * half] / rates[starts])
    steepest = int(starts[slopes.argmin()]) + half
    return Suggestion(learning_rate=float(rates[steepest]), minimum=float(rates[lowest]))


def draw(curve: Curve, suggestion: Suggestion | None, title: str) -> Figure:
    """The loss over the learning rate, cut off where a loss that blew up would flatten all before it."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    rates, losses, end = curve.smoothed_learning_rates, curve.smoothed_losses, curve.end
    axes.plot(curve.learning_rates, curve.losses, color=RAW, linewidth=0.9, alpha=0.6, label="loss")
    axes.plot(rates, losses, color=SMOOTHED, linewidth=2.4, label="smoothed")
    axes.set_xscale("log")
    axes.set_xlim(curve.learning_rates[0], curve.learning_rates[-1])
    axes.set_yscale("log")
    axes.yaxis.set(major_locator=MaxNLocator(6), major_formatter=ScalarFormatter(), minor_locator=NullLocator())
    lowest = int(losses[:end].argmin())
    high = 1.3 * curve.losses[: lowest + 1].max()
    axes.set_ylim(curve.losses[:end].min() / 1.1, high)
    if suggestion:
        for name, rate, line in (
            ("lowest", suggestion.minimum, "--"),
            ("lowest / 10", suggestion.tenth_of_minimum, ":"),
        ):
            axes.axvline(rate, color=LOWEST, linewidth=1, linestyle=line, label=f"{name}: {rate:.2g}")
        rate = suggestion.learning_rate
        axes.axvline(rate, color=SUGGESTED, linewidth=1.6)
        axes.plot([rate], [np.interp(rate, rates, losses)], color=SUGGESTED, marker="o", markersize=9, zorder=3)
        axes.annotate(
            f"suggested: {rate:.2g}",
            (rate, high),
            xytext=(6, -18),
            textcoords="offset points",
            color=SUGGESTED,
            weight="bold",
            size=10,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.9, "pad": 1},
        )
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss")
    axes.set_title(title, size=10, loc="left")
    axes.grid(alpha=0.2)
    figure.legend(fontsize=8, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _conclude(recipe: Recipe, stage: str, run: RunFolder, steps: int) -> Found:
    """Read what the run logged, say what it suggests, and keep that beside the run and in MLflow."""
    known = run.mlflow_run()
    assert known is not None, "training begins with it"
    tracker = Tracker(default_tracking_uri(), known["run_id"])
    told = {name: dict(tracker.metric_history(f"{stage}/{name}")) for name in WATCHED}
    of_steps = [{name: told[name][step] for name in WATCHED} for step in sorted(told["validation_loss"])]
    curve = Curve.of([(metrics["learning_rate"], _loss_of(metrics)) for metrics in of_steps], steps)
    samples = family_of(recipe).training_of(recipe, stage).global_batch_size
    title = f"{recipe.name}, {stage}: learning-rate range test, {steps} steps of {samples} samples, validation loss"
    try:
        suggestion = suggest(curve)
    except UserError as error:
        if not len(curve.losses):
            raise
        _keep(run, tracker, {PICTURE: png(draw(curve, None, title))})
        raise UserError(f"{error}. The curve: {storage.join(run.uri, PICTURE)}") from None
    document = {
        "stage": stage,
        "suggestion": suggestion.learning_rate,
        "rule": RULE,
        "minimum": suggestion.minimum,
        "tenth_of_minimum": suggestion.tenth_of_minimum,
        "steps": steps,
        "learning_rates": curve.learning_rates.tolist(),
        "losses": curve.losses.tolist(),
        "smoothed_learning_rates": curve.smoothed_learning_rates.tolist(),
        "smoothed_losses": curve.smoothed_losses.tolist(),
    }
    _keep(
        run,
        tracker,
        {DOCUMENT: json.dumps(document, indent=1).encode(), PICTURE: png(draw(curve, suggestion, title))},
    )
    tracker.log_metrics(
        {"lr-find/suggestion": suggestion.learning_rate, "lr-find/tenth_of_minimum": suggestion.tenth_of_minimum}, steps
    )
    tracker.finish("FINISHED")  # also where the loss blew up, as it was to do
    return Found(stage, suggestion, curve, run, tracker)


def _keep(run: RunFolder, tracker: Tracker, files: Mapping[str, bytes]) -> None:
    with TemporaryDirectory() as temporary:
        for name, data in files.items():
            storage.write_bytes(storage.join(run.uri, name), data)
            (Path(temporary) / name).write_bytes(data)
        tracker.log_folder(Path(temporary), KIND_OF_RUN)
