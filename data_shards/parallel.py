"""One function over many items, results in their order: by threads here, or as a Ray Data job on a named cluster."""

import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

from cluster.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

MAX_TASKS = 10_000  # of one map: Ray's driver keeps track of each


class Map(Protocol):
    def __call__(self, function: Callable[[T], R], items: Sequence[T], items_per_task: int = 1) -> Iterator[R]:
        """The function's results, in the order of the items. Raises the first UserError that it raises."""
        ...


def names_cluster() -> bool:
    """Whether RAY_ADDRESS names a cluster, as it does in its jobs."""
    return (os.environ.get("RAY_ADDRESS", "").strip() or "local") != "local"


def is_connected() -> bool:
    """Whether this process is connected to Ray, be it one of its own."""
    ray: Any = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


@contextmanager
def on_named_cluster() -> Iterator[None]:
    """Connected to the cluster that RAY_ADDRESS names, if it names one, for as long as the block lasts."""
    if not names_cluster():
        yield
        return
    from cluster.runtime import connect

    with connect(1):
        yield


@contextmanager
def mapping(num_threads: int) -> Iterator[Map]:
    """A map for as long as the block lasts: on the cluster that RAY_ADDRESS names, else in threads of this process."""
    if names_cluster():
        with on_named_cluster():
            yield _map_on_cluster
        return
    with ThreadPoolExecutor(num_threads) as pool:
        yield lambda function, items, items_per_task=1: pool.map(function, items)


def _map_on_cluster(function: Callable[[T], R], items: Sequence[T], items_per_task: int = 1) -> Iterator[R]:
    """A task may be done twice, when its machine is lost, so the function must leave the same behind each time."""
    if not items:
        return
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it would say that it says nothing
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    num_tasks = min(MAX_TASKS, -(-len(items) // items_per_task))
    with ray.data.DataContext.current(context):
        rows = ray.data.from_items([{"item": pickle.dumps(item)} for item in items], override_num_blocks=num_tasks)
        answers = rows.map(partial(_answer, function))
    for row in answers.iter_rows():
        answer = pickle.loads(row["answer"])
        if isinstance(answer, UserError):
            raise answer
        yield answer


def _answer(function: Callable[[Any], Any], row: dict[str, bytes]) -> dict[str, bytes]:
    """A mistake of the user's comes back as a value: Ray would tell of it in its own words, and of its own stack."""
    try:
        answer = function(pickle.loads(row["item"]))
    except UserError as error:
        answer = error
    return {"answer": pickle.dumps(answer)}
