"""Connecting to Ray: an own cluster, a wrong address, a job too large."""

import psutil
import pytest
import ray

from cluster import runtime
from cluster.errors import UserError
from cluster.nodes import Node
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
