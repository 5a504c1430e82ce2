"""Whole runs under Ray Train: local, on S3 with a tracking server, killed, and interrupted."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image

from cluster import storage
from tests.trainers.test_loop import CPU, Reports, prepare_denoiser
from trainers.checkpoint_folders import INDEX
from trainers.families import msdm
from trainers.generate import generate
from trainers.launch import Progress, RunCutOffError, TrainedRun, train_recipe
from trainers.recipe import MSDMRecipe, Recipe, dump_recipe, load_recipe
from trainers.run_folder import RunFolder
from trainers.worker import train_rank

pytestmark = pytest.mark.slow


def train(recipe: Recipe, name: str, on_progress: Callable[[Progress], None] = lambda progress: None) -> TrainedRun:
    return train_recipe(recipe, name, on_progress=on_progress, on_stop_requested=lambda: None)


def with_values(document: dict[str, Any], **values: Any) -> MSDMRecipe:
    """The recipe with dotted keys (written with __) set."""
    for path, value in values.items():
        *parents, last = path.split("__")
        block = document
        for parent in parents:
            block = block[parent]
        block[last] = value
    return MSDMRecipe.model_validate(document)


def draw(model_uri: str, out: Path) -> list[bytes]:
    paths = generate(
        model_uri,
        "a large polyp",
        out,
        num_images=3,
        batch_size=2,
        seed=7,
        settings={"guidance_scale": 3.5, "num_inference_steps": 2},
        device="cpu",
    )
    return [path.read_bytes() for path in paths]


def assert_equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert len(one) > 50
    different = [name for name, value in one.items() if not torch.equal(value, other[name])]
    assert not different


def check_record(trained: TrainedRun, recipe: MSDMRecipe) -> None:
    """Everything a reader of MLflow expects to find in the run."""
    tracker = trained.tracker
    assert tracker.client.get_run(tracker.run_id).data.tags["device"] == "CPU process"
    for stage in ("vae", "denoiser"):
        for name in ("loss", "grad_norm", "learning_rate", "images_per_second"):
            assert [step for step, _ in tracker.metric_history(f"{stage}/{name}")] == [2, 4, 6]
        assert [step for step, _ in tracker.metric_history(f"{stage}/validation_loss")] == [6]
    with storage.local_folder(trained.folder.uri) as folder:
        assert Image.open(folder / "pictures" / "denoiser-000006.png").width == 3 * 130 - 2  # 16 enlarged for captions
        assert Image.open(folder / "pictures" / "vae-000006.png").height > 256


def test_a_run_on_s3_with_a_tracking_server(
    recipe_document: dict[str, Any],
    s3_shards: str,
    bucket: str,
    mlflow_server: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Shards, checkpoints and artifacts on S3; two DDP ranks; the record on a real server; the model registered."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    recipe = with_values(
        recipe_document,
        data__shards=s3_shards,
        cluster__storage=storage.join(bucket, "runs"),
        cluster__num_workers=2,
        tracking__experiment="on-s3",
        tracking__artifact_location=storage.join(bucket, "mlflow"),
    )
    reports: list[Progress] = []
    trained = train(recipe, "whole", reports.append)
    assert {(p.stage, p.step) for p in reports} >= {("vae", 6), ("denoiser", 6)}
    assert trained.model_uri == "models:/tiny/1"
    check_record(trained, recipe)
    assert any(name.startswith("mlflow/") for name in storage.list_files(bucket))
    before = draw(trained.model_uri, tmp_path / "a")
    assert draw(trained.model_uri, tmp_path / "b") == before

    # The record alone has the whole recipe, and starting a finished run again trains nothing.
    (tmp_path / "again.yaml").write_text(trained.tracker.read_text("recipe.yaml"))
    again = load_recipe(str(tmp_path / "again.yaml"))
    assert again == recipe
    reports.clear()
    assert train(again, "whole", reports.append).model_uri == trained.model_uri
    assert reports == []

    # The same run is trained longer, which makes another version, and leaves the first as it was.
    longer = load_recipe(str(tmp_path / "again.yaml"), ["denoiser.training.steps=8"])
    assert train(longer, "whole", reports.append).model_uri == "models:/tiny/2"
    assert [progress.step for progress in reports if not progress.is_preparation] == [8]
    assert trained.tracker.read_text("recipe.yaml") == dump_recipe(longer)
    assert draw("models:/tiny/2", tmp_path / "longer") != before
    assert draw(trained.model_uri, tmp_path / "still") == before


def begin_with_vae(recipe: MSDMRecipe, *names: str) -> None:
    """Put one barely trained autoencoder into these runs, to whose point it adds nothing."""
    first, *others = (RunFolder.of(recipe, name) for name in names)
    reports = Reports()
    train_rank(recipe, "vae", first, device=CPU, report=reports, resume_from=None)
    msdm.export(recipe, "vae", first, reports.checkpoints[max(reports.checkpoints)], Path(first.model("vae")))
    first.mark_complete("vae")
    prepare_denoiser(recipe, first)
    for other in others:
        shutil.copytree(first.model("vae"), other.model("vae"))
        other.borrow_precomputed(first)


def test_interrupted_from_the_terminal_it_goes_on_where_it_stopped(
    recipe_document: dict[str, Any], tracking_uri: str, tmp_path: Path
) -> None:
    """Ctrl-C saves the state and prints the command that goes on; that command finishes the very run."""
    recipe = with_values(
        recipe_document,
        denoiser__training__steps=400,
        denoiser__training__log_every_steps=20,
        denoiser__training__checkpoint_every_steps=1000,
        denoiser__training__validate_every_steps=400,
        denoiser__training__preview_every_steps=400,
    )
    begin_with_vae(recipe, "stopped", "straight")
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    command = [sys.executable, "-m", "medsynth", "train", str(path), "--run", "stopped"]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": tracking_uri}
    first = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        # As below a terminal: a script's background job, as these tests may be, ignores Ctrl-C, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert first.stdout is not None
    lines: list[str] = []
    for line in first.stdout:
        lines.append(line)
        if " denoiser " in line:
            first.send_signal(signal.SIGINT)
            break
    lines += list(first.stdout)
    output = "".join(lines)
    assert first.wait(120) == 130, output
    assert "Stopped and saved. To go on: medsynth train" in output
    assert "--run stopped" in output

    # A crash of the launching process may leave Ray Train's index of the checkpoints in the middle of its writing.
    index = tmp_path / "runs/stopped/denoiser" / INDEX
    index.write_bytes(index.read_bytes()[:-20])
    second = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400, check=False)
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"denoiser/{INDEX} is passed over" in second.stderr
    assert " vae " not in "".join(line for line in (output + second.stdout).splitlines() if "/6 " in line)

    # What one rank comes to without stopping, and without Ray.
    straight = Reports()
    train_rank(recipe, "denoiser", RunFolder.of(recipe, "straight"), device=CPU, report=straight, resume_from=None)
    resumed = safetensors.torch.load_file(
        tmp_path / "runs/stopped/denoiser/model/unet/diffusion_pytorch_model.safetensors"
    )
    averages = {name.removeprefix("ema/"): value for name, value in straight.weights.items() if name.startswith("ema/")}
    assert_equal(resumed, averages)


SMALL_DISK = """
import resource, sys
if "default_worker" in " ".join(sys.orig_argv):
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
"""


def test_a_disk_that_is_full_ends_a_run_in_one_line(
    recipe_document: dict[str, Any], tracking_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no rank is started again, as none would find more room: here for more than 60 kB a file."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SMALL_DISK)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]))
    said = r"^run full cannot go on: there is no room left on .* File too large"
    with pytest.raises(RunCutOffError, match=said) as told:
        train(with_values(recipe_document), "full")
    assert str(told.value).isprintable()
