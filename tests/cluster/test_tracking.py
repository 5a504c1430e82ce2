"""Tracking: the record of a run, on SQLite alone and through a real server."""

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from PIL import Image

from cluster.errors import UserError
from cluster.provenance import RAY_JOB_VARIABLE
from cluster.tracking import Tracker, connect, runs_of_job
from tests.conftest import named_store
from tests.servers import free_port


# One process of pytest-xdist starts the one server.
@pytest.fixture(params=["sqlite", pytest.param("server", marks=pytest.mark.xdist_group("mlflow"))])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return named_store(request.param, request, monkeypatch)


@pytest.fixture
def tracker(store: str, request: pytest.FixtureRequest) -> Tracker:
    return Tracker.start(experiment=request.node.name, run_name="run", tags={"git_commit": "abc"})


def test_what_is_logged_is_found(tracker: Tracker) -> None:
    tracker.log_params({"a": {"b": 1, "c": [1, 2]}, "long": "x" * 10_000})
    tracker.log_text("name: x\n", "recipe.yaml")
    tracker.log_dataset(name="set", digest="d" * 64, source="s3://bucket/shards", context="training")
    tracker.finish("FINISHED")
    run = MlflowClient(tracker.tracking_uri).get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["git_commit"] == "abc"
    assert run.data.params["a.b"] == "1"
    assert run.data.params["a.c"] == "[1, 2]"
    assert run.data.params["long"] == "x" * 6000
    assert tracker.read_text("recipe.yaml") == "name: x\n"
    assert run.inputs is not None
    (dataset,) = run.inputs.dataset_inputs
    assert json.loads(dataset.dataset.source) == {"uri": "s3://bucket/shards"}
    assert {tag.key: tag.value for tag in dataset.tags}["manifest_digest"] == "d" * 64


def test_a_step_logged_again_after_a_restart_is_not_doubled(tracker: Tracker) -> None:
    for step in (1, 2, 3):
        tracker.log_metrics({"loss": step / 10}, step)
    restarted = Tracker.resume(tracker.run_id, tracker.tracking_uri)
    for step in (2, 3, 4):
        restarted.log_metrics({"loss": step / 10, "late": 1.0}, step)
    assert restarted.metric_history("loss") == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert [step for step, _ in restarted.metric_history("late")] == [2, 3, 4]
    assert restarted.last_metrics() == {"loss": 0.4, "late": 1.0}


