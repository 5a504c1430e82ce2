"""A run's folder: what is where, and what was decided when the run began.

RUN/lease/          which process owns the run: see lease.py
RUN/run.json        the MLflow run that records it
RUN/recipe.yaml     the resolved recipe
RUN/registered.json what its model was registered as
RUN/unrecorded.json reports that MLflow could not be told yet: see records.py
RUN/measured/       the same of what was measured on checkpoints
RUN/STOP            there while the run is asked to stop
RUN/placement       what the ranks that train, or trained last, hold of the Ray cluster: see launch.release
RUN/vae/            Ray Train's folder of the stage: checkpoints; the finished autoencoder in model/
RUN/denoiser/       the same for the denoiser; the finished pipeline in model/
RUN/precomputed/    what the denoiser is trained on: the outputs of the finished autoencoder and of the text encoder
RUN/borrowed        there if another run's is read in its place: its URI
RUN/pictures/       previews
RUN/lr-find.json    of a learning-rate range test: its curve and what it suggests; lr-find.png draws it
RUN/lr-find.png
RUN/stacks/         where the threads of a rank stood that was ended because it hung: see watchdog.py
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster import storage
from cluster.checksums import MLFLOW_META, SUMS, check_folder
from cluster.documents import read_json_as, read_text
from cluster.errors import UserError
from cluster.names import check_path_part
from trainers.checkpoint_folders import complete_checkpoints
from trainers.recipe import Recipe, dump_recipe, load_recipe

COMPLETE = "COMPLETE"  # written into a model's folder when all else is there: the checksums of the rest
MAY_DIFFER = re.compile(
    r"(cluster|tracking)\..+|name|data\.num_workers|data\.cache.*"
    r"|\w+\.training\.(micro_batch_size|(log|validate|preview|checkpoint)_every_steps)"
)
"""Keys of a recipe that a run may be started again with other values of: the weights that it comes to are the same."""


@dataclass(frozen=True)
class Registration:
    """A finished model, trained for so many steps, as a version of a registered model."""

    name: str
    steps: int
    model_uri: str


@dataclass(frozen=True)
class RunFolder:
    """Names and small files of one run; everything may be s3://.

    Reading one that is damaged raises UserError: which file it is, what is wrong, and what to do.
    """

    uri: str

    @classmethod
    def of(cls, recipe: Recipe, run_name: str) -> "RunFolder":
        """Raises UserError if a run cannot have this name."""
        check_path_part(run_name, "the run's name")
        return cls(storage.join(recipe.cluster.storage, run_name))

    @property
    def name(self) -> str:
        return self.uri.rpartition("/")[2]

    def model(self, stage: str) -> str:
        """The stage's finished model in the diffusers layout."""
        return storage.join(self.uri, stage, "model")

    def has_model(self, stage: str) -> bool:
        # Folders are uploaded file by file; the marker comes last.
        return storage.exists(storage.join(self.model(stage), COMPLETE))

    def mark_complete(self, stage: str, sums: str = "") -> None:
        """`sums` are the checksums of the model's files, by which `finished_model` knows them."""
        storage.write_bytes(storage.join(self.model(stage), COMPLETE), sums.encode())

    def take_model(self, stage: str, source: "RunFolder") -> None:
        """Copy the finished model of another run's stage, so that it is not trained again.

        Raises UserError if its files are not those that were finished.
        """
        with finished_model(source.model(stage)) as folder:
            for path in folder.rglob("*"):
                if path.is_file() and path.name != COMPLETE:
                    storage.upload_file(path, storage.join(self.model(stage), path.relative_to(folder).as_posix()))
            self.mark_complete(stage, (folder / COMPLETE).read_text())

    def picture(self, stage: str, step: int) -> str:
        return storage.join(self.uri, "pictures", f"{stage}-{step:06d}.png")

    def stacks(self, name: str) -> str:
        return storage.join(self.uri, "stacks", f"{name}.txt")

    def begin(self, recipe: Recipe, mlflow_run: dict[str, str]) -> None:
        storage.write_bytes(storage.join(self.uri, "recipe.yaml"), dump_recipe(recipe).encode())
        storage.write_bytes(storage.join(self.uri, "run.json"), json.dumps(mlflow_run).encode())

    def previous(self, recipe: Recipe, last_stage: str = "") -> dict[str, str] | None:
        """The MLflow run of an earlier start of this run, or None if this is the first.

        Raises UserError if the earlier start followed another recipe. Keys that do not touch the training may differ,
        and `last_stage` may be trained longer.
        """
        run = self.mlflow_run()
        if run is None:
            return None
        before, now = self.began_with().model_dump(mode="json"), recipe.model_dump(mode="json")
        longer = f"{last_stage}.training.steps" if _is_longer(before, now, last_stage) else None
        changed = [key for key in _differences(before, now) if not MAY_DIFFER.fullmatch(key) and key != longer]
        if changed:
            raise UserError(
                f"{self.uri} was begun with another recipe; {', '.join(changed[:5])} differ: "
                "give the recipe it began with, or another --run name"
            )
        return run

    def began_with(self) -> Recipe:
        """The recipe of the run's latest start. Raises UserError if it cannot be read."""
        uri = storage.join(self.uri, "recipe.yaml")
        try:
            return load_recipe(uri)
        except UserError as error:
            if storage.is_outage(error):
                raise
            raise UserError(
                f"{error}; restore it (it is the artifact recipe.yaml of the MLflow run), or choose another --run name"
            ) from None

    def follow(self, recipe: Recipe, last_stage: str = "") -> None:
        """Go on by this recipe, which `previous` has taken: from now on it is the run's.

        Raises UserError where the last stage is to be trained longer, and no checkpoint is left to do so from.
        """
        before = self.began_with()
        if before == recipe:
            return
        if self.has_model(last_stage) and _is_longer(before.model_dump(), recipe.model_dump(), last_stage):
            stage = storage.join(self.uri, last_stage)
            if not complete_checkpoints(storage.list_files(stage)):
                raise UserError(f"{stage} has no checkpoint to be trained longer from: choose another --run name")
            storage.delete(storage.join(self.model(last_stage), COMPLETE))
        storage.write_bytes(storage.join(self.uri, "recipe.yaml"), dump_recipe(recipe).encode())

    def mlflow_run(self) -> dict[str, str] | None:
        """run_id and tracking_uri of the MLflow run that records it; None before it began."""
        marker = storage.join(self.uri, "run.json")
        if not storage.exists(marker):
            return None
        document = read_json_as(dict[str, str], marker, "restore it, or choose another --run name")
        try:
            return {key: document[key] for key in ("run_id", "tracking_uri")}
        except KeyError as error:
            raise UserError(f"{marker} lacks {error}: restore it, or choose another --run name") from None

    @property
    def _registered(self) -> str:
        return storage.join(self.uri, "registered.json")

    def registrations(self) -> list[Registration]:
        """What the run's models were registered as."""
        if not storage.exists(self._registered):
            return []
        remedy = "restore it, or, if the run was never trained longer, remove it: its version is found by the run"
        return read_json_as(list[Registration], self._registered, remedy)

    def note_registration(self, one: Registration) -> None:
        document = [asdict(known) for known in [*self.registrations(), one]]
        storage.write_bytes(self._registered, json.dumps(document).encode())

    @property
    def precomputed(self) -> str:
        """The precomputed set that the run's last stage reads."""
        if not self.borrows_precomputed:
            return self._own_precomputed
        return read_text(self._borrowed, "remove it, and the run encodes its images itself")

    @property
    def borrows_precomputed(self) -> bool:
        return storage.exists(self._borrowed)

    def borrow_precomputed(self, other: "RunFolder") -> None:
        """Read another run's, which must have the very same autoencoder, as far as it serves."""
        storage.write_bytes(self._borrowed, other.precomputed.encode())

    def use_own_precomputed(self) -> None:
        storage.delete(self._borrowed)

    @property
    def _own_precomputed(self) -> str:
        return storage.join(self.uri, "precomputed")

    @property
    def _borrowed(self) -> str:
        return storage.join(self.uri, "borrowed")

    @property
    def _stop_file(self) -> str:
        return storage.join(self.uri, "STOP")

    @property
    def placement(self) -> str:
        return storage.join(self.uri, "placement")

    def placement_group(self) -> str | None:
        """The id of the placement group that the run's ranks train in, or trained in last; None if there was none."""
        if not storage.exists(self.placement):
            return None
        content = storage.read_bytes(self.placement)
        if not re.fullmatch(rb"([0-9a-f]{2})*", content):
            raise UserError(
                f"{self.placement} is damaged: it is no id of a placement group; remove it, when no rank of an earlier "
                "start is left on the Ray cluster"
            )
        return content.decode() or None

    @property
    def unrecorded(self) -> str:
        return storage.join(self.uri, "unrecorded.json")

    @property
    def measured(self) -> str:
        return storage.join(self.uri, "measured")

    def measurement(self, stage: str, step: int) -> str:
        return storage.join(self.measured, f"{stage}-{step:06d}.json")

    def request_stop(self) -> None:
        storage.write_bytes(self._stop_file, b"")

    def clear_stop(self) -> None:
        if self.stop_requested():
            storage.delete(self._stop_file)

    def stop_requested(self) -> bool:
        return storage.exists(self._stop_file)


