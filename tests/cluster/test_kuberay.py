"""The manifests for KubeRay: fields that its resource definitions know, and the same cluster in both."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.runtime import MARKET_TYPE, SPOT
from trainers.recipe import load_recipe

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "cluster" / "kuberay"
SCHEMAS = ROOT / "tests" / "data" / "kuberay"


def load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((MANIFESTS / name).read_text())
    return loaded


def validate(document: dict[str, Any]) -> None:
    kubernetes = json.loads((SCHEMAS / "kubernetes-1.35.json").read_text())
    ray = json.loads((SCHEMAS / "ray.io-v1.json").read_text())
    kind = document["kind"]
    name = kind if kind in ray else f"io.k8s.api.core.v1.{kind}"
    schema = {"$defs": kubernetes | ray, "$ref": f"#/$defs/{name}"}
    jsonschema.Draft202012Validator(schema).validate(document)


def specification(document: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = document["spec"]
    return spec.get("rayClusterSpec", spec) if document["kind"] == "RayJob" else spec


def pods(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    workers = {group["groupName"]: group["template"]["spec"] for group in spec["workerGroupSpecs"]}
    return {"head": spec["headGroupSpec"]["template"]["spec"]} | workers


@pytest.mark.parametrize("name", sorted(path.name for path in MANIFESTS.glob("*.yaml")))
def test_a_manifest_is_what_its_resource_definition_takes(name: str) -> None:
    document = load(name)
    validate(document)
    assert "namespace" not in document["metadata"]


def test_a_misspelt_field_or_quantity_is_found() -> None:
    def misspell(change: Any) -> None:
        document = load("raycluster.yaml")
        change(document["spec"])
        with pytest.raises(jsonschema.ValidationError):
            validate(document)

    misspell(lambda spec: spec.update(enableIntreeAutoscaling=True))
    misspell(lambda spec: spec["workerGroupSpecs"][0].pop("maxReplicas"))
    misspell(lambda spec: spec["workerGroupSpecs"][0].update(minReplicas="0"))
    misspell(lambda spec: spec["authOptions"].update(mode="tokens"))
    misspell(lambda spec: pods(spec)["gpu"].update(toleration=[]))
    misspell(lambda spec: pods(spec)["gpu"]["containers"][0]["resources"]["limits"].update(memory="16GB"))
    misspell(lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}))


def test_the_job_brings_the_cluster_and_takes_it_away() -> None:
    job = load("rayjob.yaml")["spec"]
    assert job["rayClusterSpec"] == load("raycluster.yaml")["spec"]
    assert job["shutdownAfterJobFinishes"]
    assert job["ttlSecondsAfterFinished"] > 0
    command, verb, recipe, *options = job["entrypoint"].split()
    assert (command, verb) == ("medsynth", "train")
    overrides = [value for option, value in pairwise(options) if option == "--set"]
    loaded = load_recipe(str(ROOT / Path(recipe).relative_to("/opt/medsynth")), overrides)
    assert loaded.cluster.storage.startswith("s3://")


def test_workers_scale_from_zero_and_the_head_has_no_gpu() -> None:
    spec = load("raycluster.yaml")["spec"]
    assert spec["enableInTreeAutoscaling"]
    assert spec["authOptions"] == {"mode": "token"}
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    with_gpus = {
        name for name, pod in pods(spec).items() if "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]
    }
    assert with_gpus == {"gpu"}
    groups = {group.get("groupName", "head"): group for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])}
    labels = {name: group["labels"] for name, group in groups.items() if "labels" in group}
    assert labels == {"gpu": {MARKET_TYPE: SPOT}}


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_pods_are_limited_unprivileged_and_hold_no_value_of_a_secret(name: str) -> None:
    spec = specification(load(name))
    assert spec["rayVersion"] in (ROOT / "constraints.txt").read_text()
    for pod in pods(spec).values():
        (container,) = pod["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert container["envFrom"] == [{"secretRef": {"name": "medsynth"}}]
        assert not any(re.search("TOKEN|PASSWORD|SECRET|ACCESS_KEY", variable["name"]) for variable in container["env"])
        assert pod["serviceAccountName"] == load("serviceaccount.yaml")["metadata"]["name"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        assert pod["volumes"][0]["emptyDir"]["medium"] == "Memory"
