"""Where a model is: registered, logged by a run, in a run's folder, one of its checkpoints, or a folder of its own."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster import storage
from cluster.errors import UserError
from cluster.registry import RegisteredModel, model_folder
from trainers.checkpoint_folders import CHECKPOINT, complete_checkpoints
from trainers.families import family_of
from trainers.recipe import load_recipe
from trainers.run_folder import RunFolder


@dataclass(frozen=True)
class ModelSource:
    """A model as a local folder, for as long as its block lasts."""

    folder: Path
    name: str
    """For headings."""
    run_id: str | None
    """The MLflow run that trained it, as far as is known."""


def pinned(uri: str) -> str:
    """The same model by a name that will not come to mean another: an alias or `latest` as its version; absolute."""
    if uri.startswith("models:/"):
        model, version = RegisteredModel.of(uri)
        return f"models:/{model.name}/{version.number}"
    return uri if uri.startswith("runs:/") else storage.absolute(uri)


@contextmanager
def open_model(uri: str) -> Iterator[ModelSource]:
    """The model that `uri` names.

    models:/NAME/VERSION, models:/NAME@ALIAS or runs:/ID/model; a folder or s3:// prefix that holds a model, or that of
    a run (its finished model), or of a run's checkpoint (which is exported for as long as the block lasts).
    Raises UserError if there is no such model.
    """
    if uri.startswith(("models:/", "runs:/")):
        if uri.startswith("models:/"):
            model, version = RegisteredModel.of(uri)
            name, run_id = f"{model.name} {version.number}", version.run_id
        else:
            run_id = uri.removeprefix("runs:/").partition("/")[0]
            name = f"run {run_id}"
        with model_folder(uri) as folder:
            yield ModelSource(folder, name, run_id)
        return
    place = uri.rstrip("/")
    if CHECKPOINT.fullmatch(place.rpartition("/")[2]):
        with _exported(place) as source:
            yield source
    elif storage.exists(storage.join(place, "run.json")):
        run = RunFolder(place)
        stage = family_of(load_recipe(storage.join(place, "recipe.yaml"))).STAGES[-1]
        if not run.has_model(stage):
            raise UserError(f"{uri} has no finished model yet; name one of its checkpoints, {uri}/{stage}/step-…")
        with storage.local_folder(run.model(stage)) as folder:
            yield ModelSource(folder, place.rpartition("/")[2], _run_id(place))
    else:
        with storage.local_folder(place) as folder:
            yield ModelSource(folder, place, None)


@contextmanager
def _exported(checkpoint: str) -> Iterator[ModelSource]:
    """A checkpoint of a run's last stage as a pipeline."""
    stage_uri, _, name = checkpoint.rpartition("/")
    run_uri, _, stage = stage_uri.rpartition("/")
    recipe = load_recipe(storage.join(run_uri, "recipe.yaml"))
    family = family_of(recipe)
    if stage != family.STAGES[-1]:
        raise UserError(f"{checkpoint} is of stage {stage}, which draws nothing; name one of {family.STAGES[-1]}")
    if name not in complete_checkpoints(storage.list_files(stage_uri)):
        raise UserError(f"{checkpoint} is not there or not whole")
    with storage.local_folder(checkpoint) as folder, tempfile.TemporaryDirectory() as out:
        family.export(recipe, stage, RunFolder(run_uri), folder, Path(out))
        yield ModelSource(Path(out), f"{run_uri.rpartition('/')[2]} {name}", _run_id(run_uri))


def _run_id(run_uri: str) -> str | None:
    marker = storage.join(run_uri, "run.json")
    return str(json.loads(storage.read_bytes(marker))["run_id"]) if storage.exists(marker) else None
