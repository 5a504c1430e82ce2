"""What tests of several folders share: servers, an environment of their own, and small shards of real images."""

import csv
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import boto3
import pytest
from mlflow import MlflowClient

from cluster import storage
from data_shards import Settings, write_shards
from data_shards.sources import medvqa_records
from tests import servers

DATA = Path(__file__).parent / "data"
NUM_IMAGES = 24

# No test may reach a hub, nor a server or an account that the surroundings happen to name.
os.environ["HF_HUB_OFFLINE"] = "1"
for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
    os.environ.pop(name, None)
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test leaves in its working folder is its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def empty_mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creating the tables takes seconds; copying them does not."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def tracking_uri(empty_mlflow_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh SQLite store, named by the environment."""
    shutil.copy(empty_mlflow_database, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with servers.s3_server(tmp_path_factory.mktemp("s3")) as endpoint:
        yield endpoint


@pytest.fixture(autouse=True)
def _fresh_clients() -> Iterator[None]:
    """Clients are kept by process; those of another test know another server."""
    yield
    storage.forget_clients()


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An S3 protocol server that the environment names and gives credentials for."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test-key-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret-key")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return s3_endpoint


@pytest.fixture
def bucket(s3: str) -> str:
    """A fresh bucket, as s3://NAME."""
    name = f"test-{uuid4().hex}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with servers.mlflow_server(tmp_path_factory.mktemp("mlflow")) as uri:
        yield uri


@pytest.fixture(scope="session")
def small_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first real images with their captions, in the MEDVQA-GI format."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "images").mkdir()
    with (DATA / "colonoscopy" / "prompt-gt.csv").open() as file:
        rows = list(csv.DictReader(file, delimiter=";"))
    names = sorted({row["Filename"] for row in rows})[:NUM_IMAGES]
    for name in names:
        shutil.copy(DATA / "colonoscopy" / "images" / name, folder / "images")
    with (folder / "prompt-gt.csv").open("w") as file:
        file.write("Filename;Prompt\n")
        file.writelines(f"{row['Filename']};{row['Prompt']}\n" for row in rows if row["Filename"] in names)
    return folder


def write_small_shards(source: Path, out: str) -> str:
    settings = Settings(
        name="small", splits={"train": 0.6, "validation": 0.3, "test": 0.1}, samples_per_shard=5, resize=32
    )
    write_shards(medvqa_records(str(source)), out, settings, source={"format": "medvqa", "uri": str(source)})
    return out


@pytest.fixture(scope="session")
def shards(small_source: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_small_shards(small_source, str(tmp_path_factory.mktemp("shards")))


@pytest.fixture
def s3_shards(small_source: Path, bucket: str) -> str:
    return write_small_shards(small_source, f"{bucket}/shards")
