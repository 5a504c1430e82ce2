"""Where a model is: registered, logged by a run, in a run's folder, one of its checkpoints, or a folder of its own."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cluster import storage
from cluster.documents import parsing, read_json
from cluster.errors import UserError
from cluster.model_uri import parse_model_uri
from trainers.checkpoint_folders import CHECKPOINT, complete_checkpoints
from trainers.drawing_settings import check_settings
from trainers.families import family_of
from trainers.recipe import load_recipe
from trainers.run_folder import RunFolder, finished_model

SAMPLING_TAG = "sampling."
SAMPLING_TYPES = {"guidance_scale": float, "true_cfg_scale": float, "num_inference_steps": int, "sampler": str}
"""What the tags sampling.NAME of a registered version may say of how it is drawn, in place of what its model says."""
NO_SAMPLING: Mapping[str, Any] = MappingProxyType({})
INDEX = "model_index.json"
ADAPTERS = "pytorch_lora_weights.safetensors"
RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class ModelSource:
    """A model as a local folder, for as long as its block lasts."""

    folder: Path
    name: str
    """For headings."""
    run_id: str | None
    """The MLflow run that trained it, as far as is known."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Settings that its registered version is drawn with, where they are not the model's own."""


def is_model(folder: Path) -> bool:
    """Whether a folder holds a pipeline, or adapters with the recipe that names theirs."""
    return (folder / INDEX).is_file() or ((folder / ADAPTERS).is_file() and (folder / RECIPE).is_file())


def no_model(name: str) -> str:
    """What is wrong with a folder where `is_model` is false."""
    return f"{name} holds no diffusers pipeline: {INDEX} is not there"


def check_name(uri: str, *, may_be_images: bool = False) -> None:
    """Raise UserError for what `open_model` would not find, as far as that is known without MLflow and PyTorch."""
    if uri.startswith("models:/"):
        parse_model_uri(uri)
    elif not uri.startswith("runs:/") and not storage.is_remote(uri):
        with storage.local_folder(uri.rstrip("/")) as folder:
            is_of_run = (folder / "run.json").is_file() or CHECKPOINT.fullmatch(folder.name)
            if not (may_be_images or is_of_run or is_model(folder)):
                raise UserError(no_model(uri))


def pinned(uri: str) -> str:
    """The same model by a name that will not come to mean another: an alias or `latest` as its version; absolute."""
    if uri.startswith("models:/"):
        from cluster.registry import RegisteredModel

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
        # With it comes MLflow, which takes seconds to import: a folder needs none.
        from cluster.registry import RegisteredModel, model_folder

        if uri.startswith("models:/"):
            model, version = RegisteredModel.of(uri)
            name, run_id = f"{model.name} {version.number}", version.run_id
            sampling: Mapping[str, Any] = sampling_of(version.tags, uri)
        else:
            run_id = uri.removeprefix("runs:/").partition("/")[0]
            name, sampling = f"run {run_id}", NO_SAMPLING
        with model_folder(uri) as folder:
            yield ModelSource(folder, name, run_id, sampling)
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
        with finished_model(run.model(stage)) as folder:
            yield ModelSource(folder, place.rpartition("/")[2], _run_id(place))
    else:
        with finished_model(place) as folder:
            yield ModelSource(folder, place, None)


def sampling_of(tags: Mapping[str, str], uri: str) -> dict[str, Any]:
    """The settings among a version's tags. Raises UserError, which calls it `uri`, for one that cannot be read."""
    settings = {}
    for name, kind in SAMPLING_TYPES.items():
        tag = f"{SAMPLING_TAG}{name}"
        if tag in tags:
            try:
                settings[name] = kind(tags[tag])
            except ValueError:
                raise UserError(f"{uri}: its tag {tag} is {tags[tag]!r}: make it a number, or remove it") from None
    try:
        return check_settings(settings)
    except UserError as error:
        raise UserError(f"{uri}: its tag {SAMPLING_TAG}{error}; mend or remove it") from None


def sampling_tags(settings: Mapping[str, Any]) -> dict[str, str]:
    """The tags that say so; `sampling_of` reads them."""
    return {f"{SAMPLING_TAG}{name}": str(settings[name]) for name in SAMPLING_TYPES if name in settings}


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
    return noted_run(storage.join(run_uri, "run.json"))


def noted_run(marker: str) -> str | None:
    """The id of the MLflow run that the JSON document at `marker` names; None if there is none."""
    if not storage.exists(marker):
        return None
    document = read_json(marker)
    with parsing(marker):
        return str(document["run_id"])
