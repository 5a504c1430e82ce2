"""A map over actors: the plain loop's results, whatever happens to the actors meanwhile."""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
from numpy.typing import NDArray

from cluster import runtime
from cluster.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]
LARGE = 300_000  # float64 values: such a result lies in Ray's shared memory, not in the reply


@pytest.fixture(scope="module", autouse=True)
def _two_cpus() -> Iterator[None]:
    with runtime.connect(min_cpus=2):
        yield


# A test's module may be unknown to Ray's processes, so workers are made by functions within functions.


def drawing() -> Callable[[], Callable[[int], NDArray[np.float64]]]:
    def make() -> Callable[[int], NDArray[np.float64]]:
        return lambda seed: np.random.default_rng(seed).normal(size=LARGE if seed % 2 else 3)

    return make


def living_actors() -> int:
    """Actor processes of this process's cluster; Ray gives them their class's name."""
    names = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            names += process.cmdline()[:1]
    return sum("_Actor" in name for name in names)


def test_results_are_those_of_the_plain_loop_in_its_order() -> None:
    shares = list(range(9))
    told: list[tuple[int, int]] = []
    mapped = runtime.map_actors(
        drawing(), shares, num_actors=20, cpus_per_actor=0.5, on_done=lambda done, total: told.append((done, total))
    )
    loop = drawing()()
    for share, result in zip(shares, mapped, strict=True):
        assert result.tobytes() == loop(share).tobytes()
    assert told == [(done, 9) for done in range(1, 10)]
    assert list(runtime.map_actors(drawing(), [], num_actors=2)) == []


def test_a_killed_actors_share_is_done_again(tmp_path: Path) -> None:
    """kill -9 in mid-share: that share alone is worked twice, by a process that opened its worker anew."""
    log = tmp_path / "log"
    log.touch()

    def make() -> Callable[[int], int]:
        opened = os.getpid()

        def work(share: int) -> int:
            with log.open("a") as file:
                file.write(f"{share}\n")
            if share == 2 and log.read_text().split().count("2") == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            assert opened == os.getpid()
            return share * share

        return work

    assert list(runtime.map_actors(make, range(6), num_actors=2)) == [0, 1, 4, 9, 16, 25]
    assert Counter(map(int, log.read_text().split())) == {share: 2 if share == 2 else 1 for share in range(6)}


def test_a_share_that_kills_every_actor_is_named() -> None:
    def make() -> Callable[[int], int]:
        def work(share: int) -> int:
            if share == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return share

        return work

    results = runtime.map_actors(make, range(3), num_actors=1, max_retries=1)
    assert next(results) == 0
    with pytest.raises(UserError, match="an actor was lost 2 times at share 1 of 3") as caught:
        next(results)
    assert "\n" not in str(caught.value)


def test_what_a_worker_raises_is_raised_and_ends_the_actors() -> None:
    def make() -> Callable[[int], int]:
        def work(share: int) -> int:
            if share == 1:
                raise UserError("the shard is damaged: fetch it again")
            time.sleep(60)
            return share

        return work

    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        list(runtime.map_actors(make, range(2), num_actors=2))
    assert type(caught.value) is UserError
    assert str(caught.value) == "the shard is damaged: fetch it again"
    assert time.monotonic() - started < 30  # the other actor, which would sleep for a minute, was not waited for
    until = time.monotonic() + 10
    while living_actors() and time.monotonic() < until:
        time.sleep(0.1)
    assert not living_actors()


def test_two_actors_work_at_the_same_time(tmp_path: Path) -> None:
    """Each share waits for the other to have begun, so one after the other would wait in vain."""

    def make() -> Callable[[int], int]:
        def work(share: int) -> int:
            (tmp_path / str(share)).touch()
            until = time.monotonic() + 20
            while not (tmp_path / str(1 - share)).exists():
                if time.monotonic() > until:
                    raise TimeoutError(f"share {1 - share} did not begin while share {share} was worked on")
                time.sleep(0.02)
            return os.getpid()

        return work

    seen: list[int] = []
    results = runtime.map_actors(make, range(2), num_actors=2, on_done=lambda *_: seen.append(living_actors()))
    one, other = results
    assert one != other
    assert seen[0] == 2


def test_more_actors_than_the_cluster_has_room_for_are_not_waited_for() -> None:
    available = ray.cluster_resources()["CPU"]
    assert len(list(runtime.map_actors(drawing(), range(4), num_actors=4, cpus_per_actor=available))) == 4
    with pytest.raises(UserError, match="an actor needs 1 GPU, the Ray cluster has 0"):
        list(runtime.map_actors(drawing(), range(4), num_actors=1, gpus_per_actor=1))
