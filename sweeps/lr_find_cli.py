"""`medsynth sweep --lr-find`: a learning-rate range test of a recipe, and what it suggests."""

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from rich.console import Console

from cluster.names import check_path_part
from cluster.terminal import ask, command_line, plain, say_starting
from trainers.families import check_shards
from trainers.recipe import load_recipe

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
    ask(recipe_uri)
    recipe = load_recipe(recipe_uri, overrides)
    name = run or f"{recipe.name}-lr-find-{datetime.now():%Y%m%d-%H%M%S}"
    check_path_part(name, "--run")
    ask(recipe.data.shards)
    check_shards(recipe)
    asked = [recipe_uri, *(word for change in overrides for word in ("--set", change))]
    rates = ["--lr-min", f"{lr_min:g}", "--lr-max", f"{lr_max:g}", "--steps", steps]
    command = command_line(["medsynth", "sweep", "--lr-find", *asked, *rates, "--run", name])
    console.print(f"Range test [bold]{plain(name)}[/]; to resume it: {plain(command)}", soft_wrap=True)
    say_starting("PyTorch, Ray and MLflow")
    from sweeps.lr_find import find_learning_rate
    from trainers.launch import emulated_precision
    from trainers.watch import watching

    if notice := emulated_precision(recipe):
        console.print(f"[yellow]{plain(notice)}[/]", soft_wrap=True)
    with watching(console, command) as watch:
        found = find_learning_rate(
            recipe,
            name,
            lr_min=lr_min,
            lr_max=lr_max,
            steps=steps,
            on_progress=watch.show,
            on_stop_requested=watch.say_stopping,
            on_starting=watch.say_starting,
        )
    suggestion = found.suggestion
    rate = f"{suggestion.learning_rate:.2g}"
    console.print(
        f"Suggested learning rate of {plain(found.stage)}: [bold]{rate}[/], where the loss falls most steeply; "
        f"it is lowest at {suggestion.minimum:.2g}, a tenth of which is {suggestion.tenth_of_minimum:.2g}",
        soft_wrap=True,
    )
    where = f"Picture: {found.picture}; MLflow: {found.tracker.ui_command()}"
    console.print(plain(where), soft_wrap=True)
    train = command_line(["medsynth", "train", *asked, "--set", f"{found.stage}.training.learning_rate={rate}"])
    console.print(f"Train with it: {plain(train)}", soft_wrap=True)
    return found
