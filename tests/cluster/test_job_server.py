"""Jobs on a real Ray head with its job server: followed, stopped without loss, gone on with, failed, three at once."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from cluster import stack, storage
from cluster.provenance import JOB_TAG, git_commit
from cluster.registry import RegisteredModel
from cluster.tracking import runs_of_job
from tests.servers import free_port
from tests.trainers.test_evaluate import extractor, real_shards

__all__ = ["extractor", "real_shards"]
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("job-server")]

ROOT = Path(__file__).parents[2]
SECRET = "s3cr3t-value"
STEPS = 400  # more than are done before the job is stopped


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
def environment(servers: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """That of a user of the stack; the variables that lead there."""
    for name in stack.FOREIGN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    variables = stack.environment(servers, stack.State.read(servers).settings)
    for name, value in {**variables, "MY_TOKEN": SECRET, "COLUMNS": "300"}.items():
        monkeypatch.setenv(name, value)
    return variables


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


def run(*command: str, **changes: str) -> Said:
    """A command in the project's folder."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
        env={**os.environ, **changes},
    )
    assert SECRET not in done.stdout
    return Said(done.returncode, done.stdout)


def medsynth(*arguments: str, **changes: str) -> Said:
    return run("medsynth", *arguments, **changes)


@pytest.fixture
def recipe(recipe_document: dict[str, Any], real_shards: str, tmp_path: Path) -> str:
    recipe_document["data"]["shards"] = real_shards
    recipe_document["vae"]["training"]["steps"] = 2
    never = dict.fromkeys(("checkpoint_every_steps", "validate_every_steps", "preview_every_steps"), 10_000)
    recipe_document["denoiser"]["training"] |= {"steps": STEPS, "log_every_steps": 10, **never}
    recipe_document["cluster"]["storage"] = "s3://medsynth/runs"
    recipe_document["tracking"]["register_as"] = "of-a-job"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_document))
    return str(path)


def has_reported(tracking_uri: str, job: str, metric: str) -> bool:
    return any(metric in tracker.last_metrics() for tracker in runs_of_job(job, tracking_uri))


def test_a_training_is_stopped_gone_on_with_and_its_model_judged(
    recipe: str, real_shards: str, extractor: str, environment: dict[str, str], tmp_path: Path
) -> None:
    tracking_uri = environment["MLFLOW_TRACKING_URI"]
    command = ["train", recipe, "--run", "trained"]
    first = medsynth("submit", "--no-follow", "--env", "MY_TOKEN", "--", *command)
    assert first.code == 0, first.out
    assert first.job.startswith("train-recipe-")
    deadline = time.monotonic() + 150
    while not has_reported(tracking_uri, first.job, "denoiser/loss"):
        assert time.monotonic() < deadline, medsynth("jobs", "logs", first.job).out
        time.sleep(0.5)
    stopped = medsynth("jobs", "stop", first.job)
    assert f"STOPPED. To go on: medsynth submit -- {' '.join(command)}" in stopped.out
    log = medsynth("jobs", "logs", first.job).out
    assert "Stopped and saved" in log
    reached = max(int(step) for step in re.findall(rf"denoiser (\d+)/{STEPS}", log))
    files = "\n".join(storage.list_files("s3://medsynth/runs/trained"))
    (saved,) = set(re.findall(r"^denoiser/step-(\d+)", files, re.MULTILINE))  # none but that of the stop was due
    assert reached <= int(saved) < STEPS

    second = medsynth("submit", "--", *command)
    assert second.code == 0, second.out
    assert "SUCCEEDED after" in second.out
    assert not re.search(r"vae \d+/2", second.out)  # it was trained before
    run = MlflowClient(tracking_uri).get_run(RegisteredModel(tracking_uri, "of-a-job").version(1).run_id or "")
    assert run.data.tags[JOB_TAG] == second.job
    assert run.data.tags["git_commit"] == git_commit(ROOT)

    status = medsynth("jobs", "status", second.job).out
    assert f"/runs/{run.info.run_id}" in status
    assert "SUCCEEDED" in status
    assert git_commit(ROOT) in status

    # Three at once, of the finished model.
    uri = "models:/of-a-job/1"
    asked = ["--data", real_shards, "--extractor", extractor, "--num-inference-steps", "2", "--num-samples", "20"]
    grid = {"guidance_scales": "[1,2]", "num_inference_steps": "[2]", "samplers": "[ddim]", "num_samples": "16"}
    settings = [f"--set={key}={value}" for key, value in {**grid, "extractors": f'["{extractor}"]'}.items()]
    commands = [
        ["evaluate", uri, *asked, "--out", str(tmp_path / "judged")],
        ["sweep", "--guidance", uri, "--data", real_shards, *settings, "--workers=1", "--out", str(tmp_path / "swept")],
        ["promote", uri, *asked, "--out", str(tmp_path / "promotions")],
    ]
    with ThreadPoolExecutor() as pool:
        judged, swept, promoted = pool.map(lambda words: medsynth("submit", "--", *words), commands)
    assert (judged.code, swept.code) == (0, 0), judged.out + swept.out
    assert promoted.code in (0, 3), promoted.out  # 3: a model of few steps may be refused
    assert ("SUCCEEDED after" in promoted.out) == (promoted.code == 0)
    assert ("models:/of-a-job@champion is now version 1" in promoted.out) == (promoted.code == 0)

    listed = medsynth("jobs", "list").out
    for said in (first, second, judged, swept, promoted):
        (line,) = (line for line in listed.splitlines() if said.job in line)
        assert ("STOPPED" in line) == (said is first)
    assert "'--set=samplers=[ddim]'" in listed


def test_the_log_of_a_failed_job_ends_with_the_cause() -> None:
    """The recipe is the uploaded one."""
    failed = medsynth("submit", "--", "train", "recipes/msdm-demo.yaml", "--set", "denoiser.training.learning_rat=1")
    assert failed.code == 2
    *_, last, state = failed.out.splitlines()
    assert last.startswith("Error: ")
    assert "unknown key 'denoiser.training.learning_rat': did you mean 'learning_rate'?" in last
    assert state.startswith("FAILED after")
    assert f"{failed.job} was not running: FAILED" in medsynth("jobs", "stop", failed.job).out
    assert "knows no job 'nothing'" in medsynth("jobs", "status", "nothing").out


def test_rays_own_command_runs_the_uploaded_code(tmp_path: Path) -> None:
    (tmp_path / "medsynth.py").write_text("import sys\ndef main(): print('uploaded', *sys.argv[1:])")
    options = ["--working-dir", str(tmp_path), "--submission-id", "by-hand"]
    said = run("ray.scripts.scripts", "job", "submit", *options, "--", "medsynth", "train", "recipe.yaml")
    assert said.code == 0, said.out
    assert "\nuploaded train recipe.yaml\n" in said.out
    (line,) = (line for line in medsynth("jobs", "list").out.splitlines() if "by-hand" in line)
    assert "medsynth train recipe.yaml" in line
    assert "SUCCEEDED" in line


def test_who_has_no_token_is_told() -> None:
    refused = medsynth("jobs", "list", RAY_AUTH_MODE="disabled")
    assert refused.code == 2
    assert "asks for a token: set RAY_AUTH_MODE=token" in refused.out


def test_doctor_sees_the_cluster() -> None:
    well = medsynth("doctor", "--bucket", "s3://medsynth/prefix")
    for line in (
        "✓ Ray job server: the cluster has Ray",
        "✓ Ray nodes: 1 with Ray",
        "✓ S3: list, write, read and delete at s3://medsynth/prefix",
        "✓ MLflow registry: models may be registered",
    ):
        assert line in well.out
