"""Whether everything that a run needs is there, one check at a time; none raises, none takes long, none shows a secret.

What a check writes, it deletes again.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

from packaging.requirements import Requirement
from packaging.version import Version

from cluster import storage
from cluster.errors import UserError, first_line
from cluster.knock import knock

PYTHON = (3, 11)
FREE_DISK_BYTES = 5 * 10**9
SHARED_MEMORY_BYTES = 10**9
ANSWER_SECONDS = 5
NODES_SECONDS = 60
CLOCK_SECONDS = 60  # behind or ahead of a server; S3 refuses requests beyond 15 minutes
NODE_CLOCK_SECONDS = 2
SHARED_MEMORY = Path("/dev/shm")
PROJECT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Check:
    """What was looked at, whether it is well (None: there is nothing to look at), and else what to do."""

    name: str
    ok: bool | None
    found: str
    remedy: str = ""


def examine(bucket: str | None = None, *, short: bool = False) -> Iterator[Check]:
    """Every check, as soon as it is done; in short, those that `medsynth submit` makes too."""
    tracking_uri = os.environ.get("MLFLOW_TRACKING_URI")
    checks: list[Callable[[], Check]] = [job_server, lambda: mlflow_server(tracking_uri)]
    if not short:
        checks = [
            python,
            packages,
            torch,
            *checks,
            nodes,
            lambda: mlflow_registry(tracking_uri),
            lambda: s3(bucket),
            lambda: clock(servers(bucket, tracking_uri)),
            lambda: disk("disk, working folder", Path.cwd()),
            lambda: disk("disk, temporary files", Path(tempfile.gettempdir())),
            lambda: disk("disk, Ray", Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"),
            shared_memory,
        ]
    for check in checks:
        yield check()


def python() -> Check:
    wanted = ".".join(str(part) for part in PYTHON)
    found = f"{platform.python_version()} at {sys.prefix}"
    return Check("Python", sys.version_info[:2] >= PYTHON, found, f"use Python {wanted} or newer")


def packages() -> Check:
    """The versions installed against those that pyproject.toml asks for."""
    wanted = _requirements()
    wrong = []
    for requirement in wanted:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing ({requirement.specifier})")
            continue
        if not requirement.specifier.contains(Version(version), prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        return Check("packages", False, ", ".join(wrong), "pip install -c constraints.txt -e . in medsynth's folder")
    return Check("packages", True, f"all {len(wanted)} as pyproject.toml asks")


def _requirements() -> list[Requirement]:
    """Those of this checkout or job's folder; of the installed medsynth where there is none."""
    project = PROJECT / "pyproject.toml"
    if project.exists():
        lines = tomllib.loads(project.read_text())["project"]["dependencies"]
    else:
        lines = metadata.requires("medsynth") or []
    requirements = [Requirement(line) for line in lines]
    return [found for found in requirements if found.marker is None or found.marker.evaluate({"extra": ""})]


def torch() -> Check:
    """PyTorch, CUDA, NCCL, and the memory of the GPUs."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("torch", False, first_line(error), "pip install -c constraints.txt -e . in medsynth's folder")
    if not torch.cuda.is_available():
        found = f"{torch.__version__}, no GPU"
        if torch.version.cuda and _has_nvidia_driver():
            return Check("torch", False, found, "the driver is too old for this PyTorch's CUDA, or hides its GPUs")
        return Check("torch", None, found)
    nccl = ".".join(str(part) for part in torch.cuda.nccl.version())
    cards = []
    try:
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            cards.append(f"{torch.cuda.get_device_name(index)} {free / 2**30:.0f} of {total / 2**30:.0f} GiB free")
    except RuntimeError as error:
        return Check("torch", False, first_line(error), "a GPU does not answer: see nvidia-smi")
    return Check("torch", True, f"{torch.__version__}, CUDA {torch.version.cuda}, NCCL {nccl}; {'; '.join(cards)}")


def _has_nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists()


def job_server() -> Check:
    """The cluster's job server, where one is named by its http:// address, and its version of Ray."""
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS", "")
    if not address.startswith("http"):
        return Check("Ray job server", None, "RAY_API_SERVER_ADDRESS names none: needed by 'medsynth submit'")
    from cluster.jobs import JobServer, server_address

    try:
        return same_ray(JobServer.connect(server_address(None)).ray_version)
    except UserError as error:
        return Check("Ray job server", False, str(error), "see its address, its port, and the tunnel to it")