def test_a_run_is_found_by_each_job_that_worked_on_it(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    for job in ("first", "second", "second"):
        monkeypatch.setenv(RAY_JOB_VARIABLE, json.dumps({"metadata": {"job_submission_id": job}}))
        Tracker.resume(tracker.run_id, tracker.tracking_uri)
    begun = Tracker.start(experiment="of a job", run_name="run", tags={"mlflow.parentRunId": tracker.run_id})
    found = {job: [run.run_id for run in runs_of_job(job, tracker.tracking_uri)] for job in ("first", "second", "sec")}
    assert found == {"first": [tracker.run_id], "second": [tracker.run_id, begun.run_id], "sec": []}


def test_a_measured_checkpoint_is_a_model_with_its_figures(store: str) -> None:
    tracker = Tracker.start(experiment="checkpoints", run_name="msdm-1.5", tags={})
    data: dict[str, Any] = {"dataset_name": "small", "dataset_digest": "d" * 64}
    tracker.log_dataset(name="small", digest="d" * 64, source="shards", context="training")
    tracker.log_checkpoint("runs/a/step-10", 10, {"fidelity/fid": 3.0}, **data)
    tracker.log_checkpoint("runs/a/step-20", 20, {"fidelity/fid": 2.0, "fidelity/kid": 0.1}, **data)
    # After a restart the same is measured again, and what came late is added.
    restarted = Tracker.resume(tracker.run_id, tracker.tracking_uri)
    restarted.log_checkpoint("runs/a/step-20", 20, {"fidelity/fid": 2.0, "fidelity/kid": 0.1}, **data)
    restarted.log_checkpoint("runs/a/step-10", 10, {"fidelity/fid": 3.0, "fidelity/kid": 0.2}, **data)

    assert tracker.metric_history("fidelity/fid") == [(10, 3.0), (20, 2.0)]
    assert sorted(tracker.metric_history("fidelity/kid")) == [(10, 0.2), (20, 0.1)]
    client = tracker.client
    run = client.get_run(tracker.run_id)
    best, other = client.search_logged_models(
        [run.info.experiment_id],
        f"source_run_id = '{tracker.run_id}'",
        order_by=[{"field_name": "metrics.fidelity/fid", "dataset_name": "small", "dataset_digest": "d" * 36}],
    )
    assert (best.name, best.params, best.tags["checkpoint"]) == ("msdm-1-5-step-20", {"step": "20"}, "runs/a/step-20")
    assert (other.name, other.status) == ("msdm-1-5-step-10", "READY")
    assert best.metrics is not None
    figures = {(m.key, m.value, m.step, m.run_id, m.dataset_name, m.dataset_digest) for m in best.metrics}
    assert figures == {
        ("fidelity/fid", 2.0, 20, tracker.run_id, "small", "d" * 36),
        ("fidelity/kid", 0.1, 20, tracker.run_id, "small", "d" * 36),
    }
    assert run.outputs is not None
    outputs = [(output.model_id, output.step) for output in run.outputs.model_outputs]
    assert sorted(outputs) == sorted([(other.model_id, 10), (best.model_id, 20)])


def test_what_failed_beside_the_training_is_kept(tracker: Tracker) -> None:
    assert tracker.failures() == {}
    tracker.log_failure("fidelity at step 20", "no weights")
    assert tracker.failures() == {"fidelity at step 20": "no weights"}


def test_more_metrics_and_params_than_a_batch_holds(tracking_uri: str) -> None:
    tracker = Tracker.start(experiment="e", run_name="r", tags={})
    tracker.log_metrics({f"m{i}": float(i) for i in range(1200)}, 1)
    tracker.log_params({f"p{i}": i for i in range(250)})
    run = MlflowClient(tracker.tracking_uri).get_run(tracker.run_id)
    assert len(run.data.metrics) == 1200
    assert len(run.data.params) == 250


def test_pictures_are_kept_by_step(tracker: Tracker) -> None:
    png = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(png, "PNG")
    for step in (10, 20):
        tracker.log_picture("vae/samples", png.getvalue(), step)
    names = [found.path for found in MlflowClient(tracker.tracking_uri).list_artifacts(tracker.run_id, "images")]
    for step in (10, 20):
        assert any("samples" in name and f"step+{step}+" in name and name.endswith(".png") for name in names), names


def test_system_metrics_are_recorded_under_the_node(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING", "1")
    with tracker.system_metrics("node-a"):
        time.sleep(2)
    assert "system/node-a/cpu_utilization_percentage" in tracker.last_metrics()


def test_artifacts_of_a_sqlite_store_lie_beside_it(tracking_uri: str, tmp_path: Path) -> None:
    tracker = Tracker.start(experiment="e", run_name="r", tags={})
    tracker.log_text("x", "x.txt")
    assert list((tmp_path / "mlartifacts").rglob("x.txt"))
    assert tracker.ui_command() == f"mlflow ui --backend-store-uri {tracking_uri}"


def test_a_server_that_is_down_is_named_at_once() -> None:
    uri = f"http://user:secret@127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match="no MLflow server answers") as error:
        connect(uri)
    assert "secret" not in str(error.value)
    assert "mend MLFLOW_TRACKING_URI" in str(error.value)


def test_what_is_no_mlflow_server_is_named(s3: str) -> None:
    with pytest.raises(UserError, match="is no MLflow server: HTTP"):
        connect(s3)


def test_a_deleted_experiment_is_explained(tracking_uri: str) -> None:
    Tracker.start(experiment="gone", run_name="r", tags={})
    client = MlflowClient(tracking_uri)
    experiment = client.get_experiment_by_name("gone")
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    with pytest.raises(UserError, match="'gone' was deleted: restore it, or name another"):
        Tracker.start(experiment="gone", run_name="r", tags={})
