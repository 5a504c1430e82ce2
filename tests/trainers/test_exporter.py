"""What can be seen of a rank while it trains: its figures at Ray's metrics exporter, its lines in Ray's logs."""

import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray.util.metrics import Counter, Gauge

from cluster import counters, runtime, storage
from cluster.tracking import Tracker, TrackingError
from tests.fault_proxy import Fault, FaultProxy, fault_proxy
from tests.trainers.test_launch import begin_with_vae, train, with_values
from trainers import records
from trainers.exporter import COUNTERS, GAUGES, PREFIX, RANK_GAUGES, RUN_GAUGES, RankExporter, controller_exporter
from trainers.launch import Progress, _RecordReports
from trainers.records import Records
from trainers.run_folder import RunFolder


@pytest.mark.parametrize("run", ["rün", "polyp 🎈", "a\nb", "100%", "", 'q"\\'])
def test_no_name_of_a_run_ends_its_training(run: str, caplog: pytest.LogCaptureFixture) -> None:
    """Ray's labels are ASCII alone; it raises when a value is set, not when the metric is made."""
    exporter = RankExporter(run=run, stage="vae", rank=0)
    counters.count("replaced_samples")
    exporter.report(1, {"loss": 0.5, "unknown": 1.0})
    exporter.checkpointed()
    controller_exporter(run=run, stage="vae").set("restarts", 1)
    assert caplog.text == ""
    assert unquote(exporter._tags["run"]) == run


def test_an_exporter_that_raises_is_told_of_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no agent")

    exporter = RankExporter(run="r", stage="vae", rank=0)
    for kind in (Gauge, Counter):
        monkeypatch.setattr(kind, "set" if kind is Gauge else "inc", fail)
    for step in (1, 2):
        counters.count("replaced_samples")
        exporter.report(step, {"loss": 0.5})
    assert [record.message for record in caplog.records] == ["some figures are not exported to Prometheus: no agent"]


class Watcher:
    """In place of the queue to whoever watches."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def put(self, item: tuple[Any, ...]) -> None:
        self.seen.append(item)


def test_the_controller_exports_restarts_and_reports_that_wait(
    tracking_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ray Train sends it to the controller, and calls it there."""
    run = RunFolder(str(tmp_path / "rün"))
    tracker = Tracker.start(experiment="e", run_name="rün", tags={})
    made = _RecordReports("vae", 6, Records(run, tracker), Watcher())  # type: ignore[arg-type]
    callback = ray.cloudpickle.loads(ray.cloudpickle.dumps(made))
    exported: dict[str, float] = {}
    monkeypatch.setattr(callback.exporter, "set", exported.__setitem__)
    reported = {"step": 2, "has_picture": False, "time_ms": 1_795_000_000_000, "loss": 0.5, "fidelity/fid": 3.0}
    callback.after_report(None, [reported], None)
    assert exported == {"reports_waiting": 0, "restarts": 0}
    callback.after_exception(None, {0: RuntimeError("killed")})

    def is_away(uri: str) -> None:
        raise TrackingError("no MLflow server answers")

    monkeypatch.setattr(records, "connect", is_away)
    callback.after_report(None, [reported | {"step": 4}], None)
    assert exported == {"reports_waiting": 1, "restarts": 1}
    assert callback.reports.seen == [("vae", 2, 6, {"loss": 0.5}, 0), ("vae", 4, 6, {"loss": 0.5}, 1)]
    (metric,) = tracker.client.get_metric_history(tracker.run_id, "vae/loss")
    assert (metric.step, metric.value, metric.timestamp) == (2, 0.5, 1_795_000_000_000)


Exported = dict[str, dict[str, float]]
"""Values by name, as Ray exports it, and rank; the rank is "" where there is none."""


class AllIsSeen(Exception):  # noqa: N818 - what happened, not what went wrong
    """Ends the training."""


