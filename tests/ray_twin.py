"""A twin of ray_cluster.yaml on this machine: its node types, Ray's head and autoscaler, processes for machines."""

import copy
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider
from ray.autoscaler._private.util import prepare_config

from cluster.stack import Process, end
from tests.servers import START_SECONDS, free_port

CPUS_EACH = 2.0
IDLE_MINUTES = 0.1


def twin_of(config: Mapping[str, Any], gcs_address: str) -> dict[str, Any]:
    """The same node types with the same limits, their CPUs cut to a few; a provider starts them as processes."""
    twin = prepare_config(copy.deepcopy(dict(config)))
    for node_type in twin["available_node_types"].values():
        resources = node_type["resources"]
        resources["CPU"] = min(resources["CPU"], CPUS_EACH)
        node_type["node_config"] = {}
    twin["provider"] = {
        "type": "external",  # as "fake_multinode" Ray would look for a file that its wheels lack
        "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
        "gcs_address": gcs_address,
        "head_node_id": FAKE_HEAD_NODE_ID,
        "launch_multiple": True,
        "disable_node_updaters": True,  # its machines come up with Ray running: nothing is set up over SSH
    }
    for unused in ("docker", "file_mounts", "auth", "initialization_commands"):
        twin[unused] = type(twin[unused])()
    return twin | {"idle_timeout_minutes": IDLE_MINUTES}


@contextmanager
def ray_twin(config_file: Path) -> Iterator[dict[str, str]]:
    """Start the twin; yields the environment that its clients need. Only processes of its own are ended."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # not pytest's: the paths of Ray's sockets must be short
    port = free_port()
    config = twin_of(yaml.safe_load(config_file.read_text()), f"127.0.0.1:{port}")
    (folder / "twin.yaml").write_text(json.dumps(config))
    client = os.environ | {
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    # What makes the provider of processes work.
    head = client | {
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    head.pop("RAY_ADDRESS")
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *(f"--port={port}", f"--temp-dir={folder}"),
        *("--num-cpus=0", "--object-store-memory=100000000", f"--autoscaling-config={folder}/twin.yaml"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={free_port()}", "--dashboard-agent-listen-port=0"),
        *("--min-worker-port=0", "--max-worker-port=0", f"--ray-client-server-port={free_port()}"),
    ]
    log = folder / "head.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, env=head)
    head_process = Process.of(process.pid)
    try:
        deadline = time.monotonic() + START_SECONDS
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield client
    finally:
        # Ray's own `ray stop`, which its AutoscalingCluster calls, ends every Ray process of the machine.
        end([head_process])
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
