"""`medsynth sweep --lr-find`: a learning-rate range test of a recipe, and what it suggests."""

import shlex
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from rich.console import Console

from cluster.names import check_path_part
from trainers.recipe import load_recipe
from trainers.watch import watching

if TYPE_CHECKING:
    from sweeps.lr_find import Found


def run_lr_find(
    recipe_uri: str,
    overrides: Sequence[str],
    console: Console,
    *,
    run: str | None = None,
    lr_min: float = 1e-6,
    lr_max: float = 1.0,
    steps: int = 100,
) -> "Found":
    """Train the recipe's last stage with ever larger learning rates, and say which one to train it with.

    A test of the name `run` that was stopped goes on.
    """
    # Ray takes seconds to import, and a wrong recipe should not have to wait for it.
    recipe = load_recipe(recipe_uri, overrides)
    name = run or f"{recipe.name}-lr-find-{datetime.now():%Y%m%d-%H%M%S}"
    check_path_part(name, "--run")
    from sweeps.lr_find import find_learning_rate
    from trainers.launch import emulated_precision

    asked = " ".join([shlex.quote(recipe_uri), *(f"--set {shlex.quote(change)}" for change in overrides)])
    command = (
        f"medsynth sweep --lr-find {asked} --lr-min {lr_min:g} --lr-max {lr_max:g} --steps {steps} "
        f"--run {shlex.quote(name)}"
    )
    console.print(f"Range test [bold]{name}[/]; to resume it: {command}", soft_wrap=True)
    if notice := emulated_precision(recipe):
        console.print(f"[yellow]{notice}[/]", soft_wrap=True)
    with watching(console, command) as watch:
        found = find_learning_rate(
            recipe,
            name,
            lr_min=lr_min,
            lr_max=lr_max,
            steps=steps,
            on_progress=watch.show,
            on_stop_requested=watch.say_stopping,
        )
    suggestion = found.suggestion
    rate = f"{suggestion.learning_rate:.2g}"
    console.print(
        f"Suggested learning rate of {found.stage}: [bold]{rate}[/], where the loss falls most steeply; "
        f"it is lowest at {suggestion.minimum:.2g}, a tenth of which is {suggestion.tenth_of_minimum:.2g}",
        soft_wrap=True,
    )
    console.print(f"Picture: {found.picture}; MLflow: {found.tracker.ui_command()}", soft_wrap=True)
    console.print(
        f"Train with it: medsynth train {asked} --set {found.stage}.training.learning_rate={rate}", soft_wrap=True
    )
    return found
