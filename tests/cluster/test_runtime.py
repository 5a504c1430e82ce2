"""Connecting to Ray: an own cluster, a wrong address, a job too large."""

import socket

import pytest
import ray

from cluster import runtime
from cluster.errors import UserError

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_an_address_where_nothing_answers_is_a_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with (
        pytest.raises(UserError, match=f"no Ray cluster answers at RAY_ADDRESS={address}") as caught,
        runtime.connect(1),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_an_own_cluster_offers_what_is_asked_and_ends_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with runtime.connect(min_cpus=6):
        assert ray.cluster_resources()["CPU"] >= 6
        runtime.check_capacity(num_workers=3, cpus_per_worker=2, gpus_per_worker=0)
        with pytest.raises(UserError, match="100 workers need 200 CPUs"):
            runtime.check_capacity(num_workers=100, cpus_per_worker=2, gpus_per_worker=0)
        with pytest.raises(UserError, match="need 1000 GPUs"):
            runtime.check_capacity(num_workers=1000, cpus_per_worker=0, gpus_per_worker=1)
        with runtime.connect(min_cpus=1):
            pass
        assert ray.is_initialized()
    assert not ray.is_initialized()
