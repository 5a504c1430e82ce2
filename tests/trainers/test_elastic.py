"""A training that shrinks and grows with its cluster, in one run, is the training of a fixed number of ranks."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from tests.trainers.test_launch import begin_with_vae, train, with_values
from tests.trainers.test_loop import CPU, Reports
from trainers.launch import Progress
from trainers.run_folder import RunFolder
from trainers.worker import train_rank

pytestmark = pytest.mark.slow


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head that trains nothing, and two machines for a rank each; all of them raylets here."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
    finally:
        cluster.shutdown()


def test_two_ranks_then_one_then_two_again(
    recipe_document: dict[str, Any], tracking_uri: str, machines: Cluster
) -> None:
    recipe = with_values(
        recipe_document,
        cluster__num_workers=[1, 2],
        cluster__resize_seconds=3,
        denoiser__training__steps=900,
        denoiser__training__learning_rate=1e-4,
        denoiser__training__log_every_steps=20,
        denoiser__training__checkpoint_every_steps=20,
        denoiser__training__validate_every_steps=900,
        denoiser__training__preview_every_steps=900,
        tracking__register_as=None,
    )
    begin_with_vae(recipe, "elastic", "fixed")
    world_sizes: list[int] = []

    def change_the_cluster(progress: Progress) -> None:
        if progress.is_preparation:
            return
        world_size = int(progress.metrics["world_size"])
        if world_size == 2 and not world_sizes:
            machines.remove_node(next(iter(machines.worker_nodes)), allow_graceful=False)
        if world_size == 1 and world_sizes[-1] == 2:
            machines.add_node(num_cpus=1)
        world_sizes.append(world_size)

    elastic = train(recipe, "elastic", change_the_cluster)
    assert [size for size, _ in groupby(world_sizes)] == [2, 1, 2]

    fixed = Reports()
    train_rank(recipe, "denoiser", RunFolder.of(recipe, "fixed"), device=CPU, report=fixed, resume_from=None)
    losses = dict(elastic.tracker.metric_history("denoiser/loss"))
    assert sorted(losses) == list(range(20, 901, 20))
    for step, loss in losses.items():
        assert loss == pytest.approx(fixed.metrics[step]["loss"], abs=1e-4)
    assert elastic.metrics["denoiser/validation_loss"] == pytest.approx(fixed.metrics[900]["validation_loss"], abs=1e-4)
