"""Jobs on a real Ray head with its job server: followed, stopped without loss, gone on with, failed, three at once.

A stage of a training takes three quarters of a minute here, so there are four: one that is stopped, one that goes on
with it, and the same of the trial of a sweep.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from cluster import stack, storage
from cluster.provenance import git_commit
from cluster.registry import RegisteredModel
from cluster.tracking import JOBS_TAG, Tracker, runs_of_job
from data_shards import Manifest
from sweeps.journal import Journal
from sweeps.spec import load_spec
from tests.servers import free_port
from tests.sweeps.conftest import extractor, pipeline, real_shards, sweep_document
from tests.sweeps.test_tune_trials import begin_with_shared_vae
from tests.trainers.test_launch import begin_with_vae
from trainers.msdm import MSDMPipeline
from trainers.recipe import MSDMRecipe
from trainers.registration import register_model

__all__ = ["extractor", "pipeline", "real_shards", "sweep_document"]
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("job-server")]  # one process has the one stack

ROOT = Path(__file__).parents[2]
SECRET = "s3cr3t-value"
SECONDS = 500  # that a job may take on a busy machine; pytest ends the whole test after 600
STEPS = 60  # reported one by one, which Ray Train does four times a second: far from done when the first is seen


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a stack."""
    folder = tmp_path_factory.mktemp("stack")
    ports = {name: free_port() for name in ("s3_port", "mlflow_port", "ray_port", "dashboard_port")}
    stack.up(folder, {**ports, "cpus": 4})
    try:
        yield folder
    finally:
        stack.down(folder)


@pytest.fixture(autouse=True)
def tracking_uri(servers: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The stack's; all variables of a user of the stack are set."""
    for name in stack.FOREIGN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    variables = stack.environment(servers, stack.State.read(servers).settings)
    for name, value in {**variables, "MY_TOKEN": SECRET}.items():
        monkeypatch.setenv(name, value)
    return variables["MLFLOW_TRACKING_URI"]


@dataclass(frozen=True)
class Said:
    """What a command did."""

    code: int
    out: str

    @property
    def job(self) -> str:
        """The id of the job that it submitted."""
        found = re.search(r"^Job (\S+): medsynth ", self.out, re.MULTILINE)
        assert found, self.out
        return found[1]


class Command:
    """A command in the project's folder, of a process of its own: Ray reads the token's variables once in each."""

    def __init__(self, *command: str, **changes: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, **changes},
        )

    def finish(self) -> Said:
        try:
            out, _ = self._process.communicate(timeout=SECONDS)
        finally:
            self._process.kill()
        assert SECRET not in out
        return Said(self._process.returncode, out)


def medsynth(*arguments: str, **changes: str) -> Said:
    return Command("-m", "medsynth", *arguments, **changes).finish()


def prepared(*arguments: str) -> Command:
    """A command of medsynth that has imported all it needs, and waits for its standard input to end."""
    code = "import sys, cluster.jobs, medsynth; sys.stdin.read(); medsynth.main()"
    return Command("-c", code, *arguments)


def wait_until(condition: Callable[[], bool], job: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, medsynth("jobs", "logs", job).out
        time.sleep(0.2)


def test_a_training_is_stopped_and_gone_on_with(
    recipe_document: dict[str, Any], tracking_uri: str, tmp_path: Path
) -> None:
    never = dict.fromkeys(("checkpoint_every_steps", "validate_every_steps", "preview_every_steps"), 10_000)
    recipe_document["denoiser"]["training"] |= {"steps": STEPS, "log_every_steps": 1, **never}
    begin_with_vae(MSDMRecipe.model_validate(recipe_document), "trained")
    storage.upload_folder(tmp_path / "runs", "s3://medsynth/runs")
    recipe_document["cluster"]["storage"] = "s3://medsynth/runs"
    recipe_document["tracking"]["register_as"] = "trained"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_document))
    train = ["train", str(recipe), "--run", "trained"]

    first = medsynth("submit", "--no-follow", "--env", "MY_TOKEN", "--", *train)
    assert first.code == 0, first.out
    assert first.job.startswith("train-recipe-")
    assert re.search(r"^MY_TOKEN: Ray shows the value to all", first.out, re.MULTILINE)
    stop = prepared("jobs", "stop", first.job)
    job = first.job
    wait_until(lambda: any("denoiser/loss" in run.last_metrics() for run in runs_of_job(job, tracking_uri)), job)
    stopped = stop.finish().out
    assert "\nStopped and saved." in stopped
    assert f"\nSTOPPED\nTo go on: medsynth submit -- {' '.join(train)}\n" in stopped
    (run,) = runs_of_job(first.job, tracking_uri)
    reached = run.metric_history("denoiser/loss")[-1][0]
    files = "\n".join(storage.list_files("s3://medsynth/runs/trained"))
    (saved,) = set(re.findall(r"^denoiser/step-(\d+)", files, re.MULTILINE))  # none but that of the stop was due
    assert reached <= int(saved) < STEPS

    # By Ray's own command this time.
    options = ["--working-dir", ".", "--submission-id", "by-hand"]
    second = Command("-m", "ray.scripts.scripts", "job", "submit", *options, "--", "medsynth", *train).finish()
    assert second.code == 0, second.out
    steps = [int(step) for step in re.findall(rf"denoiser (\d+)/{STEPS}", second.out)]
    assert (steps[0], steps[-1]) == (int(saved) + 1, STEPS)

    assert RegisteredModel(tracking_uri, "trained").version(1).run_id == run.run_id
    tags = MlflowClient(tracking_uri).get_run(run.run_id).data.tags
    assert tags[JOBS_TAG].split() == [first.job, "by-hand"]
    assert tags["git_commit"] == git_commit(ROOT)
    status = medsynth("jobs", "status", first.job).out
    assert re.search(r"^state +STOPPED$", status, re.MULTILINE)
    assert f"/runs/{run.run_id}" in status


