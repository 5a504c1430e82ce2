"""What test_ray_cluster.py runs on the twin, as a client of its own: asks for machines that are not there, in turn.

Prints, as JSON, type and market of the machine that each demand was met on, how many machines there were before and
after, and whether the cluster is taken for one that grows.
"""

import json
import os
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster import runtime

PATIENCE_SECONDS = 120


def machines() -> int:
    return sum(node["Alive"] for node in ray.nodes())


def this_machine() -> tuple[str, str | None]:
    labels: Any = ray.get_runtime_context().get_node_labels()
    return os.environ["RAY_NODE_TYPE_NAME"], labels.get(runtime.MARKET_TYPE)


def met_on(bundle: Mapping[str, float]) -> tuple[str, str | None]:
    """The machine that a placement group of this bundle, and a task in it, came to be on."""
    group = placement_group([dict(bundle)])
    ray.get(group.ready(), timeout=PATIENCE_SECONDS)
    task = ray.remote(this_machine).options(
        num_cpus=bundle["CPU"],
        num_gpus=bundle.get("GPU", 0),
        scheduling_strategy=PlacementGroupSchedulingStrategy(group),
    )
    found: tuple[str, str | None] = ray.get(task.remote(), timeout=PATIENCE_SECONDS)
    remove_placement_group(group)
    return found


def main() -> None:
    with runtime.connect(min_cpus=1):
        before = machines()
        runtime.check_capacity(num_workers=16, cpus_per_worker=1, gpus_per_worker=1)
        met = {
            "data": met_on({"CPU": 2}),
            "gpus": met_on({"CPU": 1, "GPU": 8}),
            "h100": met_on({"CPU": 1, "GPU": 8, "accelerator_type:H100": 0.001}),
        }
        deadline = time.monotonic() + PATIENCE_SECONDS
        while machines() > before and time.monotonic() < deadline:
            time.sleep(0.5)
        print(json.dumps({"grows": runtime.grows(), "before": before, "met": met, "after": machines()}))


if __name__ == "__main__":
    main()
