"""Ray: a cluster to run on, the one named by RAY_ADDRESS or one of this process alone."""

import logging
import os
import signal
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, Generic, TypeVar

import ray
import ray.util
from ray import PlacementGroupID
from ray._private import ray_constants
from ray._raylet import (  # type: ignore[attr-defined]  # its stub lacks them
    GCS_AUTOSCALER_STATE_NAMESPACE,
    GCS_AUTOSCALER_V2_ENABLED_KEY,
)
from ray.exceptions import ObjectLostError, RayError, RayTaskError
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.placement_group import PlacementGroup, get_current_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.environment import WAIT_POLICY, variables
from cluster.errors import UserError
from cluster.nodes import Node
from cluster.provenance import ray_job

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

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
MARKET_TYPE, SPOT = "ray.io/market-type", "spot"
"""A machine's label, by Ray's words, and what it says of one that may be taken back at any time."""
ANYWHERE = "DEFAULT"
"""Scheduling strategy, by Ray's word, of what may run outside the placement group of whoever starts it: a sweep's trial
is given next to nothing by Tune, and its tasks would have to fit in there."""


@contextmanager
def connect(min_cpus: int) -> Iterator[None]:
    """Be connected to Ray inside the block.

    With RAY_ADDRESS set, to that cluster. Else a cluster is started inside this process and ended with the
    block; it offers at least `min_cpus`, even where the machine has fewer cores, and listens on 127.0.0.1 alone.

    Raises UserError, within seconds, when RAY_ADDRESS names no cluster.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = cluster_address()
    if address == "local":
        # Nobody drains one's own machine: Ray Train need not start a process that watches for it with every stage.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with ExitStack() as own:
        try:
            with _own_end():
                if address != "local":
                    _check_answers(address)
                    names = (*FORWARDED_VARIABLES, WAIT_POLICY)
                    forwarded = {name: os.environ[name] for name in names if name in os.environ}
                    # A job may have been given the same variables, which Ray otherwise takes for a contradiction.
                    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
                    ray.init(address=address, runtime_env={"env_vars": forwarded}, **quiet)
                else:
                    own.enter_context(_this_machine_alone())
                    _start_own(num_cpus=max(min_cpus, os.cpu_count() or 1), include_dashboard=False, **quiet)
        except ConnectionError as error:
            raise UserError(
                f"no Ray cluster answers at RAY_ADDRESS={address} ({str(error).splitlines()[0]}): "
                "start it with 'ray start --head', or unset RAY_ADDRESS to run on this machine alone"
            ) from None
        except (RayError, RuntimeError, ValueError, OSError) as error:
            raise UserError(
                f"Ray cannot be started or reached (RAY_ADDRESS={address}): {_one_line(error)}: "
                "see that Ray has one version everywhere, and set RAY_AUTH_MODE=token where the cluster wants one"
            ) from None
        own.callback(ray.shutdown)
        yield


def cluster_address() -> str:
    """RAY_ADDRESS, or "local" where it is not set, or empty."""
    return os.environ.get("RAY_ADDRESS", "").strip() or "local"


def _start_own(**settings: Any) -> None:
    """Start Ray inside this process, with a second try where a busy machine was too slow for the first.

    Raises UserError if its folder cannot be used, or neither try succeeds.
    """
    folder = os.environ.get("RAY_TMPDIR") or "/tmp"
    for is_last in (False, True):
        try:
            ray.init(address="local", **settings)
            return
        except Exception as error:  # Ray raises plain ones where a process of its own does not answer in time
            ray.shutdown()
            if isinstance(error, OSError) and not isinstance(error, TimeoutError | ConnectionError):
                raise UserError(_folder_mistake(folder, error)) from None
            if is_last:
                raise UserError(
                    f"Ray did not start on this machine, twice: {_one_line(error)}: "
                    f"see that it has memory and processor time to spare, and the logs in {folder}/ray/session_latest"
                ) from None
            logger.warning("Ray did not start, and is started once more: %s", _one_line(error))


def _folder_mistake(folder: str, error: OSError) -> str:
    if "AF_UNIX" in str(error):
        reason, remedy = "its path is too long for sockets, of which Ray makes some there", "a shorter one"
    else:
        reason, remedy = error.strerror or _one_line(error), "one with room where you may write"
    return f"Ray cannot work in {folder}: {reason}: set RAY_TMPDIR to {remedy}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or repr(error)


@contextmanager
def _this_machine_alone() -> Iterator[None]:
    """A Ray that is started inside the block listens on 127.0.0.1.

    Else it takes an address that other machines reach, and listens on all, whatever it is told. What says so is read
    from the environment when Ray is imported, by the processes that it starts too.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    with variables({ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}):
        ray_constants.ENABLE_RAY_CLUSTER = False
        try:
            yield
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _own_end() -> Iterator[None]:
    """Keep what this process does when it is to end (SIGTERM): Ray would exit at once, with nothing saved."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


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


def check_outlives_job(storage: str, setting: str = "cluster.storage=") -> None:
    """Raise UserError when a job of a cluster is about to keep its results in the folder that it was uploaded to.

    Ray deletes that some time after the job.
    """
    if ray_job() and "://" not in storage and not storage.startswith("/"):
        raise UserError(
            f"{setting}{storage} would be lost with the job's folder: give an s3:// URI, or an absolute path "
            "that all nodes share"
        )


def check_capacity(
    *, num_workers: int, cpus_per_worker: int, gpus_per_worker: int, cpus_beside: int = 0, gpus_beside: int = 0
) -> None:
    """Raise UserError when the connected cluster could never hold the workers, rather than wait for ever.

    Nor what is to run beside them: it would wait until they end. Nothing is refused where the cluster grows.
    """
    if grows():
        return
    total = ray.cluster_resources()
    for resource, each, beside in (("CPU", cpus_per_worker, cpus_beside), ("GPU", gpus_per_worker, gpus_beside)):
        needed, there = num_workers * each + beside, int(total.get(resource, 0))
        if needed > there:
            who = f"{num_workers} workers" + (" and the fidelity measured beside them" if beside else "")
            raise UserError(
                f"{who} need {needed} {resource}s, the Ray cluster has {there}: "
                "set cluster.num_workers lower, or connect to a larger cluster with RAY_ADDRESS"
            )


def total(resource: str) -> int:
    """How many of a resource, such as GPU, the connected cluster has now, in use or not."""
    return int(ray.cluster_resources().get(resource, 0))


def grows() -> bool:
    """Whether the connected cluster has an autoscaler, which adds machines for what waits; how many, Ray does not say.

    What is there now then says nothing of what could be: such a cluster may be a head alone, with no CPU to offer.
    """
    enabled = _internal_kv_get(GCS_AUTOSCALER_V2_ENABLED_KEY, namespace=GCS_AUTOSCALER_STATE_NAMESPACE)
    return bool(enabled == b"1")


def current_placement_group() -> str:
    """The id of the placement group that this worker is in."""
    group = get_current_placement_group()
    return str(group.id.hex()) if group else ""


def remove_placement_group(group_id: str) -> None:
    """Give back what a placement group holds; nothing happens if the connected cluster has none of that id."""
    known = ray.util.placement_group_table().get(group_id)
    if known and known["state"] != "REMOVED":
        ray.util.remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group_id))))


def here() -> NodeAffinitySchedulingStrategy:
    """Scheduling strategy of what must not be lost with another machine than this one."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def off_spot() -> dict[str, str]:
    """Label selector of what must not be lost with a spot machine; those that have no label will do.

    It asks for nothing where this process is on a spot machine itself: both are lost with it, and none else may exist.
    """
    labels: Any = ray.get_runtime_context().get_node_labels()  # whose values Ray declares as lists
    return {} if labels.get(MARKET_TYPE) == SPOT else {MARKET_TYPE: f"!{SPOT}"}


