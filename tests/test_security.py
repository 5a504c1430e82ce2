"""Logins, certificates and secrets, with real servers: docs/security.md says what is held here."""

import base64
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml

from cluster import storage
from cluster.tracking import Tracker, TrackingError, default_tracking_uri
from data_shards import Manifest
from data_shards.manifest import read_index
from tests import servers
from tests.trainers.test_launch import begin_with_vae
from trainers.recipe import MSDMRecipe

USER, PASSWORD = "researcher", "planted pass/word@4711"
PLANTED = {
    "MLflow password": PASSWORD,
    "MLflow password, quoted": quote(PASSWORD, safe=""),
    "MLflow login as a header has it": base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode(),
    "AWS secret key": "planted+aws/secret+key+4711",
    "AWS session token": "planted+session/token+4711",
}


@pytest.fixture
def secured(mlflow_server: str, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The tracking server behind TLS and a login: its address, and the file of its authority."""
    with servers.behind_tls(mlflow_server, tmp_path, f"{USER}:{PASSWORD}") as found:
        yield found


def begin(uri: str, **environment: str) -> Tracker:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"MLFLOW_TRACKING_URI": uri, **environment}.items():
            patch.setenv(name, value)
        tracker = Tracker.start(experiment="secured", run_name="r", tags={})
        tracker.log_text("kept", "note.txt")
        assert tracker.read_text("note.txt") == "kept"
        tracker.finish("FINISHED")
    return tracker


def test_a_tracking_server_with_a_login_over_tls(secured: tuple[str, Path]) -> None:
    uri, authority = secured
    trusting = {"MLFLOW_TRACKING_SERVER_CERT_PATH": str(authority)}
    login = {"MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": PASSWORD}
    assert begin(uri, **trusting, **login).tracking_uri == uri
    assert begin(uri, REQUESTS_CA_BUNDLE=str(authority), **login).run_id
    assert begin(uri, MLFLOW_TRACKING_INSECURE_TLS="true", **login).run_id

    refused = f"MLflow, {uri}: access refused; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD of one"
    for wrong in ({}, login | {"MLFLOW_TRACKING_PASSWORD": "other"}):
        with pytest.raises(TrackingError, match=refused):
            begin(uri, **trusting, **wrong)
    untrusted = f"the certificate of {uri} is not to be trusted .*: set MLFLOW_TRACKING_SERVER_CERT_PATH to the file"
    with pytest.raises(TrackingError, match=untrusted):
        begin(uri, **login)
    with pytest.raises(TrackingError, match=r"MLFLOW_TRACKING_SERVER_CERT_PATH=nowhere.pem holds no certificates"):
        begin(uri, MLFLOW_TRACKING_SERVER_CERT_PATH="nowhere.pem", **login)


def test_a_login_in_the_uri_is_moved_to_where_nothing_quotes_it(
    secured: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, authority = secured
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(authority))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.replace("//", f"//{USER}:{quote(PASSWORD, safe='')}@"))
    assert default_tracking_uri() == os.environ["MLFLOW_TRACKING_URI"] == uri
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == PASSWORD
    tracker = Tracker.start(experiment="secured", run_name="r", tags={})
    assert PASSWORD not in repr(tracker)

    # It goes to where the run goes, such as a worker on another machine, unless that has a login of its own.
    sent = pickle.dumps(tracker)
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name)
    pickle.loads(sent).log_text("kept", "note.txt")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "own")
    assert pickle.loads(sent).run_id == tracker.run_id
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "own"


def test_s3_over_tls(s3: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with servers.behind_tls(s3, tmp_path) as (endpoint, authority):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(authority))
        monkeypatch.setenv(
            "AWS_REQUEST_CHECKSUM_CALCULATION", "when_required"
        )  # else in chunks: too much for the proxy
        storage.forget_clients()
        storage.write_bytes(f"{bucket}/a", b"some bytes")
        assert storage.read_bytes(f"{bucket}/a", 2, 3) == b"me "
        filesystem, path = storage.arrow_filesystem(bucket)
        with filesystem.open_output_stream(f"{path}/b") as file:
            file.write(b"by Arrow")
        assert storage.list_files(bucket) == ["a", "b"]
        monkeypatch.delenv("AWS_CA_BUNDLE")
        storage.forget_clients()
        with pytest.raises(storage.StorageError, match="AWS_CA_BUNDLE"):
            storage.read_bytes(f"{bucket}/a")


def test_a_database_password_is_not_shown() -> None:
    assert "secret" not in repr(Tracker("postgresql://user:secret@127.0.0.1/mlflow", "id"))


@pytest.mark.slow
@pytest.mark.timeout(1200)  # four trainings, of which two begin no more than Ray
def test_a_training_leaves_no_secret_behind(
    recipe_document: dict[str, Any],
    s3_shards: str,
    bucket: str,
    s3: str,
    empty_mlflow_database: Path,
    tmp_path: Path,
) -> None:
    """One that succeeds and ones that fail, by the command and with real servers; then all that they wrote is read."""
    folder = tmp_path / "mlflow"
    folder.mkdir()
    shutil.copy(empty_mlflow_database, folder / "mlflow.db")
    # Sockets of Ray lie below, whose paths must be short.
    with (
        tempfile.TemporaryDirectory(dir="/tmp", prefix="medsynth-") as ray_folder,
        servers.mlflow_server(folder) as server,
        servers.behind_tls(server, tmp_path, f"{USER}:{PASSWORD}") as (uri, authority),
    ):
        environment = {
            **os.environ,
            "MLFLOW_TRACKING_URI": uri.replace("//", f"//{USER}:{quote(PASSWORD, safe='')}@"),
            "MLFLOW_TRACKING_SERVER_CERT_PATH": str(authority),
            "AWS_SECRET_ACCESS_KEY": PLANTED["AWS secret key"],
            "AWS_SESSION_TOKEN": PLANTED["AWS session token"],
            "RAY_TMPDIR": ray_folder,
        }
        recipe_document["data"]["shards"] = s3_shards
        begin_with_vae(MSDMRecipe.model_validate(recipe_document), "whole")
        storage.upload_folder(tmp_path / "runs", storage.join(bucket, "runs"))
        recipe_document["cluster"]["storage"] = storage.join(bucket, "runs")
        recipe_document["tracking"]["experiment"] = "planted"
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_document))

        def train(name: str, *arguments: str, **other: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "medsynth", "train", "recipe.yaml", "--run", name, *arguments]
            done = subprocess.run(
                command, cwd=tmp_path, env=environment | other, capture_output=True, text=True, check=False, timeout=500
            )
            (tmp_path / f"{name}.out").write_text(done.stdout + done.stderr)
            return done

        assert train("whole").returncode == 0, (tmp_path / "whole.out").read_text()
        # The traceback of a rank, a login that is refused, and a server that is gone.
        damage_a_shard(s3_shards)
        assert train("damaged").returncode == 2
        assert "is damaged at sample" in (tmp_path / "damaged.out").read_text()
        wrong = environment["MLFLOW_TRACKING_URI"].replace("4711@", "4711x@")
        assert train("refused", MLFLOW_TRACKING_URI=wrong).returncode == 2
        gone = environment["MLFLOW_TRACKING_URI"].rpartition(":")[0] + f":{servers.free_port()}"
        assert train("gone", MLFLOW_TRACKING_URI=gone).returncode == 2

        written = dict(files_below(tmp_path)) | dict(files_below(Path(ray_folder)))
        for name in storage.list_files(bucket):
            written[f"{bucket}/{name}"] = storage.read_bytes(storage.join(bucket, name))
    kinds = ("whole.out", "mlflow.db", "recipe.yaml", "/runs/whole/run.json", "raylet.out", "/artifacts/", "worker-")
    for kind in kinds:  # that it was looked for where it might be
        assert any(kind in name for name in written), kind
    leaks = [f"{what} in {name}" for name, data in written.items() for what, s in PLANTED.items() if s.encode() in data]
    assert not leaks, "\n".join(leaks)


def files_below(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            yield str(path), path.read_bytes()


def damage_a_shard(shards: str) -> None:
    shard = Manifest.load(shards).split("train")[0]
    data = bytearray(storage.read_bytes(storage.join(shards, shard.name)))
    for entry in read_index(shards, shard):
        data[entry.offset + 600] ^= 0xFF
    storage.write_bytes(storage.join(shards, shard.name), bytes(data))


@pytest.mark.slow
def test_an_own_ray_listens_on_this_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.delenv(name, raising=False)
    code = """
import psutil, ray
from cluster import runtime
with runtime.connect(min_cpus=1):
    ray.get(ray.remote(lambda: None).remote())
    own = psutil.Process()
    for process in (own, *own.children(recursive=True)):
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                print(connection.laddr.ip, process.name())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    listening = [line.removeprefix("::ffff:") for line in done.stdout.splitlines()]
    assert len(listening) > 3
    assert all(line.startswith("127.0.0.1 ") for line in listening), done.stdout
