"""Ray: a cluster to run on, the one named by RAY_ADDRESS or one of this process alone."""

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from cluster.errors import UserError

# Settings that workers on other machines need to find the same servers. Never credentials: those are each node's own.
FORWARDED_VARIABLES = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "HF_HUB_OFFLINE",
)
CONNECT_SECONDS = 10
ACCELERATOR_TYPE = "accelerator_type:"


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, as Ray knows it."""

    num_gpus: int
    accelerator_type: str | None  # of its GPUs, by Ray's name for it (H100, A100-80G, ...); None if Ray does not know
    memory_bytes: int | None  # of the host, free when Ray started there; None if Ray does not know
    is_here: bool  # the machine that this process runs on


@contextmanager
def connect(min_cpus: int) -> Iterator[None]:
    """Be connected to Ray inside the block.

    With RAY_ADDRESS set, to that cluster. Else a cluster is started inside this process and ended with the
    block; it offers at least `min_cpus`, even where the machine has fewer cores.

    Raises UserError, within seconds, when RAY_ADDRESS names no cluster.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS", "local")
    try:
        if address != "local":
            _check_answers(address)
            forwarded = {name: os.environ[name] for name in FORWARDED_VARIABLES if name in os.environ}
            ray.init(address=address, runtime_env={"env_vars": forwarded}, **quiet)
        else:
            num_cpus = max(min_cpus, os.cpu_count() or 1)
            ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **quiet)
    except ConnectionError as error:
        raise UserError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({str(error).splitlines()[0]}): "
            "start it with 'ray start --head', or unset RAY_ADDRESS to run on this machine alone"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Knock at the cluster's door. Ray itself would go on knocking for minutes before it gives up.

    Raises ConnectionError if nobody listens there, UserError if the address is of another kind.
    """
    if address == "auto":  # Ray looks on this machine, and says so quickly if it finds nothing
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if "/" in host or not host or not port.isdigit():
        raise UserError(
            f"RAY_ADDRESS={address} is no address of a cluster: give HOST:PORT, such as 127.0.0.1:6379 "
            "(an http:// address is that of the job server, for 'ray job submit')"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ConnectionError(error.strerror or str(error)) from None


def check_capacity(*, num_workers: int, cpus_per_worker: int, gpus_per_worker: int) -> None:
    """Raise UserError when the connected cluster could never hold the workers, rather than wait for ever."""
    total = ray.cluster_resources()
    for resource, each in (("CPU", cpus_per_worker), ("GPU", gpus_per_worker)):
        needed, there = num_workers * each, int(total.get(resource, 0))
        if needed > there:
            raise UserError(
                f"{num_workers} workers need {needed} {resource}s, the Ray cluster has {there}: "
                "set cluster.num_workers lower, or connect to a larger cluster with RAY_ADDRESS"
            )


def nodes() -> tuple[Node, ...]:
    """The machines of the connected cluster that are alive."""
    here = ray.get_runtime_context().get_node_id()
    return tuple(_node(node["Resources"], node["NodeID"] == here) for node in ray.nodes() if node["Alive"])


def _node(resources: Mapping[str, float], is_here: bool) -> Node:
    types = [name.removeprefix(ACCELERATOR_TYPE) for name in resources if name.startswith(ACCELERATOR_TYPE)]
    known = {"memory", "object_store_memory"} <= resources.keys()
    return Node(
        num_gpus=int(resources.get("GPU", 0)),
        accelerator_type=types[0] if len(types) == 1 else None,
        # Ray keeps a part of what it finds for its object store, which takes it only as it is filled.
        memory_bytes=int(resources["memory"] + resources["object_store_memory"]) if known else None,
        is_here=is_here,
    )
