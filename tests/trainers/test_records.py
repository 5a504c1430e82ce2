"""Reports reach MLflow once each, whatever becomes of the server meanwhile."""

import io
import json
import math
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cluster import storage
from cluster.errors import UserError
from cluster.tracking import Tracker, TrackingError
from tests import servers
from tests.fault_proxy import Fault, fault_proxy
from trainers import records
from trainers.records import Measurement, Records, Report
from trainers.run_folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


@pytest.fixture
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RETRY_SECONDS", 0.0)


def report(run: RunFolder, step: int, loss: float) -> Report:
    png = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(png, "PNG")
    storage.write_bytes(run.picture("vae", step), png.getvalue())
    return Report("vae", step, {"loss": loss}, has_picture=True)


def assert_told_once(tracker: Tracker, losses: dict[int, float]) -> None:
    assert tracker.metric_history("vae/loss") == list(losses.items())
    pictures = [f.path for f in tracker.client.list_artifacts(tracker.run_id, "images") if f.path.endswith(".png")]
    assert sorted(int(path.split("+step+")[1].split("+")[0]) for path in pictures) == list(losses)


@pytest.mark.usefixtures("tracking_uri", "_no_pause")
def test_what_cannot_be_told_waits_in_the_runs_folder(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker.start(experiment="e", run_name="r", tags={})
    kept = Records(run, tracker)
    assert kept.add(report(run, 2, 0.5)) == 0
    assert not storage.exists(run.unrecorded)

    def is_away(uri: str) -> None:
        raise TrackingError("no MLflow server answers")

    with monkeypatch.context() as patch:
        patch.setattr(records, "connect", is_away)
        assert kept.add(report(run, 4, 0.4)) == 1
        assert kept.add(report(run, 6, math.inf)) == 2
        assert [entry["step"] for entry in json.loads(storage.read_bytes(run.unrecorded))] == [4, 6]
        # Whoever goes on with the run finds them, and says how many wait if MLflow is still away.
        with pytest.raises(UserError, match=r"did not take 2 reports of .*no MLflow server answers.*again"):
            Records(run, tracker).flush(seconds=0)
    assert kept.add(report(run, 8, 0.2)) == 0
    assert not storage.exists(run.unrecorded)
    assert_told_once(tracker, {2: 0.5, 4: 0.4, 6: sys.float_info.max, 8: 0.2})  # MLflow's infinity


@pytest.mark.usefixtures("tracking_uri", "_no_pause")
def test_what_was_told_already_is_not_told_again(run: RunFolder) -> None:
    """As when whoever told it was killed before it could say so, or a restart reports a step again."""
    tracker = Tracker.start(experiment="e", run_name="r", tags={})
    Records(run, tracker).add(report(run, 2, 0.5))
    again = [{"stage": "vae", "step": step, "metrics": {"loss": 0.5}, "has_picture": True} for step in (2, 4)]
    storage.write_bytes(run.picture("vae", 4), storage.read_bytes(run.picture("vae", 2)))
    storage.write_bytes(run.unrecorded, json.dumps(again).encode())
    Records(run, Tracker(tracker.tracking_uri, tracker.run_id)).flush(seconds=0)
    assert_told_once(tracker, {2: 0.5, 4: 0.5})


@pytest.mark.usefixtures("tracking_uri")
def test_a_server_that_is_away_is_not_asked_at_each_report(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker.start(experiment="e", run_name="r", tags={})
    asked = []

    def is_away(uri: str) -> None:
        asked.append(uri)
        raise TrackingError("no MLflow server answers")

    monkeypatch.setattr(records, "connect", is_away)
    kept = Records(run, tracker)
    assert [kept.add(report(run, step, 0.1)) for step in (1, 2, 3)] == [1, 2, 3]
    assert len(asked) == 1


@pytest.mark.xdist_group("mlflow")
@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.TOO_MANY, Fault.LATE, Fault.STALLED, Fault.RESET])
def test_a_server_that_is_well_by_its_own_word_holds_nothing_up(
    run: RunFolder, fault: Fault, mlflow_server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """It answers /health, and nothing else as it should."""
    monkeypatch.setattr(records, "RETRY_SECONDS", 0.5)
    with fault_proxy(mlflow_server) as proxy:
        tracker = Tracker.start(experiment=request.node.name, run_name="r", tags={}, tracking_uri=proxy.address)
        kept = Records(run, tracker)
        assert kept.add(report(run, 2, 0.5)) == 0
        proxy.decide = lambda method, path: fault if path.startswith("/api") else None
        monkeypatch.setattr(records, "TELL_SECONDS", 1.0)
        began = time.monotonic()
        assert [kept.add(report(run, step, 1 / step)) for step in (4, 6, 8)] == [1, 2, 3]
        assert time.monotonic() - began < 3
        assert [entry["step"] for entry in json.loads(storage.read_bytes(run.unrecorded))] == [4, 6, 8]
        proxy.decide = lambda method, path: None
        proxy.release()
        kept.flush(seconds=30)
    assert not storage.exists(run.unrecorded)
    assert_told_once(Tracker(mlflow_server, tracker.run_id), {2: 0.5, 4: 1 / 4, 6: 1 / 6, 8: 1 / 8})


@pytest.mark.xdist_group("mlflow")
def test_a_write_that_arrives_after_it_was_sent_again_is_not_doubled(
    run: RunFolder, mlflow_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(records, "PATIENCE_SECONDS", 1)
    with fault_proxy(mlflow_server) as proxy:
        tracker = Tracker.start(experiment="late", run_name="r", tags={}, tracking_uri=proxy.address)
        proxy.decide = lambda method, path: (
            Fault.STALLED if path.endswith("/log-batch") and not proxy.stalled.is_set() else None
        )
        kept = Records(run, tracker)
        kept.add(Report("vae", 2, {"loss": 0.5}, has_picture=False))
        kept.flush(seconds=30)
        proxy.release()
        time.sleep(0.5)  # until it has arrived
    assert proxy.faults[Fault.STALLED] == 1
    assert Tracker(mlflow_server, tracker.run_id).metric_history("vae/loss") == [(2, 0.5)]


@pytest.mark.usefixtures("tracking_uri", "_no_pause")
def test_what_was_measured_waits_too_and_is_told_once(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker.start(experiment="e", run_name="r", tags={})
    data: dict[str, Any] = {"dataset_name": "small", "dataset_digest": "d" * 64}
    tracker.log_dataset(name="small", digest="d" * 64, source="shards", context="training")
    Measurement("vae", 2, "runs/a/2", metrics={"fidelity/fid": 3.0}, **data).save(run)
    Measurement("vae", 4, "runs/a/4", failure="no weights", **data).save(run)

    def is_away(uri: str) -> None:
        raise TrackingError("no MLflow server answers")

    kept = Records(run, tracker)
    with monkeypatch.context() as patch:
        patch.setattr(records, "connect", is_away)
        kept.add(report(run, 4, 0.5))
        with pytest.raises(UserError, match="did not take 3 reports of "):
            Records(run, tracker).flush(seconds=0)
    kept.add(report(run, 6, 0.25))
    assert tracker.metric_history("fidelity/fid") == [(2, 3.0)]
    assert tracker.failures() == {"fidelity at step 4": "no weights"}
    # Measured once more, as after a restart.
    Measurement("vae", 2, "runs/a/2", metrics={"fidelity/fid": 3.0}, **data).save(run)
    Records(run, Tracker(tracker.tracking_uri, tracker.run_id)).flush(seconds=0)
    assert tracker.metric_history("fidelity/fid") == [(2, 3.0)]
    assert storage.list_files(run.measured) == []


@pytest.mark.slow
@pytest.mark.usefixtures("_no_pause")
def test_a_real_server_is_ended_and_comes_back(
    run: RunFolder, empty_mlflow_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlflow.db").write_bytes(empty_mlflow_database.read_bytes())
    port = servers.free_port()
    with ExitStack() as server:
        uri = server.enter_context(servers.mlflow_server(tmp_path, port))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        tracker = Tracker.start(experiment="e", run_name="r", tags={})
        kept = Records(run, tracker)
        assert kept.add(report(run, 2, 0.5)) == 0
    began = time.monotonic()
    assert [kept.add(report(run, step, 1 / step)) for step in (4, 6)] == [1, 2]
    assert time.monotonic() - began < 5  # the training does not wait for it
    with pytest.raises(UserError, match="no MLflow server answers"):
        Records(run, tracker).flush(seconds=0)
    with servers.mlflow_server(tmp_path, port):
        Records(run, tracker).flush(seconds=0)
        assert_told_once(Tracker(uri, tracker.run_id), {2: 0.5, 4: 1 / 4, 6: 1 / 6})
