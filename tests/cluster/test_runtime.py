"""Connecting to Ray: an own cluster, a wrong address, a job too large."""

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from cluster import runtime
from cluster.errors import UserError
from cluster.nodes import Node
from cluster.provenance import RAY_JOB_VARIABLE
from data_shards.parallel import names_cluster
from tests.servers import free_port


def test_an_address_where_nothing_answers_is_a_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with (
        pytest.raises(UserError, match=f"no Ray cluster answers at RAY_ADDRESS={address}") as caught,
        runtime.connect(1),
    ):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "somewhere", "127.0.0.1:"])
def test_an_address_of_another_kind_is_explained(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=f"RAY_ADDRESS={address} is no address of a cluster"), runtime.connect(1):
        pass


@pytest.mark.parametrize("value", ["", " ", None, "local"])
def test_an_empty_address_is_none(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", value or "")
    if value is None:
        monkeypatch.delenv("RAY_ADDRESS")
    assert runtime.cluster_address() == "local"
    assert not names_cluster()


def test_a_folder_that_ray_cannot_work_in_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "file").touch()
    for folder, reason in (
        (tmp_path / ("x" * 100), "its path is too long for sockets, .*: set RAY_TMPDIR to a shorter one"),
        (tmp_path / "file", "Not a directory: set RAY_TMPDIR to one with room where you may write"),
    ):
        monkeypatch.setenv("RAY_TMPDIR", str(folder))
        with pytest.raises(UserError, match=f"Ray cannot work in {folder}: {reason}") as caught, runtime.connect(1):
            pass
        assert "\n" not in str(caught.value)
        assert not ray.is_initialized()


@pytest.mark.parametrize("failures", [1, 2])
def test_a_ray_that_is_slow_to_start_has_a_second_try(failures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    tries = []

    def init(**_: Any) -> None:
        tries.append(time.monotonic())
        if len(tries) <= failures:
            raise Exception("The current node timed out during startup. This could happen because\nsome of it failed.")

    monkeypatch.setattr(ray, "init", init)
    if failures == 1:
        with runtime.connect(1):
            pass
    else:
        with pytest.raises(UserError, match=r"twice: The current node timed out .* because some of it") as caught:
            runtime.connect(1).__enter__()
        assert "\n" not in str(caught.value)
    assert len(tries) == 2


def test_what_a_job_would_lose_with_its_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.check_outlives_job("runs")
    monkeypatch.setenv(RAY_JOB_VARIABLE, json.dumps({"metadata": {"job_submission_id": "a-job"}}))
    for kept in ("s3://bucket/runs", "/shared/runs", "file:///shared/runs"):
        runtime.check_outlives_job(kept)
    with pytest.raises(UserError, match=r"cluster\.storage=demo/runs would be lost with the job's folder"):
        runtime.check_outlives_job("demo/runs")


def test_being_ended_means_the_same_in_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's handler exits at once."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with runtime._own_end():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


GPU_NODE = {"CPU": 8.0, "GPU": 8.0, "accelerator_type:H100": 1.0, "memory": 7e11, "object_store_memory": 2e11}


def test_a_machine_by_what_ray_says_of_it() -> None:
    assert runtime._node(GPU_NODE, False) == Node(8, "H100", 9 * 10**11, False)
    assert runtime._node({"CPU": 2.0, "memory": 1e9}, True) == Node(0, None, None, True)
    two_kinds = GPU_NODE | {"accelerator_type:A100": 1.0}
    assert runtime._node(two_kinds, False).accelerator_type is None


@pytest.mark.slow
def test_an_own_cluster_offers_what_is_asked_and_ends_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with runtime.connect(min_cpus=6):
        assert ray.cluster_resources()["CPU"] >= 6
        (node,) = runtime.nodes()
        assert node.is_here
        assert not runtime.grows()
        assert node.memory_bytes is not None
        assert 0.1 < node.memory_bytes / psutil.virtual_memory().total <= 1
        runtime.check_capacity(num_workers=3, cpus_per_worker=2, gpus_per_worker=0)
        with pytest.raises(UserError, match="100 workers need 200 CPUs"):
            runtime.check_capacity(num_workers=100, cpus_per_worker=2, gpus_per_worker=0)
        with pytest.raises(UserError, match="need 1000 GPUs"):
            runtime.check_capacity(num_workers=1000, cpus_per_worker=0, gpus_per_worker=1)
        with runtime.connect(min_cpus=1):
            pass
        assert ray.is_initialized()
    assert not ray.is_initialized()