@pytest.fixture
def faulty_s3(s3_shards: str, s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """S3 with the shards, where each tenth read of one fails."""
    reads: list[str] = []

    def decide(method: str, path: str) -> Fault | None:
        if method == "GET" and ".tar" in path:
            reads.append(path)
            if len(reads) % 10 == 0:
                return Fault.SLOW_DOWN
        return None

    with fault_proxy(s3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        storage.forget_clients()
        proxy.decide = decide
        yield proxy


@pytest.mark.slow
def test_what_a_training_rank_shows(
    recipe_document: dict[str, Any],
    s3_shards: str,
    faulty_s3: FaultProxy,
    tracking_uri: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exporter, logs and MLflow tell the same of two ranks that train until the exporter has had everything."""
    recipe = with_values(
        recipe_document,
        data__shards=s3_shards,
        cluster__num_workers=2,
        denoiser__training__steps=100_000,
        denoiser__training__checkpoint_every_steps=100_000,
        denoiser__training__preview_every_steps=100_000,
        tracking__register_as=None,
    )
    begin_with_vae(recipe, "seen")
    run, lender = RunFolder.of(recipe, "seen"), RunFolder(s3_shards.replace("/shards", "/lender"))
    storage.upload_folder(Path(run.precomputed), lender.precomputed)
    run.borrow_precomputed(lender)  # what the denoiser reads is to be behind the faults too
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    seen: Exported = {}

    with runtime.connect(min_cpus=3):
        (node,) = ray.nodes()
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        logs = Path(node["RayletSocketName"]).parents[1] / "logs"

        def look(progress: Progress) -> None:
            seen.update(exported(url, run="seen", stage="denoiser"))
            if is_complete(seen):
                raise AllIsSeen

        with pytest.raises(AllIsSeen):
            train(recipe, "seen", look)
        lines = [line for path in logs.glob("worker-*.err") for line in own_lines(path)]

    folder = RunFolder.of(recipe, "seen")
    tracker = Tracker(tracking_uri, (folder.mlflow_run() or {})["run_id"])
    check_figures(seen, lambda name: dict(tracker.metric_history(f"denoiser/{name}")))
    retries = seen["ray_medsynth_storage_read_retries_total"]
    assert 0 < sum(retries.values()) <= faulty_s3.faults[Fault.SLOW_DOWN]

    assert {line["rank"] for line in lines} == {0, 1}
    for line in lines:
        assert (line["run"], line["mlflow_run_id"], line["stage"]) == ("seen", tracker.run_id, "denoiser")
        assert line["world_size"] == 2
    assert [line["rank"] for line in lines if line["message"] == "the rank begins"] in ([0, 1], [1, 0])
    told = {line["metrics"]["step"]: line["metrics"]["loss"] for line in lines if "metrics" in line}
    assert told == dict(tracker.metric_history("denoiser/loss"))


def exported(url: str, run: str, stage: str) -> Exported:
    """What of medsynth's Ray's agent exports at this moment."""
    found: Exported = {}
    with urllib.request.urlopen(url, timeout=10) as answer:
        for family in text_string_to_metric_families(answer.read().decode()):
            for sample in family.samples:
                if sample.name.startswith(f"ray_{PREFIX}"):
                    assert (sample.labels["run"], sample.labels["stage"]) == (run, stage)
                    found.setdefault(sample.name, {})[sample.labels.get("rank", "")] = sample.value
    return found


def is_complete(seen: Exported) -> bool:
    ranks = [set(seen.get(f"ray_{PREFIX}{name}", {})) for name in RANK_GAUGES]
    return (
        all(f"ray_{PREFIX}{name}" in seen for name in [*GAUGES, *RUN_GAUGES])
        and all(found == {"0", "1"} for found in ranks)
        and "ray_medsynth_storage_read_retries_total" in seen
    )


def check_figures(seen: Exported, history: Callable[[str], dict[int, float]]) -> None:
    """All that MLflow has of the stage was exported, with values that it has."""
    assert seen.keys() <= {f"ray_{PREFIX}{n}" for n in [*GAUGES, *RANK_GAUGES, *RUN_GAUGES]} | {
        f"ray_{PREFIX}{name}_total" for name in COUNTERS
    }
    for name in GAUGES.keys() - {"step"}:
        assert seen[f"ray_{PREFIX}{name}"].keys() == {""}
        assert seen[f"ray_{PREFIX}{name}"][""] in history(name).values(), name
    assert seen["ray_medsynth_step"][""] in history("loss")
    for name in RUN_GAUGES:
        assert seen[f"ray_{PREFIX}{name}"].keys() == {""}
    assert (seen["ray_medsynth_restarts"][""], seen["ray_medsynth_reports_waiting"][""]) == (0, 0)
    assert 0 <= time.time() - seen["ray_medsynth_checkpoint_timestamp_seconds"][""] < 3600
    for name in RANK_GAUGES:
        by_rank = seen[f"ray_{PREFIX}{name}"]
        assert by_rank["0"] in history(name).values()
        assert 0 <= by_rank["1"] <= 1


def own_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of medsynth's loggers in a file of Ray's, where others write too."""
    found = []
    for line in path.read_text().splitlines():
        if line.startswith('{"time": '):
            found.append(json.loads(line))
    return found
