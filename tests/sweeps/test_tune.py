"""A sweep on a real Ray cluster: a trial stopped early, one that diverges, a killed trial, and a killed driver."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml

from cluster import runtime
from cluster.registry import RegisteredModel
from cluster.tracking import Tracker
from sweeps.journal import Journal
from sweeps.spec import Trial, load_spec
from sweeps.tune import ENDED, run_sweep
from tests.sweeps.conftest import in_full
from trainers.launch import Progress
from trainers.recipe import load_recipe

pytestmark = pytest.mark.slow

RATE = "denoiser.training.learning_rate"
SECONDS = 300
COMMAND = "import typer; from sweeps.cli import sweep; typer.run(sweep)"


class Watcher:
    """Watches in place of a person."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.said: list[str] = []
        self.shared_steps: list[int] = []

    def show(self, trials: Sequence[Trial], steps: int) -> None:
        assert steps == self.steps

    def say(self, line: str) -> None:
        self.said.append(line)

    def show_training(self, progress: Progress) -> None:
        self.shared_steps.append(progress.step)


def kill_trial(driver: int) -> None:
    """kill -9 on the process of the only running trial of a sweep."""
    names = {child: _name(child) for child in psutil.Process(driver).children(recursive=True)}
    victims = [child for child, name in names.items() if name.startswith("ray::ImplicitFunc")]  # Tune's name for it
    assert len(victims) == 1, [name for name in names.values() if name.startswith("ray::")]
    victims[0].kill()


def _name(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


@pytest.fixture
def spec_file(sweep_document: dict[str, Any], tmp_path: Path) -> Path:
    """Three rates: a good one, one that diverges at once, and one too small to learn."""
    in_full(sweep_document, vae=2, denoiser=8)
    sweep_document |= {
        "fixed": {
            "denoiser.training.validate_every_steps": 2,
            "denoiser.training.preview_every_steps": 8,
            "denoiser.training.learning_rate_schedule": "constant",
        },
        "space": {RATE: {"grid": [1e-2, 1e30, 1e-7]}},
        "search": "grid",
        "scheduler": {"kind": "asha", "grace_steps": 2, "reduction": 2},
        "concurrency": 1,
        "budget": {},
    }
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(sweep_document))
    return path


def test_a_sweep_survives_what_is_killed(spec_file: Path, tracking_uri: str, tmp_path: Path) -> None:
    journal, log = Journal(f"{tmp_path}/runs/rates-1"), tmp_path / "sweep.log"
    command = [sys.executable, "-c", COMMAND, str(spec_file), "--run", "rates-1"]
    root = str(Path(__file__).parents[2])
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True, env=os.environ | {"PYTHONPATH": root}
        )
    # The first trial is killed under way, and goes on from its checkpoint; the driver is killed in the second.
    try:
        wait_for(lambda: any(trial.steps >= 4 for trial in journal.trials()), process, log)
        kill_trial(process.pid)
        wait_for(lambda: len(journal.trials()) > 1, process, log)
    finally:
        process.kill()
        process.wait()
    before = journal.trials()
    assert [trial.state for trial in before] == ["finished", "running"]
    assert list(before[0].intermediate) == [2, 4, 6, 8]
    assert "vae, for all trials: 2/2" in log.read_text()

    # The sweep goes on: no trial that ended is run again, nor what they share trained again.
    watcher = Watcher(steps=8)
    with runtime.connect(min_cpus=2):
        swept = run_sweep(load_spec(str(spec_file)), "rates-1", is_new=False, watch=watcher)
        total = ray.cluster_resources()["CPU"]
        deadline = time.monotonic() + 30
        while ray.available_resources().get("CPU", 0) < total:  # what stopped trials took is free again
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert watcher.shared_steps == []
    assert swept.trials[0] == before[0]
    assert [trial.state for trial in swept.trials] == ["finished", "failed", "stopped"], watcher.said
    assert [trial.steps for trial in swept.trials] == [8, 0, 2]

    # MLflow: a run for the sweep, and below it one for each trial that says how it ended.
    client = swept.tracker.client
    sweep = client.get_run(swept.tracker.run_id)
    assert (sweep.info.status, sweep.data.tags["medsynth.kind"]) == ("FINISHED", "sweep")
    assert sweep.data.params[f"space.{RATE}.grid"] == "[0.01, 1e+30, 1e-07]"
    below = client.search_runs(
        [sweep.info.experiment_id],
        f"tags.`mlflow.parentRunId` = '{sweep.info.run_id}' and tags.`medsynth.kind` = 'trial'",
    )
    status = {run.data.tags["medsynth.trial"]: run.info.status for run in below}
    assert status == {"0": "FINISHED", "1": "FAILED", "2": "KILLED"}
    runs = {run.data.tags["medsynth.trial"]: Tracker(tracking_uri, run.info.run_id) for run in below}
    for number, tracker in runs.items():
        assert tracker.params()[RATE] == str(swept.trials[int(number)].params[RATE])
    history = runs["0"].metric_history("denoiser/validation_loss")
    assert [step for step, _ in history] == [2, 4, 6, 8]  # each step once
    assert "nan" in client.get_run(runs["1"].run_id).data.tags[ENDED]

    # The best, its recipe and its model.
    best = swept.trials[0]
    assert swept.best == best
    assert swept.model_uri == "models:/tiny/1"
    model, version = RegisteredModel.of("models:/tiny@candidate")
    assert (version.number, version.run_id) == (1, best.run_id)
    assert model.aliases() == {"candidate": 1}
    recipe = load_recipe(journal.best_recipe)
    assert recipe.denoiser.training.learning_rate == best.params[RATE]  # type: ignore[union-attr]
    assert recipe.tracking.register_as == "tiny"
    assert recipe.cluster.storage == f"{tmp_path}/runs"
    assert swept.tracker.read_text("best-recipe.yaml") == Path(journal.best_recipe).read_text()
