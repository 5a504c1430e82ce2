"""A sweep that loses what it can do without: MLflow's server for a while; spot machines, which drive no trial."""

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.tune.search import Searcher

from cluster import runtime
from cluster.tracking import Tracker
from sweeps import space
from sweeps.journal import Journal
from sweeps.spec import SweepSpec, Trial
from sweeps.tune import ENDED, _Conductor, _Recording, run_sweep
from tests import servers
from tests.sweeps.test_tune import RATE, SECONDS, Watcher
from tests.sweeps.test_tune_trials import begin_with_shared_vae
from trainers.recipe import at_absolute_paths

STEPS, RUNG = 1200, 12  # told one by one, four a second: the server is away before the rung is, the end long after it


@pytest.fixture
def port(empty_mlflow_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Where the environment expects MLflow's server; its database, in this test's folder, is empty."""
    shutil.copy(empty_mlflow_database, tmp_path / "mlflow.db")
    port = servers.free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    return port


@pytest.fixture
def spot(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Id of a spot machine, which has all the CPUs, and so much memory that Ray would rather place things there."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1, memory=10**12, labels={runtime.MARKET_TYPE: runtime.SPOT})
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        yield node.node_id
    finally:
        cluster.shutdown()


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_trials_are_decided_on_while_mlflow_is_away(
    sweep_document: dict[str, Any], port: int, spot: str, tmp_path: Path
) -> None:
    """And what drives them is on no spot machine, though one has more room."""
    training: dict[str, Any] = {"steps": STEPS, "log_every_steps": 1, "validate_every_steps": RUNG}
    training |= dict.fromkeys(("preview_every_steps", "checkpoint_every_steps"), STEPS)
    spec = SweepSpec.model_validate(
        sweep_document
        | {
            "fixed": {f"denoiser.training.{key}": value for key, value in training.items()}
            | {"tracking.register_as": None},
            "space": {RATE: {"grid": [1e-3, 1e-4]}},
            "search": "grid",
            "scheduler": {"kind": "asha", "grace_steps": RUNG, "reduction": 2},
            "concurrency": 1,
            "budget": {},
        }
    )
    begin_with_shared_vae(spec, "outage-1")
    journal = Journal(f"{tmp_path}/runs/outage-1")
    server = ExitStack()
    uri = server.enter_context(servers.mlflow_server(tmp_path, port))
    begin_with_a_good_trial(spec, journal)

    def take_away() -> None:
        """From when the trial has begun until it was stopped."""
        wait_until(lambda: journal.run_folder(1).mlflow_run())
        server.close()
        wait_until(lambda: places(spot).items() >= {"ImplicitFunc": False, "TrainController": False}.items())
        wait_until(lambda: places(spot).get("RayTrainWorker"))
        wait_until(lambda: journal.trials()[1].state == "stopped")
        server.enter_context(servers.mlflow_server(tmp_path, port))

    watcher = Watcher(steps=STEPS)
    with server, runtime.connect(min_cpus=1), ThreadPoolExecutor() as pool:
        outage = pool.submit(take_away)
        swept = run_sweep(spec, "outage-1", is_new=False, watch=watcher)
        outage.result()
        assert not runtime.grows()
        there = ray.remote(runtime.off_spot).options(num_cpus=0, label_selector={runtime.MARKET_TYPE: runtime.SPOT})
        assert ray.get(there.remote()) == {}  # who is there anyway asks for no other machine
        assert [trial.state for trial in swept.trials] == ["finished", "stopped"], watcher.said
        away = watcher.said.index("MLflow does not answer; the sweep goes on, and reports wait in the runs' folders.")
        assert watcher.said.index("MLflow answers again; it knows all reports.") > away

        trial = swept.trials[1]
        assert trial.run_id is not None
        tracker = Tracker(uri, trial.run_id)
        assert dict(tracker.metric_history("denoiser/validation_loss")).items() >= trial.intermediate.items()
        steps = [step for step, _ in tracker.metric_history("denoiser/loss")]
        assert steps == list(range(1, len(steps) + 1))  # each once
        assert len(steps) >= trial.steps == RUNG
        run = tracker.client.get_run(trial.run_id)
        assert (run.info.status, run.data.tags[ENDED]) == ("KILLED", "others were better at its step")
        assert tracker.client.get_run(swept.tracker.run_id).info.status == "FINISHED"


def places(spot: str) -> dict[str, bool]:
    """Of each class of actors that live: whether the one there is, is on the spot machine."""
    actors = [actor for actor in ray._private.state.actors().values() if actor["State"] == "ALIVE"]
    return {actor["ActorClassName"]: actor["Address"]["NodeID"] == spot for actor in actors}


def begin_with_a_good_trial(spec: SweepSpec, journal: Journal) -> None:
    """What is left of a sweep that was cut off when its first trial had ended, with a loss that no other comes near."""
    recipe = at_absolute_paths(space.recipe_of(spec, {}))
    tracker = Tracker.start(experiment=recipe.tracking.experiment, run_name=journal.name, tags={})
    journal.begin(spec, recipe, {"run_id": tracker.run_id, "tracking_uri": tracker.tracking_uri})
    losses = dict.fromkeys((RUNG, STEPS), 1e-9)
    journal.write(Trial(0, "finished", {RATE: 1e-3}, losses[STEPS], STEPS, 1.0, tracker.run_id, losses))


def test_a_trial_that_fails_for_want_of_mlflow_stops_the_sweep(sweep_document: dict[str, Any], tmp_path: Path) -> None:
    """So would all others fail; it goes on when it is resumed, and the trial with it."""
    spec = SweepSpec.model_validate(sweep_document)
    recipe = space.recipe_of(spec, {})
    nobody = Tracker(f"http://127.0.0.1:{servers.free_port()}", "run")
    watcher = Watcher(steps=6)
    conductor = _Conductor(
        spec, [recipe], Journal(f"{tmp_path}/runs/s"), nobody, watcher, _Recording(watcher), 2, time.monotonic()
    )
    config = conductor.next_config()
    conductor.on_trial_error(0, [], SimpleNamespace(config=config, get_error=lambda: None))
    assert [trial.state for trial in conductor.trials] == ["running"]
    assert "The sweep cannot go on: no MLflow server answers" in watcher.said[0]
    conductor.on_step_begin(0, [])
    assert conductor.journal.run_folder(0).stop_requested()  # as of all that run
    assert conductor.next_config() == Searcher.FINISHED
