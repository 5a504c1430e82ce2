"""What a registered version carries, and that a real `mlflow models serve` draws what `medsynth generate` draws."""

import base64
import hashlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow.pyfunc
import numpy as np
import pytest
from diffusers import DiffusionPipeline
from mlflow import MlflowClient, MlflowException
from numpy.typing import NDArray
from PIL import Image

from cluster.checksums import checksums
from cluster.errors import UserError
from cluster.registry import RegisteredModel, model_folder
from cluster.tracking import Tracker
from data_shards import Manifest
from tests.servers import free_port, server
from trainers.generate import generate
from trainers.model_source import open_model
from trainers.msdm import MSDMPipeline
from trainers.msdm.export import PIPELINE_FILE
from trainers.recipe import MSDMRecipe, load_recipe
from trainers.registration import register_model
from trainers.run_folder import RunFolder, finished_model


@pytest.fixture
def registered(pipeline: MSDMPipeline, recipe: MSDMRecipe, tracking_uri: str, tmp_path: Path) -> str:
    """A registered version of the tiny model, as a run registers it at its end."""
    pipeline.save_pretrained(tmp_path / "exported")
    (tmp_path / "exported" / "pipeline.py").write_text(PIPELINE_FILE)
    (tmp_path / "exported" / "LICENSE.md").write_text("of the weights")
    tracker = Tracker.start(experiment="e", run_name="r", tags={"git_commit": "abc123"})
    tracker.log_metrics(
        {"denoiser/validation_loss": 0.25, "system/cpu": 3.0, "denoiser/mfu": 0.4, "vae/grad_norm": 2.0}, 6
    )
    manifest = Manifest.load(recipe.data.shards)
    preview = tmp_path / "preview.png"
    Image.new("RGB", (8, 8)).save(preview)
    exported = str(tmp_path / "exported")
    assert register_model(recipe, manifest, exported, tracker, name="tiny", preview=str(preview)) == 1
    MlflowClient().set_registered_model_alias("tiny", "champion", "1")
    return "models:/tiny@champion"


def drawn(model: str, out: Path, *, seed: int, **settings: Any) -> NDArray[np.uint8]:
    (path,) = generate(
        model, "a large polyp", out, num_images=1, batch_size=1, seed=seed, settings=settings, device="cpu"
    )
    return np.asarray(Image.open(path))


