"""Real servers on random loopback ports, ended with all their children."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

import psutil

START_SECONDS = 180  # a busy machine takes a minute to import what they need


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def server(
    command: list[str],
    url: str,
    log: Path,
    environment: Mapping[str, str] = os.environ,
    on_end: Callable[[Iterable[psutil.Process]], None] = lambda children: None,
) -> Iterator[str]:
    """Run `command` in a process group of its own until the block ends; ready when `url` answers.

    Just before it is ended, `on_end` is told which processes it had started.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, env=environment)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(url):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"{url} does not answer: {log.read_text()}"
            time.sleep(0.1)
        yield url
    finally:
        with suppress(psutil.NoSuchProcess):
            on_end(psutil.Process(process.pid).children(recursive=True))
        with suppress(ProcessLookupError):  # it ended by itself, which the block has said by then
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=1).close()
    except OSError:
        return False
    return True


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """moto's S3 protocol server; yields its endpoint."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with server(command, f"http://127.0.0.1:{port}/moto-api/", folder / "s3.log"):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def mlflow_server(folder: Path, port: int | None = None) -> Iterator[str]:
    """A tracking server on SQLite that hands artifacts through; yields its URI."""
    port = port or free_port()
    command = [
        *(
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
        ),
        *(
            "--backend-store-uri",
            f"sqlite:///{folder}/mlflow.db",
            "--artifacts-destination",
            f"{folder}/artifacts",
        ),
    ]
    # Its job runners are eight more processes, for what no test asks of it.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with server(command, f"http://127.0.0.1:{port}/health", folder / "mlflow.log", environment):
        yield f"http://127.0.0.1:{port}"


@dataclass(frozen=True)
class RayHead:
    """A Ray head with its job server, and the environment of those who may speak to it."""

    job_server: str
    gcs: str
    environment: Mapping[str, str]


@contextmanager
def ray_head(num_cpus: int) -> Iterator[RayHead]:
    """A head that asks for a token; all its processes end with the block."""
    folder = Path(mkdtemp(prefix="rj-", dir="/tmp"))  # sockets lie in it, whose names must be short
    token = folder / "token"
    token.write_text("0123456789abcdef" * 4)
    authority = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")},
        **authority,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    ports = {name: free_port() for name in ("port", "dashboard-port", "ray-client-server-port", *RAY_PORTS)}
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    command += ["--dashboard-host=127.0.0.1", "--include-dashboard=true", f"--num-cpus={num_cpus}"]
    command += [f"--temp-dir={folder}", "--object-store-memory=200000000", "--disable-usage-stats"]
    job_server = f"http://127.0.0.1:{ports['dashboard-port']}"
    log, processes = folder / "head.log", set[psutil.Process]()
    try:
        with server(command, f"{job_server}/api/gcs_healthz", log, environment, on_end=processes.update):
            yield RayHead(job_server, f"127.0.0.1:{ports['port']}", authority)
    finally:
        for process in psutil.wait_procs(list(processes), timeout=5)[1]:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


RAY_PORTS = (
    "node-manager-port",
    "object-manager-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)
