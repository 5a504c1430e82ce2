"""Connecting to Ray: an own cluster, a wrong address, a job too large."""

import pytest
import ray

from cluster import runtime
from cluster.errors import UserError
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


@pytest.mark.slow
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
