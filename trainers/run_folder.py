"""A run's folder: what is where, and what was decided when the run began.

RUN/run.json        the MLflow run that records it
RUN/recipe.yaml     the resolved recipe
RUN/unrecorded.json reports that MLflow could not be told yet: see records.py
RUN/measured/       the same of what was measured on checkpoints
RUN/registered.json the registered version that the finished model became
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from cluster import storage
from cluster.checksums import MLFLOW_META, SUMS, check_folder
from cluster.documents import parsing, read_json, read_yaml
from cluster.errors import UserError
from trainers.recipe import Recipe, dump_recipe

COMPLETE = "COMPLETE"  # written into a model's folder when all else is there: the checksums of the rest


@dataclass(frozen=True)
class RunFolder:
    """Names and small files of one run; everything may be s3://."""

    uri: str

    @classmethod
    def of(cls, recipe: Recipe, run_name: str) -> "RunFolder":
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

    def picture(self, stage: str, step: int) -> str:
        return storage.join(self.uri, "pictures", f"{stage}-{step:06d}.png")

    def stacks(self, name: str) -> str:
        return storage.join(self.uri, "stacks", f"{name}.txt")

    def begin(self, recipe: Recipe, mlflow_run: dict[str, str]) -> None:
        storage.write_bytes(storage.join(self.uri, "recipe.yaml"), dump_recipe(recipe).encode())
        storage.write_bytes(storage.join(self.uri, "run.json"), json.dumps(mlflow_run).encode())

    def previous(self, recipe: Recipe) -> dict[str, str] | None:
        """The MLflow run of an earlier start of this run, or None if this is the first.

        Raises UserError if the earlier start followed another recipe (its cluster settings may differ).
        """
        run = self.mlflow_run()
        if run is None:
            return None
        began_with = read_yaml(storage.join(self.uri, "recipe.yaml"))
        now = yaml.safe_load(dump_recipe(recipe))
        changed = [key for key in _differences(began_with, now) if not key.startswith("cluster.")]
        if changed:
            raise UserError(
                f"{self.uri} was begun with another recipe; {', '.join(changed[:5])} differ: "
                "give the recipe it began with, or another --run name"
            )
        return run

    def mlflow_run(self) -> dict[str, str] | None:
        """run_id and tracking_uri of the MLflow run that records it; None before it began."""
        marker = storage.join(self.uri, "run.json")
        if not storage.exists(marker):
            return None
        document = read_json(marker)
        with parsing(marker):
            return {key: str(document[key]) for key in ("run_id", "tracking_uri")}

    @property
    def precomputed(self) -> str:
        """The precomputed set that the run's last stage reads."""
        return storage.read_bytes(self._borrowed).decode() if self.borrows_precomputed else self._own_precomputed

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

    @property
    def unrecorded(self) -> str:
        return storage.join(self.uri, "unrecorded.json")

    @property
    def registered(self) -> str:
        return storage.join(self.uri, "registered.json")

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
            check_folder(folder, sums, uri, ignoring=(COMPLETE,))
        yield folder


def _differences(before: object, after: object, prefix: str = "") -> list[str]:
    if not isinstance(before, dict) or not isinstance(after, dict):
        return [] if before == after else [prefix]
    keys = [*before, *(key for key in after if key not in before)]
    return [
        difference
        for key in keys
        for difference in _differences(before.get(key), after.get(key), f"{prefix}.{key}" if prefix else key)
    ]
