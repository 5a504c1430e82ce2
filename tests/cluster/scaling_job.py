"""What test_ray_cluster.py runs on the twin, as a client of its own: asks for machines that are not there, in turn.

Prints, as JSON, the type of machine that each demand was met on, and how many machines there were before and after.
"""

import json
import os
import time
from collections.abc import Mapping

import ray
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster import runtime

PATIENCE_SECONDS = 120


def machines() -> int:
    return sum(node["Alive"] for node in ray.nodes())


def met_on(bundle: Mapping[str, float]) -> str:
    """The type of machine that a placement group of this bundle, and a task in it, came to be on."""
    group = placement_group([dict(bundle)])
    ray.get(group.ready(), timeout=PATIENCE_SECONDS)
    task = ray.remote(lambda: os.environ["RAY_NODE_TYPE_NAME"]).options(
        num_cpus=bundle["CPU"],
        num_gpus=bundle.get("GPU", 0),
        scheduling_strategy=PlacementGroupSchedulingStrategy(group),
    )
    name: str = ray.get(task.remote(), timeout=PATIENCE_SECONDS)
    remove_placement_group(group)
    return name


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
        print(json.dumps({"before": before, "met": met, "after": machines()}))


if __name__ == "__main__":
    main()