def call(function: Callable[..., R], *arguments: Any, cpus: float, gpus: float, **settings: Any) -> R:
    """What the function returns, called in a process of its own that holds these CPUs and GPUs.

    Raises what it raises, as itself.
    """
    task = ray.remote(function).options(num_cpus=cpus, num_gpus=gpus, scheduling_strategy=ANYWHERE)
    try:
        result: R = ray.get(task.remote(*arguments, **settings))
    except RayTaskError as error:
        raise error.cause from error
    return result


def map_actors(
    make_worker: Callable[[], Callable[[T], R]],
    shares: Sequence[T],
    *,
    num_actors: int,
    cpus_per_actor: float = 1,
    gpus_per_actor: float = 0,
    max_retries: int = 3,
    on_done: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[R]:
    """Yield the result of each share, in the order of `shares`, worked on by actors of the connected cluster.

    Each of at most `num_actors` actors calls `make_worker` once, which may take long, and then takes the next share
    whenever it is free; those that find no room on the cluster are not waited for. A share whose actor was killed is
    done again by a fresh one, up to `max_retries` times. Results that are not yet their turn stay in Ray's object
    store, where they may spill to disk. `on_done` is told (shares done, of how many). Work begins when the first
    result is asked for, and the actors end with the iteration, however it ends.

    Raises what a worker raises, as itself; UserError when no actor could ever be placed, or a share kills its actors.
    """
    _check_holds(CPU=cpus_per_actor, GPU=gpus_per_actor)
    hire: Any = (
        ray.remote(_Actor)
        .options(num_cpus=cpus_per_actor, num_gpus=gpus_per_actor, scheduling_strategy=ANYWHERE)
        .remote
    )
    waiting = deque(range(len(shares)))
    busy: dict[Any, tuple[Any, int | None, Any]] = {}  # end of a call: its actor, share (None: starting) and result
    finished: dict[int, Any] = {}
    deaths: Counter[int | None] = Counter()
    upcoming = 0

    def start() -> None:
        actor = hire(make_worker)
        busy[actor.__ray_ready__.remote()] = (actor, None, None)

    def redo(share: int | None, error: RayError) -> None:
        deaths[share] += 1
        if deaths[share] > max_retries:
            when = "starting" if share is None else f"at share {share} of {len(shares)}"
            raise UserError(
                f"an actor was lost {deaths[share]} times {when} ({str(error).strip().splitlines()[0]}): "
                "give it more memory or less to do, and see the cluster's logs"
            ) from error
        if share is not None:
            waiting.appendleft(share)
        start()

    def settle(end: Any) -> None:
        actor, share, result = busy.pop(end)
        try:
            ray.get(end)
        except RayTaskError as error:
            ray.kill(actor)
            raise error.cause from error
        except RayError as error:  # the actor's process or machine is gone
            ray.kill(actor)
            redo(share, error)
            return
        if share is not None:
            finished[share] = result
            on_done(upcoming + len(finished), len(shares))
        if not waiting:
            ray.kill(actor)
            return
        share = waiting.popleft()
        end, result = actor.work.options(num_returns=2).remote(shares[share])
        busy[end] = (actor, share, result)

    try:
        for _ in range(min(num_actors, len(shares))):
            start()
        while upcoming < len(shares):
            if busy:
                ended, _ = ray.wait(list(busy), timeout=0 if upcoming in finished else None)
                for end in ended:
                    settle(end)
            if upcoming in finished:
                try:
                    result = ray.get(finished.pop(upcoming))
                except ObjectLostError as error:  # with the machine that kept it
                    redo(upcoming, error)
                    continue
                upcoming += 1
                yield result
                del result  # may be large
    finally:
        for actor, _, _ in busy.values():
            ray.kill(actor)


class _Actor(Generic[T, R]):
    """A process with a worker. A call's first value is small: it tells of its end before its result is fetched."""

    def __init__(self, make_worker: Callable[[], Callable[[T], R]]) -> None:
        self._make_worker = make_worker

    @cached_property
    def _worker(self) -> Callable[[T], R]:
        return self._make_worker()

    def work(self, share: T) -> tuple[None, R]:
        return None, self._worker(share)


def _check_holds(**needed: float) -> None:
    if grows():
        return
    total = ray.cluster_resources()
    for resource, amount in needed.items():
        if amount > total.get(resource, 0):
            raise UserError(
                f"an actor needs {amount:g} {resource}, the Ray cluster has {total.get(resource, 0):g}: "
                "ask for less, or connect to a larger cluster with RAY_ADDRESS"
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