def same_ray(of_cluster: str) -> Check:
    """Whether the cluster has this Ray."""
    here = metadata.version("ray")
    found = f"the cluster has Ray {of_cluster}, this machine {here}"
    return Check("Ray job server", of_cluster == here, found, f"pip install ray=={of_cluster}, or mend the cluster")


def nodes() -> Check:
    """One Ray, one Python and one time on all machines of the cluster."""
    name, address = "Ray nodes", os.environ.get("RAY_ADDRESS", "").strip() or "local"
    if address == "local":
        return Check(name, None, "RAY_ADDRESS names no cluster: Ray starts within each command")
    if address.startswith("http"):
        return Check(name, None, "asked from inside the cluster: medsynth submit -- doctor")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])}
    try:
        asked = subprocess.run(
            [sys.executable, "-m", "cluster.node_probe"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=NODES_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Check(name, False, f"{address} does not answer within {NODES_SECONDS} s", "is it that of a Ray head?")
    if asked.returncode:
        said = (asked.stderr.strip() or f"it ended with {asked.returncode}").splitlines()[-1]
        return Check(name, False, said, "see RAY_ADDRESS, and that the head runs")
    return compare_nodes(json.loads(asked.stdout.splitlines()[-1]))


def compare_nodes(found: Sequence[Mapping[str, Any]]) -> Check:
    """Whether the machines of the cluster, as `node_probe` found them, are like this one."""
    name = "Ray nodes"
    here = {"ray": metadata.version("ray"), "python": platform.python_version()}
    silent = [node["name"] for node in found if "ray" not in node]
    if silent:
        return Check(name, False, f"no answer of {', '.join(silent)}", "see 'ray status' and the logs of that machine")
    other = [f"{node['name']} has {what} {node[what]}" for node in found for what in here if node[what] != here[what]]
    if other:
        wanted = f"Ray {here['ray']} and Python {here['python']}"
        return Check(name, False, ", ".join(other), f"install {wanted}, as here, on every machine")
    late = [f"{node['name']} {_ahead(node['ahead'])}" for node in found if abs(node["ahead"]) > NODE_CLOCK_SECONDS]
    if late:
        return Check(name, False, f"clocks differ: {', '.join(late)}", "set the clocks by NTP")
    return Check(name, True, f"{len(found)} with Ray {here['ray']}, Python {here['python']}, clocks together")


def s3(bucket: str | None) -> Check:
    """List, write, read a range and delete, below the prefix."""
    name = "S3"
    if bucket is None:
        return Check(name, None, "not looked at: name a place, --bucket s3://BUCKET/PREFIX")
    if not storage.is_remote(bucket):
        return Check(name, False, f"{bucket} is no s3:// URI", "give --bucket s3://BUCKET/PREFIX")
    probe, content = storage.join(bucket, f".medsynth-doctor-{uuid4().hex[:12]}"), b"medsynth doctor"
    try:
        at = storage.endpoint()
        knock(at, ANSWER_SECONDS)
        storage.list_files(probe)
        storage.write_bytes(probe, content)
        try:
            same = storage.read_bytes(probe, 9, 6) == content[9:]
        finally:
            with suppress(UserError):
                storage.delete(probe)
        gone = not storage.exists(probe)
    except OSError as error:
        return Check(
            name, False, f"no server answers at {at} ({first_line(error)})", "see AWS_ENDPOINT_URL and the network"
        )
    except Exception as error:  # boto3 and its chain of credentials raise many kinds
        return Check(name, False, first_line(error), "see the AWS variables, and what they may do in this bucket")
    if not same:
        return Check(name, False, f"{at} reads ranges wrongly", "it is no complete S3 server: use another")
    if not gone:
        return Check(name, False, f"{probe} cannot be deleted", "allow s3:DeleteObject there; remove that object")
    return Check(name, True, f"list, write, read and delete at {bucket}, by {at}")


def mlflow_server(tracking_uri: str | None) -> Check:
    """Whether the server answers, and lets us in."""
    name = "MLflow"
    from cluster.tracking import check_tracking, without_secrets

    try:
        check_tracking(tracking_uri)
    except Exception as error:
        return Check(name, False, first_line(error), _TRACKING_REMEDY)
    if not tracking_uri or not tracking_uri.startswith("http"):
        return Check(name, None, "MLFLOW_TRACKING_URI names no server: runs are recorded in a database")
    version = _get(f"{without_secrets(tracking_uri)}/version")
    return Check(name, True, f"version {version or 'unknown'} at {without_secrets(tracking_uri)}")


def mlflow_registry(tracking_uri: str | None) -> Check:
    """Whether models may be registered: makes one and deletes it."""
    name = "MLflow registry"
    if not tracking_uri or not tracking_uri.startswith("http"):
        return Check(name, None, "no server")
    from cluster.registry import check_rights

    try:
        check_rights(tracking_uri)
    except Exception as error:
        return Check(name, False, first_line(error), _TRACKING_REMEDY)
    return Check(name, True, "models may be registered")


_TRACKING_REMEDY = "see MLFLOW_TRACKING_URI, _USERNAME and _PASSWORD, and what that user may do"


def servers(bucket: str | None, tracking_uri: str | None) -> dict[str, str]:
    """The servers that tell the time: S3's, if a bucket is looked at, and MLflow's."""
    found = {}
    if bucket and storage.is_remote(bucket):
        with suppress(Exception):
            found["S3"] = storage.endpoint()
    if tracking_uri and tracking_uri.startswith("http"):
        from cluster.tracking import without_secrets

        found["MLflow"] = f"{without_secrets(tracking_uri)}/health"
    return found


def clock(of: Mapping[str, str]) -> Check:
    """This machine's clock beside those of servers."""
    ahead = {name: seconds for name, url in of.items() if (seconds := _seconds_ahead(url)) is not None}
    if not ahead:
        return Check("clock", None, "no server to compare it with")
    found = ", ".join(f"{name}'s {_ahead(seconds)}" for name, seconds in ahead.items())
    ok = all(abs(seconds) <= CLOCK_SECONDS for seconds in ahead.values())
    return Check("clock", ok, found, "set this machine's clock by NTP; S3 refuses requests 15 minutes off")


def disk(name: str, folder: Path) -> Check:
    """Free space where the folder is, or will be."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    remedy = f"make room, {FREE_DISK_BYTES / 1e9:.0f} GB at least, or use another folder"
    return Check(name, free >= FREE_DISK_BYTES, f"{free / 1e9:.0f} GB free at {folder}", remedy)


def shared_memory() -> Check:
    """Where Ray keeps objects, and NCCL and loaders pass data."""
    name = f"shared memory, {SHARED_MEMORY}"
    if not SHARED_MEMORY.exists():
        return Check(name, None, "this system has none")
    size = shutil.disk_usage(SHARED_MEMORY).total
    remedy = "start the container with more, such as --shm-size 8g"
    return Check(name, size >= SHARED_MEMORY_BYTES, f"{size / 1e9:.1f} GB", remedy)


def _get(url: str) -> str:
    """What is at the URL in one line; nothing if it cannot be had."""
    with suppress(OSError, ValueError, HTTPException), urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as answer:
        return str(answer.read(100).decode().strip())
    return ""


def _seconds_ahead(url: str) -> float | None:
    """How far a server's clock is before ours, by the head of its answer, whatever that is."""
    asked = time.time()
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as answer:
            told = answer.headers["Date"]
    except urllib.error.HTTPError as error:
        told = error.headers["Date"]
    except (OSError, ValueError, HTTPException):
        return None
    with suppress(ValueError):  # of no date, or of none that can be read
        return parsedate_to_datetime(told).timestamp() + 0.5 - (asked + time.time()) / 2  # whole seconds, cut off
    return None


def _ahead(seconds: float) -> str:
    return f"{abs(seconds):.1f} s {'ahead' if seconds > 0 else 'behind'}"
