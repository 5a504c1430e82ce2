"""What each machine of the cluster has, as JSON: python -m cluster.node_probe.

A process of its own, which `doctor` ends when Ray does not come to an answer.
"""

import json
import platform
import sys
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import runtime
from cluster.errors import UserError

ANSWER_SECONDS = 30  # a machine has to start a process


class _Probe:
    """Runs on each machine; knows nothing of this project, which may not be there."""

    def versions(self) -> dict[str, str]:
        return {"python": platform.python_version(), "ray": ray.__version__}

    def clock(self) -> float:
        return time.time()


def probe() -> list[dict[str, Any]]:
    """Of each machine alive: its `name`, `python` and `ray`, and `ahead`, its clock's seconds before ours.

    Those of a machine that does not answer are left out. Raises UserError if no cluster answers.
    """
    with runtime.connect(min_cpus=1):
        nodes = [node for node in ray.nodes() if node["Alive"]]
        actors: list[Any] = [
            ray.remote(_Probe)
            .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            .remote()
            for node in nodes
        ]
        answers = [actor.versions.remote() for actor in actors]
        there, _ = ray.wait(answers, num_returns=len(answers), timeout=ANSWER_SECONDS)
        found: list[dict[str, Any]] = []
        for node, actor, answer in zip(nodes, actors, answers, strict=True):
            about: dict[str, Any] = {"name": f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"}
            if answer in there:
                versions: dict[str, str] = ray.get(answer)
                asked = time.time()
                clock: float = ray.get(actor.clock.remote(), timeout=ANSWER_SECONDS)
                about |= {**versions, "ahead": clock - (asked + time.time()) / 2}
            found.append(about)
        return found


if __name__ == "__main__":  # which has Ray send `_Probe` itself along, not its name
    try:
        print(json.dumps(probe()))
    except UserError as error:
        sys.exit(str(error))
