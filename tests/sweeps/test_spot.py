"""A sweep on a cluster with a spot machine: what drives a trial is not there, what trains is."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster import runtime
from sweeps.spec import SweepSpec
from sweeps.tune import run_sweep
from tests.sweeps.test_tune import RATE, Watcher
from tests.sweeps.test_tune_trials import begin_with_shared_vae

pytestmark = pytest.mark.slow


@pytest.fixture
def spot(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Id of a spot machine, which has all the CPUs, and so much memory that Ray would rather place things there."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=2, memory=10**12, labels={runtime.MARKET_TYPE: runtime.SPOT})
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        yield node.node_id
    finally:
        cluster.shutdown()


@pytest.mark.usefixtures("tracking_uri")
def test_what_drives_a_trial_is_not_on_a_spot_machine(sweep_document: dict[str, Any], spot: str) -> None:
    spec = SweepSpec.model_validate(
        sweep_document
        | {
            "fixed": {"denoiser.training.steps": 2, "denoiser.training.validate_every_steps": 2},
            "space": {RATE: {"grid": [1e-3]}},
            "search": "grid",
            "budget": {},
        }
    )
    begin_with_shared_vae(spec, "spot-1")
    watcher = Watcher(steps=2)
    with runtime.connect(min_cpus=1):
        assert not runtime.grows()
        swept = run_sweep(spec, "spot-1", is_new=True, watch=watcher)
        assert [trial.state for trial in swept.trials] == ["finished"], watcher.said
        on_spot = defaultdict(set)
        for actor in ray._private.state.actors().values():
            on_spot[actor["ActorClassName"]].add(actor["Address"]["NodeID"] == spot)
        driven = ray.remote(runtime.off_spot).options(num_cpus=0, label_selector={runtime.MARKET_TYPE: runtime.SPOT})
        assert ray.get(driven.remote()) == {}  # who is there anyway asks for no other machine
    assert on_spot["ImplicitFunc"] == on_spot["TrainController"] == {False}, on_spot
    assert on_spot["RayTrainWorker"] == {True}, on_spot
