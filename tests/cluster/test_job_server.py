"""Jobs on a real Ray head with its job server: followed, stopped without loss, gone on with, failed, two at once."""

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

from cluster.provenance import JOB_TAG, git_commit
from cluster.registry import RegisteredModel
from cluster.tracking import runs_of_job
from tests.servers import RayHead, ray_head
from tests.trainers.test_evaluate import extractor, real_shards

__all__ = ["extractor", "real_shards"]
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray-head")]

ROOT = Path(__file__).parents[2]
SECRET = "s3cr3t-value"


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with ray_head(num_cpus=4) as started:
        yield started


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


Command = Callable[..., Said]


@pytest.fixture
def medsynth(head: RayHead, mlflow_server: str) -> Command:
    """The command of a user of this cluster, at home in the project's folder."""
    environment = {
        **os.environ,
        **head.environment,
        "RAY_API_SERVER_ADDRESS": head.job_server,
        "MLFLOW_TRACKING_URI": mlflow_server,
        "MY_TOKEN": SECRET,
        "COLUMNS": "300",
    }

    def run(*arguments: str, **changes: str) -> Said:
        done = subprocess.run(
            [sys.executable, "-m", "medsynth", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
            cwd=ROOT,
            env={**environment, **changes},
        )
        assert SECRET not in done.stdout
        return Said(done.returncode, done.stdout)

    return run


@pytest.fixture
def recipe(recipe_document: dict[str, Any], real_shards: str, tmp_path: Path) -> str:
    """Trains as long as it is let: until it is stopped."""
    recipe_document["data"]["shards"] = real_shards
    recipe_document["vae"]["training"]["steps"] = 2
    recipe_document["denoiser"]["training"] |= {
        "steps": 150,
        "log_every_steps": 10,
        "checkpoint_every_steps": 10_000,
        "validate_every_steps": 10_000,
        "preview_every_steps": 10_000,
    }
    recipe_document["tracking"] |= {"register_as": "of-a-job"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_document))
    return str(path)


def has_reported(tracking_uri: str, job: str, metric: str) -> bool:
    return any(metric in tracker.last_metrics() for tracker in runs_of_job(job, tracking_uri))


def test_a_training_is_stopped_gone_on_with_and_its_model_judged(
    medsynth: Command, recipe: str, real_shards: str, extractor: str, mlflow_server: str, tmp_path: Path
) -> None:
    command = ["train", recipe, "--run", "trained"]
    first = medsynth("submit", "--no-follow", "--env", "MY_TOKEN", "--", *command)
    assert first.code == 0, first.out
    assert first.job.startswith("train-recipe-")
    deadline = time.monotonic() + 150
    while not has_reported(mlflow_server, first.job, "denoiser/loss"):
        assert time.monotonic() < deadline, medsynth("jobs", "logs", first.job).out
        time.sleep(0.5)
    stopped = medsynth("jobs", "stop", first.job)
    assert "Stopped and saved. To go on: medsynth train" in stopped.out
    assert f"STOPPED. To go on: medsynth submit -- {' '.join(command)}" in stopped.out
    reached = max(int(step) for step in re.findall(r"denoiser (\d+)/150", medsynth("jobs", "logs", first.job).out))
    (saved,) = (tmp_path / "runs/trained/denoiser").glob("step-*")  # none but that of the stop was due
    assert reached <= int(saved.name.split("-")[1]) < 150

    second = medsynth("submit", "--", *command)
    assert second.code == 0, second.out
    assert "SUCCEEDED after" in second.out
    assert " vae " not in "".join(line for line in second.out.splitlines() if "/2 " in line)  # it was trained before
    model, version = RegisteredModel(mlflow_server, "of-a-job"), 1
    run = MlflowClient(mlflow_server).get_run(model.version(version).run_id or "")
    assert run.data.tags[JOB_TAG] == second.job
    assert run.data.tags["git_commit"] == git_commit(ROOT)

    status = medsynth("jobs", "status", second.job).out
    assert f"/runs/{run.info.run_id}" in status
    assert "SUCCEEDED" in status
    assert git_commit(ROOT) in status

    # Three at once, of the finished model.
    uri = f"models:/of-a-job/{version}"
    asked = ["--data", real_shards, "--extractor", extractor, "--num-inference-steps", "2", "--num-samples", "20"]
    grid = {"guidance_scales": "[1,2]", "num_inference_steps": "[2]", "samplers": "[ddim]", "num_samples": "16"}
    settings = [f"--set={key}={value}" for key, value in {**grid, "extractors": f'["{extractor}"]'}.items()]
    commands = [
        ["evaluate", uri, *asked, "--out", str(tmp_path / "judged")],
        ["sweep", "--guidance", uri, "--data", real_shards, *settings, "--workers=2", "--out", str(tmp_path / "swept")],
        ["promote", uri, *asked, "--out", str(tmp_path / "promotions")],
    ]
    with ThreadPoolExecutor() as pool:
        judged, swept, promoted = pool.map(lambda words: medsynth("submit", "--", *words), commands)
    assert (judged.code, swept.code) == (0, 0), judged.out + swept.out
    assert promoted.code in (0, 3), promoted.out  # 3: a model of 150 steps may be refused
    assert ("SUCCEEDED after" in promoted.out) == (promoted.code == 0)
    assert ("models:/of-a-job@champion is now version 1" in promoted.out) == (promoted.code == 0)

    listed = medsynth("jobs", "list").out
    for said in (first, second, judged, swept, promoted):
        (line,) = (line for line in listed.splitlines() if said.job in line)
        assert ("STOPPED" in line) == (said is first)


def test_the_log_of_a_failed_job_ends_with_the_cause(medsynth: Command, recipe: str) -> None:
    failed = medsynth("submit", "--", "train", recipe, "--set", "denoiser.training.learning_rat=1")
    assert failed.code == 2
    *_, last, state = failed.out.splitlines()
    assert last.startswith("Error: ")
    assert "unknown key 'denoiser.training.learning_rat': did you mean 'learning_rate'?" in last
    assert state.startswith("FAILED after")
    assert f"{failed.job} was not running: FAILED" in medsynth("jobs", "stop", failed.job).out
    assert "knows no job 'nothing'" in medsynth("jobs", "status", "nothing").out


def test_who_has_no_token_is_told(medsynth: Command) -> None:
    refused = medsynth("jobs", "list", RAY_AUTH_MODE="disabled")
    assert refused.code == 2
    assert "asks for a token: set RAY_AUTH_MODE=token" in refused.out


def test_doctor_sees_the_cluster(medsynth: Command, head: RayHead) -> None:
    well = medsynth("doctor", RAY_ADDRESS=head.gcs)
    assert "✓ Ray job server: the cluster has Ray" in well.out
    assert "✓ Ray nodes: 1 with Ray" in well.out
    assert "✓ MLflow registry: models may be registered" in well.out