@contextmanager
def finished_model(uri: str) -> Iterator[Path]:
    """A local folder with the finished model at `uri`, as `RunFolder.model` names it, or any other model's folder.

    Raises UserError if its files are not those that were finished, as far as that is known.
    """
    with storage.local_folder(uri) as folder:
        registered = folder / SUMS  # of a copy in MLflow's artifacts, where more lies beside the finished model
        if registered.is_file():
            check_folder(folder, registered.read_text(errors="replace"), uri, ignoring=(SUMS, MLFLOW_META))
        elif (folder / COMPLETE).is_file() and (sums := (folder / COMPLETE).read_text(errors="replace")):
            try:
                check_folder(folder, sums, uri, ignoring=(COMPLETE,))
            except UserError as error:
                marker = storage.join(uri, COMPLETE)
                anew = f"if it is a run's, remove {marker}: the run's next start writes it from the latest checkpoint"
                raise UserError(f"{error}; {anew}") from None
        yield folder


def _is_longer(before: Mapping[str, Any], now: Mapping[str, Any], stage: str) -> bool:
    """Whether the second recipe trains the stage on, with a learning rate that does not depend on where it ends."""
    if stage not in before or stage not in now:
        return False
    training: Mapping[str, Any] = now[stage]["training"]
    is_test = training["learning_rate_schedule"] == "exponential"
    return bool(training["steps"] > before[stage]["training"]["steps"]) and not is_test


def _differences(before: object, after: object, prefix: str = "") -> list[str]:
    if not isinstance(before, dict) or not isinstance(after, dict):
        return [] if before == after else [prefix]
    keys = [*before, *(key for key in after if key not in before)]
    return [
        difference
        for key in keys
        for difference in _differences(before.get(key), after.get(key), f"{prefix}.{key}" if prefix else key)
    ]
