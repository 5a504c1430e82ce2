"""What `medsynth doctor` says of servers that are there, of those that refuse, and of those that are not."""

import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from packaging.requirements import Requirement
from typer.testing import CliRunner

from cluster import doctor, storage
from medsynth import app
from tests.servers import free_port

SECRET = "s3cr3t-value"


@pytest.fixture(autouse=True)
def _no_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def answering() -> Iterator[Callable[[int, str], str]]:
    """A server that answers everything with a status and a date; returns its URL."""
    running: list[HTTPServer] = []

    def start(status: int, date: str = "") -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response_only(status)
                self.send_header("Date", date or self.date_time_string())
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_POST = do_GET  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def test_this_environment_is_well() -> None:
    assert doctor.python().ok
    assert doctor.packages().ok, doctor.packages()


def test_a_package_of_another_version_and_one_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [Requirement("numpy<1"), Requirement("no-such-package>=2"), Requirement("rich>=1")]
    monkeypatch.setattr(doctor, "_requirements", lambda: wanted)
    check = doctor.packages()
    assert check.ok is False
    assert check.found == f"numpy {metadata.version('numpy')} is not <1, no-such-package is missing (>=2)"


def test_s3_is_written_read_and_left_as_it_was(bucket: str) -> None:
    check = doctor.s3(f"{bucket}/prefix")
    assert check.ok, check
    assert f"at {bucket}/prefix" in check.found
    assert storage.list_files(bucket) == []


def test_s3_that_refuses_or_is_not_there(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check = doctor.s3("s3://no-such-bucket-anywhere")
    assert check.ok is False
    assert "there is no such bucket" in check.found
    assert doctor.s3("some/folder").found == "some/folder is no s3:// URI"
    assert doctor.s3(None).ok is None
    storage.forget_clients()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    began = time.monotonic()
    check = doctor.s3("s3://bucket")
    assert check.ok is False
    assert "no server answers" in check.found
    assert time.monotonic() - began < 5


def test_s3_that_refuses_the_credentials(answering: Callable[[int], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", answering(403))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    check = doctor.s3("s3://bucket/prefix")
    assert check.ok is False
    assert "the AWS credentials do not allow it" in check.found
    assert SECRET not in repr(check)


def test_mlflow_that_refuses_or_is_not_there(answering: Callable[[int], str]) -> None:
    host = answering(401).removeprefix("http://")
    for check in (doctor.mlflow_server, doctor.mlflow_registry):
        refused = check(f"http://someone:{SECRET}@{host}")
        assert refused.ok is False
        assert "access refused; set MLFLOW_TRACKING_USERNAME" in refused.found
        assert SECRET not in repr(refused)
        dead = check(f"http://127.0.0.1:{free_port()}")
        assert dead.ok is False
        assert "no MLflow server answers" in dead.found
        assert check("sqlite:///mlflow.db").ok is None
        assert check(None).ok is None
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ  # as it was: a training asks more than once


@pytest.mark.slow
def test_mlflow_that_is_there_is_left_as_it_was(mlflow_server: str) -> None:
    names = [model.name for model in MlflowClient(mlflow_server).search_registered_models()]
    assert f"version {metadata.version('mlflow')} at {mlflow_server}" == doctor.mlflow_server(mlflow_server).found
    assert doctor.mlflow_registry(mlflow_server).ok
    assert [model.name for model in MlflowClient(mlflow_server).search_registered_models()] == names
    assert doctor.clock({"MLflow": f"{mlflow_server}/health"}).ok


def test_clocks(answering: Callable[..., str]) -> None:
    assert doctor.clock({"S3": answering(403)}).ok
    check = doctor.clock({"S3": answering(200), "MLflow": answering(200, "Wed, 21 Oct 2015 07:28:00 GMT")})
    assert check.ok is False
    assert "MLflow's " in check.found
    assert "s behind" in check.found
    assert doctor.clock({"S3": f"http://127.0.0.1:{free_port()}"}).ok is None
    assert doctor.clock({}).ok is None


def node(**changes: Any) -> dict[str, Any]:
    here = {"name": "a", "ray": metadata.version("ray"), "python": platform.python_version(), "ahead": 0.1}
    return here | changes


def test_machines_of_the_cluster_are_alike() -> None:
    assert doctor.compare_nodes([node(), node(name="b")]).ok
    older = doctor.compare_nodes([node(), node(name="b", ray="2.55.0")])
    assert (older.ok, older.found) == (False, "b has ray 2.55.0")
    late = doctor.compare_nodes([node(), node(name="b", ahead=-3.04)])
    assert (late.ok, late.found) == (False, "clocks differ: b 3.0 s behind")
    assert doctor.compare_nodes([node(), {"name": "b"}]).found == "no answer of b"


def test_a_cluster_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.job_server().ok is None
    assert doctor.nodes().ok is None
    monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{free_port()}")
    check = doctor.job_server()
    assert check.ok is False
    assert "no job server answers at" in check.found
    assert doctor.nodes().ok is None
    assert doctor.same_ray("2.1.0").ok is False
    assert doctor.same_ray(metadata.version("ray")).ok


def test_room_for_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = doctor.disk("disk", tmp_path / "to" / "be" / "made")
    assert check.found.endswith(f" GB free at {tmp_path}/to/be/made")
    monkeypatch.setattr(doctor, "FREE_DISK_BYTES", 10**18)
    assert doctor.disk("disk", tmp_path).ok is False
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path / "nowhere")
    assert doctor.shared_memory().ok is None
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(doctor, "SHARED_MEMORY_BYTES", 10**18)
    assert doctor.shared_memory().ok is False


def test_the_command_marks_each_line_and_fails_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(app, ["doctor", "--short"])
    assert result.exit_code == 0, result.output
    assert "– Ray job server: " in result.output
    assert "– MLflow: " in result.output
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    result = CliRunner().invoke(app, ["doctor", "--short"])
    assert result.exit_code == 1
    assert "✗ MLflow: no MLflow server answers" in result.output
    assert "  → see MLFLOW_TRACKING_URI" in result.output
