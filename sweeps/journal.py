"""A sweep's folder: what was tried and what came of it, written as it happens, so that a killed sweep goes on.

SWEEP/lease/                which process conducts the sweep: see trainers/lease.py
SWEEP/sweep.yaml            the specification
SWEEP/recipe.yaml           the recipe without any trial's values
SWEEP/run.json              the MLflow run that records the sweep
SWEEP/trials/000.yaml       the recipe of a trial
SWEEP/trials/000.json       how it fares
SWEEP/NAME-000/             its run, as `medsynth train` makes one
SWEEP/NAME-shared/          the run that trained what all trials share, if there is such a stage, and encoded by it
SWEEP/NAME-000/guidance/    the sweep over guidance that it was judged by, if the specification has that block
SWEEP/features/             what extractors saw in the real images, for all of these
SWEEP/report/               pictures
SWEEP/best.yaml             the best trial's recipe
SWEEP/candidate             its model, when it has the alias
"""

import json
from dataclasses import asdict, dataclass

from cluster import storage
from cluster.documents import read_json_as, read_text
from cluster.errors import UserError
from sweeps.spec import SweepSpec, Trial, dump_spec, load_spec
from trainers.recipe import Recipe, dump_recipe
from trainers.run_folder import RunFolder

MAY_CHANGE = ("concurrency", "max_failures", "budget")
"""Keys of the specification that a sweep may be resumed with other values of."""


@dataclass(frozen=True)
class Journal:
    """Names and small files of one sweep; everything may be s3://."""

    uri: str

    @property
    def name(self) -> str:
        return self.uri.rpartition("/")[2]

    @property
    def best_recipe(self) -> str:
        return storage.join(self.uri, "best.yaml")

    def run_name(self, number: int) -> str:
        return f"{self.name}-{number:03d}"

    def recipe(self, number: int) -> str:
        return storage.join(self.uri, "trials", f"{number:03d}.yaml")

    def run_folder(self, number: int) -> RunFolder:
        return RunFolder(storage.join(self.uri, self.run_name(number)))

    def guidance(self, number: int) -> str:
        return storage.join(self.run_folder(number).uri, "guidance")

    @property
    def features(self) -> str:
        return storage.join(self.uri, "features")

    @property
    def report(self) -> str:
        return storage.join(self.uri, "report")

    @property
    def shared_run(self) -> str:
        """Name of the run that trains what all trials share."""
        return f"{self.name}-shared"

    def begin(self, spec: SweepSpec, recipe: Recipe, mlflow_run: dict[str, str]) -> None:
        storage.write_bytes(self._spec, dump_spec(spec).encode())
        RunFolder(self.uri).begin(recipe, mlflow_run)

    def previous(self, spec: SweepSpec, recipe: Recipe) -> dict[str, str] | None:
        """The MLflow run of an earlier start of this sweep, or None if this is the first.

        Raises UserError if the earlier start had another specification, save for MAY_CHANGE, or another recipe.
        """
        if not storage.exists(self._spec):
            if RunFolder(self.uri).mlflow_run():
                raise UserError(f"{self.uri} is the folder of a run: give the sweep another name")
            return None
        before, now = load_spec(self._spec).model_dump(), spec.model_dump()
        changed = [key for key in now if key not in MAY_CHANGE and before[key] != now[key]]
        if changed:
            raise UserError(
                f"{self.uri} was begun with another specification; {', '.join(changed)} differ: "
                "give the one it began with, or begin a new sweep"
            )
        return RunFolder(self.uri).previous(recipe)

    @property
    def _spec(self) -> str:
        return storage.join(self.uri, "sweep.yaml")

    @property
    def base_recipe(self) -> str:
        return storage.join(self.uri, "recipe.yaml")

    def candidate(self) -> str | None:
        """The model that the alias was moved to when the sweep ended."""
        if not storage.exists(self._candidate):
            return None
        return read_text(self._candidate, "remove it, and the alias is moved to the best model again")

    def note_candidate(self, model_uri: str) -> None:
        storage.write_bytes(self._candidate, model_uri.encode())

    @property
    def _candidate(self) -> str:
        return storage.join(self.uri, "candidate")

    def write_recipe(self, number: int, recipe: Recipe) -> None:
        storage.write_bytes(self.recipe(number), dump_recipe(recipe).encode())

    def write(self, trial: Trial) -> None:
        target = storage.join(self.uri, "trials", f"{trial.number:03d}.json")
        storage.write_bytes(target, json.dumps(asdict(trial)).encode())

    def trials(self) -> list[Trial]:
        """All that began, in the order of their numbers; those that were cut off are still 'running'."""
        folder = storage.join(self.uri, "trials")
        names = [name for name in storage.list_files(folder) if name.endswith(".json")]
        trials = []
        for name in names:
            uri = storage.join(folder, name)
            trials.append(read_json_as(Trial, uri, "restore it, or remove it to have this trial forgotten"))
        return sorted(trials, key=lambda trial: trial.number)