def pixels(png: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_a_version_has_all_that_its_readers_need(registered: str, recipe: MSDMRecipe) -> None:
    _, version = RegisteredModel.of(registered)
    manifest = Manifest.load(recipe.data.shards)
    assert version.tags == {
        "manifest_digest": manifest.digest,
        "recipe": "tiny",
        "family": "msdm",
        "git_commit": "abc123",
        "sha256sums": version.tags["sha256sums"],  # below: that it is theirs
    }
    with model_folder(registered) as folder:
        assert load_recipe(str(folder / "recipe.yaml")) == recipe
        card = (folder / "README.md").read_text()
        assert (folder / "code" / "trainers" / "serving.py").is_file()
        requirements = (folder / "requirements.txt").read_text().splitlines()
        assert not [path.name for path in folder.rglob("*") if path.suffix in (".pkl", ".pt", ".bin", ".pickle")]
        loaded = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
        assert type(loaded).__name__ == "MSDMPipeline"
    assert any(line.startswith("diffusers==0.") for line in requirements)
    assert not any("+" in line for line in requirements)
    for told in (
        manifest.digest,
        "`abc123`",
        f"MLflow run `{version.run_id}`",
        "| denoiser/validation_loss | 0.25 |",
        recipe.text_encoder.pretrained,
        "see LICENSE.md beside this file",
        "Not for diagnosis",
        "evaluations: MLflow runs below the run that trained it",
        "medsynth compare models:/tiny/VERSION models:/tiny/OTHER_VERSION",
        *manifest.licences,
    ):
        assert told in card, told
    for no_figure in ("system/", "mfu", "grad_norm"):
        assert no_figure not in card, no_figure
    assert "](preview.png)" in card
    for number, prompt in enumerate(recipe.sampling.prompts, start=1):
        assert f"{number}. {prompt}" in card


@pytest.mark.slow
def test_the_python_of_the_card_opens_the_model(registered: str, tmp_path: Path) -> None:
    """As whoever got the folder runs it: elsewhere, with nothing of this project but what lies in it."""
    with model_folder(registered) as folder:
        shutil.copytree(folder, tmp_path / "elsewhere" / "model")
    card = (tmp_path / "elsewhere" / "model" / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    code += "\nimport trainers; assert 'elsewhere/model/code' in trainers.__file__\n"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "elsewhere", env=environment, check=True)
    assert Image.open(tmp_path / "elsewhere" / "picture.png").size == (16, 16)


def test_loaded_by_mlflow_it_draws_what_generate_draws(
    registered: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # MLflow puts the model's code first, and leaves it there
    model = mlflow.pyfunc.load_model(registered)
    rows = [{"prompt": "a large polyp", "seed": seed, "num_inference_steps": 2} for seed in (3, 4)]
    first, second = model.predict(rows)["png"]
    assert np.array_equal(pixels(first), drawn(registered, tmp_path / "a", seed=3, num_inference_steps=2))
    assert np.array_equal(pixels(second), drawn(registered, tmp_path / "b", seed=4, num_inference_steps=2))
    about = Image.open(io.BytesIO(first)).info
    assert about["Description"] == "Synthetic image, made by a generative model"
    _, version = RegisteredModel.of(registered)
    assert about["model"] == f"runs:/{version.run_id}/model"

    # What a row leaves out is the version's or else the model's own, and the seed is 0.
    (png,) = model.predict([{"prompt": "a large polyp"}])["png"]
    assert np.array_equal(pixels(png), drawn(registered, tmp_path / "c", seed=0))
    assert Image.open(io.BytesIO(png)).info["num_inference_steps"] == "30"
    tags = {"sampling.num_inference_steps": "3", "sampling.guidance_scale": "1.5", "sampling.sampler": "ddim"}
    for name, value in tags.items():
        MlflowClient().set_model_version_tag("tiny", "1", name, value)
    (tuned,) = mlflow.pyfunc.load_model(registered).predict([{"prompt": "a large polyp"}])["png"]
    told = Image.open(io.BytesIO(tuned)).info
    assert {name: told[name.removeprefix("sampling.")] for name in tags} == tags
    assert np.array_equal(pixels(tuned), drawn(registered, tmp_path / "d", seed=0))
    assert not np.array_equal(pixels(tuned), pixels(png))
    for wrong, said in (
        ({"prompt": "a", "num_inference_steps": 0}, "num_inference_steps must be a whole number from 1 to 1000, not 0"),
        ({"prompt": "a", "num_inference_steps": 1_000_000}, "from 1 to 1000, not 1000000"),
        ({"prompt": "a", "num_inference_steps": 2.5}, "from 1 to 1000, not 2.5"),
        ({"prompt": "a", "num_inference_steps": True}, "from 1 to 1000, not True"),
        ({"prompt": "a", "seed": -1}, "seed must be a whole number from 0"),
        ({"prompt": "a", "seed": 10**30}, "seed must be a whole number from 0"),
        ({"prompt": "a", "guidance_scale": -1.0}, "guidance_scale must be a number from 0 to 100, not -1"),
        ({"prompt": "a", "guidance_scale": math.inf}, "guidance_scale must be a number from 0 to 100, not inf"),
        ({"prompt": "a", "guidance_scale": 1e308}, "guidance_scale must be a number from 0 to 100, not 1e[+]308"),
        ({"prompt": "a", "guidance_scale": "3"}, "guidance_scale must be a number from 0 to 100, not '3'"),
        ({"prompt": "a", "sampler": "euler"}, "no sampler 'euler'"),
        ({"prompt": "a", "true_cfg_scale": 2.0}, "not drawn with true_cfg_scale"),
        ({"prompt": "a", "guidence_scale": 2.0}, "there is no column guidence_scale: known are prompt, "),
        ({"prompt": 5}, "prompt must be text, not 5"),
        ({"prompt": ["a", "b"]}, "prompt must be text"),
        ({"prompt": "  "}, "prompt must say what to draw"),
        ({"prompt": "a" * 10_001}, "prompt has 10,001 characters"),
        ({"seed": 5}, "prompt must be text, not None"),
    ):
        with pytest.raises(MlflowException, match=said) as refused:
            model.predict([{"prompt": "a"}, wrong])
        assert refused.value.get_http_status_code() == 400


def test_mlflow_has_no_schema_to_drop_columns_by(registered: str) -> None:
    schema = mlflow.models.get_model_info(registered).signature
    assert (schema.inputs, schema.outputs.input_names()) == (None, ["png"])


@pytest.fixture
def served(registered: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model as MLflow's server holds it, whose time limit is two seconds."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", "2")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield mlflow.pyfunc.load_model(registered)
    for number, handler in handlers.items():
        signal.signal(number, handler)


SLOW = [{"prompt": "a polyp", "num_inference_steps": 1000}] * 50


def test_drawing_ends_where_the_server_has_given_up_waiting(served: Any) -> None:
    started = time.monotonic()
    with pytest.raises(MlflowException, match="longer than the server may") as late:
        served.predict(SLOW)
    assert late.value.get_http_status_code() == 504
    assert time.monotonic() - started < 8


def test_another_request_is_answered_while_one_is_drawn(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of the module that MLflow loaded from the model's own code.
    monkeypatch.setattr(sys.modules[type(served.unwrap_python_model()).__module__], "QUEUE_SECONDS", 0.5)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(served.predict, SLOW)
        inside = served.unwrap_python_model()
        while not inside.one_at_a_time.locked():
            time.sleep(0.01)
        started = time.monotonic()
        with pytest.raises(MlflowException, match="busy") as busy:
            served.predict([{"prompt": "a polyp"}])
        assert busy.value.get_http_status_code() == 503
        assert time.monotonic() - started < 8
        assert isinstance(first.exception(), MlflowException)
    assert len(served.predict([{"prompt": "a polyp", "num_inference_steps": 1}])) == 1, "and the next is drawn again"


def test_a_server_that_is_told_to_end_stops_drawing(registered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", "60")
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        model = mlflow.pyfunc.load_model(registered)
        with ThreadPoolExecutor(1) as pool:
            drawing = pool.submit(model.predict, SLOW)
            while not model.unwrap_python_model().one_at_a_time.locked():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(MlflowException, match="the server ends") as ended:
                drawing.result(timeout=10)
        assert ended.value.get_http_status_code() == 503
        assert told == [signal.SIGTERM], "the server was told as well"
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)


@pytest.mark.slow
def test_served_over_http(registered: str, tmp_path: Path) -> None:
    """In a process and a folder that have nothing of this project but what is registered."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", registered, "--env-manager", "local"]
    command = [*command, "--host", "127.0.0.1", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # mlflow runs uvicorn by its name

    def post(record: dict[str, Any]) -> bytes:
        body = json.dumps({"dataframe_records": [record]}).encode()
        request = urllib.request.Request(f"{url}/invocations", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        return base64.b64decode(answer["predictions"][0]["png"])

    asked = {"prompt": "a large polyp", "guidance_scale": 2, "num_inference_steps": 3}
    with server(command, f"{url}/ping", tmp_path / "serve.log", environment=environment):
        seeds = [5, 6, 5, 7]
        with ThreadPoolExecutor(4) as pool:  # at once: a pipeline that two threads drive draws neither picture
            answers = list(pool.map(lambda seed: pixels(post(asked | {"seed": seed})), seeds))
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(asked | {"num_inference_steps": 0})
        with pytest.raises(urllib.error.HTTPError) as unknown:
            post(asked | {"guidence_scale": 2})
    for seed, answer in zip(seeds, answers, strict=True):
        expected = drawn(
            registered,
            tmp_path / str(len(list(tmp_path.iterdir()))),
            seed=seed,
            guidance_scale=2.0,
            num_inference_steps=3,
        )
        assert np.array_equal(answer, expected)
    assert refused.value.code == 400
    assert "num_inference_steps must be a whole number from 1 to 1000" in refused.value.read().decode()
    assert unknown.value.code == 400
    assert "there is no column guidence_scale" in unknown.value.read().decode()


def test_versions_of_before_still_open(pipeline: MSDMPipeline, tracking_uri: str, tmp_path: Path) -> None:
    """A pipeline's folder alone, as versions were registered before MLflow could serve them."""
    pipeline.save_pretrained(tmp_path / "exported")
    tracker = Tracker.start(experiment="e", run_name="r", tags={})
    tracker.log_folder(tmp_path / "exported", "model")
    client = MlflowClient()
    client.create_registered_model("old")
    source = f"{client.get_run(tracker.run_id).info.artifact_uri}/model"
    client.create_model_version("old", source, run_id=tracker.run_id)
    assert drawn("models:/old/1", tmp_path / "out", seed=0).shape == (16, 16, 3)


# --- a version is what was registered, byte for byte ---

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def stored(registered: str) -> Path:
    """Where the registered files lie."""
    return Path(urlsplit(str(MlflowClient().get_model_version("tiny", "1").source)).path)


def flip_last_byte(path: Path) -> tuple[str, str]:
    """SHA-256 before and after."""
    data = path.read_bytes()
    changed = data[:-1] + bytes([data[-1] ^ 1])
    path.write_bytes(changed)
    return hashlib.sha256(data).hexdigest(), hashlib.sha256(changed).hexdigest()


def test_a_changed_byte_is_refused_by_every_way_to_it(registered: str, stored: Path, tmp_path: Path) -> None:
    before, after = flip_last_byte(stored / UNET)
    run = f"runs:/{MlflowClient().get_model_version('tiny', '1').run_id}/model"
    said = f"is not what it was: {UNET} has SHA-256 {after}, expected {before}"
    for uri in ("models:/tiny/1", "models:/tiny/latest", registered, run):
        with pytest.raises(UserError, match=f"^{uri} {said}"), open_model(uri):
            pass
    with pytest.raises(UserError, match=f"^{run} {said}"):
        mlflow.pyfunc.load_model("models:/tiny/1")
    with pytest.raises(UserError, match=said):
        drawn(registered, tmp_path / "out", seed=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "recipe.yaml").unlink(), "recipe.yaml is missing, of SHA-256"),
        (lambda folder: (folder / "pytorch_lora_weights.safetensors").write_bytes(b""), "lora.* was not there"),
        (lambda folder: (folder / "SHA256SUMS").unlink(), "SHA256SUMS has SHA-256 e3b0c4.*, expected"),
    ],
)
def test_neither_more_nor_fewer_files(stored: Path, change: Callable[[Path], object], said: str) -> None:
    change(stored)
    with pytest.raises(UserError, match=said), open_model("models:/tiny/1"):
        pass


def test_digests_that_were_made_to_fit_are_refused(stored: Path) -> None:
    """They lie beside the model; theirs lies in the registry."""
    before, after = flip_last_byte(stored / UNET)
    sums = stored / "SHA256SUMS"
    sums.write_text(sums.read_text().replace(before, after))
    with pytest.raises(UserError, match="SHA256SUMS has SHA-256"), open_model("models:/tiny/1"):
        pass


def test_a_registered_model_is_opened_by_the_folder_of_its_artifacts(stored: Path) -> None:
    """More lies in it than in the finished model that was registered; what was changed is refused all the same."""
    with open_model(str(stored)) as source:
        assert (source.folder / UNET).is_file()
    flip_last_byte(stored / UNET)
    with pytest.raises(UserError, match=f"{UNET} has SHA-256"), open_model(str(stored)):
        pass


def test_a_finished_model_that_changed_is_not_registered(
    pipeline: MSDMPipeline, recipe: MSDMRecipe, tracking_uri: str, tmp_path: Path
) -> None:
    run = RunFolder(str(tmp_path / "run"))
    folder = Path(run.model("denoiser"))
    pipeline.save_pretrained(folder)
    run.mark_complete("denoiser", checksums([folder]))
    with finished_model(str(folder)):
        before, after = flip_last_byte(folder / UNET)
    tracker = Tracker.start(experiment="e", run_name="r", tags={})
    with pytest.raises(UserError, match=f"{UNET} has SHA-256 {after}, expected {before}"):
        register_model(recipe, Manifest.load(recipe.data.shards), str(folder), tracker, name="tiny")
