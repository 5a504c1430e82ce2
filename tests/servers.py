"""Real servers on random loopback ports, ended with all their children."""

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.fault_proxy import fault_proxy

START_SECONDS = 180  # a busy machine takes a minute to import what they need


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def server(command: list[str], url: str, log: Path, environment: Mapping[str, str] = os.environ) -> Iterator[str]:
    """Run `command` in a process group of its own until the block ends; ready when `url` answers."""
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


@contextmanager
def behind_tls(url: str, folder: Path, login: str | None = None) -> Iterator[tuple[str, Path]]:
    """A reverse proxy before `url` that speaks TLS and asks for `login`, USER:PASSWORD, in this process.

    Yields its address, and the file of the authority that signed its certificate.
    """
    from tests.certificates import certificates  # tests on a GPU need no server, and may have no cryptography

    authority, own = certificates(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own)
    with fault_proxy(url, tls=context, login=login) as proxy:
        yield proxy.address, authority