def test_a_model_is_judged_and_promoted_while_a_sweep_that_was_stopped_goes_on(
    pipeline: MSDMPipeline,
    recipe: MSDMRecipe,
    sweep_document: dict[str, Any],
    real_shards: str,
    extractor: str,
    tracking_uri: str,
    tmp_path: Path,
) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    tracker = Tracker.start(experiment="medsynth", run_name="training", tags={})
    register_model(recipe, Manifest.load(real_shards), str(tmp_path / "model"), tracker, name="judged")
    gates = tmp_path / "gates.yaml"
    gates.write_text("memorization: {limit: 1}")  # it was never trained
    training = {"steps": STEPS, "log_every_steps": 1, "validate_every_steps": 2, "checkpoint_every_steps": 10_000}
    sweep_document |= {
        "fixed": {f"denoiser.training.{key}": value for key, value in training.items()},
        "space": {"denoiser.training.learning_rate": {"grid": [1e-3]}},
        "search": "grid",
        "budget": {},
    }
    spec = tmp_path / "sweep.yaml"
    spec.write_text(yaml.safe_dump(sweep_document))
    begin_with_shared_vae(load_spec(str(spec), []), "swept")
    journal = Journal(f"{recipe.cluster.storage}/swept")

    first = medsynth("submit", "--no-follow", "--", "sweep", str(spec), "--run", "swept").job
    stop = prepared("jobs", "stop", first)
    wait_until(lambda: any(trial.steps for trial in journal.trials()), first)
    stopped = stop.finish().out
    assert f"\nSTOPPED\nTo go on: medsynth submit -- sweep {spec} --resume swept\n" in stopped
    (trial,) = journal.trials()
    assert (trial.state, trial.steps < STEPS) == ("running", True)
    saved = list(Path(journal.run_folder(0).uri, "denoiser").glob("step-*"))
    assert len(saved) == 1  # none but that of the stop was due
    assert trial.run_id is not None
    told = Tracker(tracking_uri, trial.run_id)
    assert told.client.get_run(told.run_id).info.status == "KILLED"

    uri = "models:/judged/1"
    asked = ["--data", real_shards, "--extractor", extractor, "--num-inference-steps", "2", "--num-samples", "16"]
    commands = [
        ["sweep", str(spec), "--resume", "swept"],
        ["evaluate", uri, *asked, "--out", str(tmp_path / "judged")],
        ["promote", uri, *asked, "--gates", str(gates), "--out", str(tmp_path / "promotions")],
    ]
    with ThreadPoolExecutor() as pool:
        said = list(pool.map(lambda words: medsynth("submit", "--", *words), commands))
    for one in said:
        assert one.code == 0, one.out
        assert "SUCCEEDED after" in one.out
    swept, judged, promoted = said
    assert "Best: trial 0" in swept.out
    (trial,) = journal.trials()
    assert trial.run_id == told.run_id
    assert [step for step, _ in told.metric_history("denoiser/loss")] == list(range(1, STEPS + 1))  # each once
    assert "models:/judged@champion is now version 1" in promoted.out
    assert runs_of_job(judged.job, tracking_uri)[0].last_metrics().keys() >= {"ms_ssim"}
    assert runs_of_job(swept.job, tracking_uri)[0].run_id != runs_of_job(promoted.job, tracking_uri)[0].run_id
    listed = medsynth("jobs", "list").out
    for one, words in zip(said, commands, strict=True):
        (line,) = (line for line in listed.splitlines() if line.startswith(one.job))
        assert "SUCCEEDED" in line
        assert f"medsynth {words[0]} {words[1]}" in line


def test_the_log_of_a_failed_job_ends_with_the_cause() -> None:
    """The recipe is the uploaded one."""
    failed = medsynth("submit", "--", "train", "recipes/msdm-demo.yaml", "--set", "denoiser.training.learning_rat=1")
    assert failed.code == 2
    *_, last, state = failed.out.splitlines()
    assert last.startswith("Error: ")
    assert "unknown key 'denoiser.training.learning_rat': did you mean 'learning_rate'?" in last
    assert state.startswith("FAILED after")
    assert failed.out.endswith(f"{medsynth('jobs', 'logs', failed.job).out}{state}\n")
    assert f"{failed.job} was not running: FAILED" in medsynth("jobs", "stop", failed.job).out


def test_the_uploaded_code_runs(tmp_path: Path) -> None:
    (tmp_path / "medsynth.py").write_text("import sys\ndef main(): print('uploaded', *sys.argv[1:])")
    options = ["--working-dir", str(tmp_path)]
    said = Command("-m", "ray.scripts.scripts", "job", "submit", *options, "--", "medsynth", "train", "r").finish()
    assert said.code == 0, said.out
    assert "\nuploaded train r\n" in said.out


def test_who_has_no_token_or_no_such_job_is_told() -> None:
    refused = medsynth("jobs", "list", RAY_AUTH_MODE="disabled")
    assert refused.code == 2
    assert "asks for a token: set RAY_AUTH_MODE=token" in refused.out
    assert "knows no job 'nothing'" in medsynth("jobs", "status", "nothing").out


def test_doctor_sees_the_cluster() -> None:
    well = medsynth("doctor", "--bucket", "s3://medsynth/prefix")
    for line in (
        "✓ Ray job server: the cluster has Ray",
        "✓ Ray nodes: 1 with Ray",
        "✓ S3: list, write, read and delete at s3://medsynth/prefix",
        "✓ MLflow registry: models may be registered",
    ):
        assert line in well.out
