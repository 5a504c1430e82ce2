"""ray_cluster.yaml and the image it names: valid for Ray, pinned, without secrets; and its node types scale."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.runtime import MARKET_TYPE, SPOT
from tests.ray_twin import ray_twin

ROOT = Path(__file__).parents[2]
CONFIG_FILE = ROOT / "ray_cluster.yaml"
KUBERAY = ROOT / "cluster" / "kuberay"
DEPLOYMENT_FILES = (CONFIG_FILE, ROOT / "cluster" / "Dockerfile", *sorted(KUBERAY.glob("*.yaml")))
HEAD = "ray.head.default"
EFA_CARDS = {"p5.48xlarge": 32, "p5en.48xlarge": 16}
SECRETS = {
    "an access key id": r"\b(AKIA|ASIA)[A-Z0-9]{16}\b",
    "a secret key": r"(?i)(secret|access)_?(access)?_?key\s*[:=]\s*\S",
    "a token or password": r"(?i)(auth_token|password|passwd)[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9+/]{8,}",
    "a private key": r"BEGIN [A-Z ]*PRIVATE KEY",
}


@pytest.fixture
def config() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(CONFIG_FILE.read_text())
    return loaded


@pytest.fixture
def node_types(config: dict[str, Any]) -> dict[str, Any]:
    types: dict[str, Any] = config["available_node_types"]
    return types


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found
    return found[1]


def image_tag() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return f"{project['version']}-ray{pinned('ray')}"


def test_it_passes_rays_own_validation(config: dict[str, Any]) -> None:
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["head_node_type"] == HEAD
    config["available_node_types"][HEAD]["min_worker"] = 0
    with pytest.raises(Exception, match="min_worker"):
        validate_config(prepare_config(config))


def test_the_head_is_never_spot_and_offers_no_cpu(node_types: dict[str, Any]) -> None:
    head = node_types[HEAD]
    assert "InstanceMarketOptions" not in head["node_config"]
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0


def test_workers_scale_to_zero_within_limits(config: dict[str, Any], node_types: dict[str, Any]) -> None:
    workers = {name: settings for name, settings in node_types.items() if name != HEAD}
    assert workers.keys() == {"cpu_data", "gpu_p5", "gpu_p5en_spot"}
    for settings in workers.values():
        assert settings["min_workers"] == 0 < settings["max_workers"] <= config["max_workers"]
    spot = {name for name, settings in workers.items() if "InstanceMarketOptions" in settings["node_config"]}
    assert spot == {"gpu_p5en_spot"}
    labelled = {name for name, settings in node_types.items() if "labels" in settings}
    assert labelled == spot
    assert all(node_types[name]["labels"] == {MARKET_TYPE: SPOT} for name in spot)
    assert 0 < config["idle_timeout_minutes"] <= 30
    assert config["provider"]["cache_stopped_nodes"] is False


def test_nodes_reach_s3_by_their_profile_and_metadata_asks_for_a_session_token(node_types: dict[str, Any]) -> None:
    for settings in node_types.values():
        node = settings["node_config"]
        assert node["IamInstanceProfile"].keys() == {"Name"}
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])


def test_efa_is_on_every_card_of_the_types_that_have_it_and_only_there(node_types: dict[str, Any]) -> None:
    for settings in node_types.values():
        node = settings["node_config"]
        cards = EFA_CARDS.get(node["InstanceType"], 0)
        interfaces = node.get("NetworkInterfaces", [])
        placed = [(each["NetworkCardIndex"], each["DeviceIndex"], each["InterfaceType"]) for each in interfaces]
        if not cards:
            assert not placed
            assert "docker" not in settings
            continue
        others = [(card, 0, "efa-only") for card in range(1, cards)]
        assert placed == [(0, 0, "interface"), (0, 1, "efa-only"), *others]
        assert not node.keys() & {"SubnetId", "SubnetIds", "SecurityGroupIds"}  # Ray takes them from the interfaces
        options = " ".join(settings["docker"]["worker_run_options"])
        for wanted in ("FI_PROVIDER=efa", "FI_EFA_USE_DEVICE_RDMA=1", "NCCL_SOCKET_IFNAME=^lo,docker", "--shm-size="):
            assert wanted in options


def test_the_token_is_asked_for_and_the_dashboard_listens_on_loopback(config: dict[str, Any]) -> None:
    options = config["docker"]["run_options"]
    assert {"--env RAY_AUTH_MODE=token", "--env RAY_USAGE_STATS_ENABLED=0"} <= set(options)
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    (start,) = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in start
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start


def test_every_image_is_the_one_of_these_versions() -> None:
    tags = {path.name: set(re.findall(r"/medsynth:(\S+)", path.read_text())) for path in DEPLOYMENT_FILES}
    assert tags.pop("serviceaccount.yaml") == set()
    assert tags.keys() == {"ray_cluster.yaml", "Dockerfile", "raycluster.yaml", "rayjob.yaml"}
    assert set().union(*tags.values()) == {image_tag()}
    assert all(tags.values())


def test_the_image_is_built_from_pinned_parts_by_nobody_special() -> None:
    lines = (ROOT / "cluster" / "Dockerfile").read_text().splitlines()
    instructions = [line for line in lines if re.match(r"[A-Z]+ ", line)]
    bases = [line.split()[1] for line in instructions if line.startswith("FROM ")]
    assert bases
    assert all(re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*", base) for base in bases)
    versions = [line for line in instructions if line.startswith("ARG ")]
    assert all(re.fullmatch(r"ARG \w+=\d+\.\d+\.\d+", line) for line in versions)
    assert not any(line.startswith("ADD ") for line in instructions)
    assert any("--constraint /opt/medsynth/constraints.txt" in line for line in instructions)
    users = [line.split()[1] for line in instructions if line.startswith("USER ")]
    assert users[-1] == "ray"


def test_only_named_files_enter_the_image() -> None:
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert patterns[0] == "*"
    allowed = {pattern.removeprefix("!") for pattern in patterns if pattern.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {name.partition(".")[0] for name in project["packages"]}
    documents = {"LICENSE", "README.md", "constraints.txt", "medsynth.py", "pyproject.toml", "recipes"}
    assert allowed == packages | documents
    assert all((ROOT / name).exists() for name in allowed)


@pytest.mark.parametrize("path", DEPLOYMENT_FILES, ids=lambda path: path.name)
def test_no_secret_is_written_down(path: Path) -> None:
    for what, pattern in SECRETS.items():
        assert not re.search(pattern, path.read_text()), f"{path.name} seems to hold {what}"


@pytest.mark.slow
def test_node_types_scale_up_from_zero_and_back() -> None:
    job = [sys.executable, str(Path(__file__).with_name("scaling_job.py"))]
    with ray_twin(CONFIG_FILE) as environment:
        environment |= {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(job, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        environment |= {"RAY_AUTH_TOKEN": "another"}
        refused = subprocess.run(job, env=environment, capture_output=True, text=True, timeout=100)
    met = {"data": ["cpu_data", None], "gpus": ["gpu_p5en_spot", SPOT], "h100": ["gpu_p5", None]}
    assert json.loads(done.stdout.splitlines()[-1]) == {"grows": True, "before": 1, "met": met, "after": 1}
    assert refused.returncode != 0
    assert "token" in refused.stderr
