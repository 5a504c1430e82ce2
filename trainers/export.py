"""A checkpoint of a run, wherever it is, as a model in the diffusers layout."""

import tempfile
from pathlib import Path
from typing import Literal

from cluster import storage
from cluster.errors import UserError
from trainers.checkpoint_folders import complete_checkpoints
from trainers.recipe import FluxRecipe, load_recipe


def export_checkpoint(run: str, out: Path, *, step: int | None, weights: Literal["ema", "weights"]) -> int:
    """Export the checkpoint of `step` (the latest, if None) of the FLUX run at `run` and return its step.

    Raises UserError if there is no such run or checkpoint, or if `out` holds something already.
    """
    recipe = load_recipe(storage.join(run, "recipe.yaml"))
    if not isinstance(recipe, FluxRecipe) or recipe.transformer.lora is not None:
        raise UserError(f"{run} is no full fine-tuning of FLUX; its finished model is at {run}/*/model")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose another --out")
    stage = storage.join(run, "transformer")
    steps = {int(name.split("-")[1]): name for name in complete_checkpoints(storage.list_files(stage))}
    if not steps or (step is not None and step not in steps):
        there = ", ".join(str(number) for number in sorted(steps)) or "none"
        raise UserError(f"{run} has no checkpoint of step {step if step is not None else ''}: there are {there}")
    chosen = max(steps) if step is None else step
    from trainers.flux.export import export_pipeline  # after all that can be refused without torch

    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        storage.local_folder(storage.join(stage, steps[chosen])) as checkpoint,
        tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as unfinished,
    ):
        export_pipeline(recipe, checkpoint, Path(unfinished) / "model", weights=weights)
        if out.exists():
            out.rmdir()
        (Path(unfinished) / "model").rename(out)
    return chosen
