"""Whole runs under Ray Train: local, on S3 with a tracking server, killed, and interrupted."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray.train
import safetensors.torch
import torch
from PIL import Image

from cluster import runtime, storage
from cluster.tracking import Tracker
from tests.trainers.test_loop import CPU, Reports
from trainers.export import export_checkpoint
from trainers.families import msdm
from trainers.generate import generate
from trainers.launch import Progress, TrainedRun, _measure_beside, train_recipe
from trainers.recipe import Fidelity, FluxRecipe, MSDMRecipe, Recipe, dump_recipe, load_recipe
from trainers.run_folder import RunFolder
from trainers.worker import train_rank

pytestmark = pytest.mark.slow


@pytest.fixture
def one_ray() -> Iterator[None]:
    """One cluster inside this process for all runs of a test."""
    with runtime.connect(min_cpus=3):
        yield


# A measurement that takes time, depends on every weight of the exported model, and is killed at its first attempt.
SLOW_MEASUREMENT = """
import sys, types
def measure_checkpoint(recipe, folder):
    import os, pathlib, signal, time
    import safetensors.torch
    killed = pathlib.Path(recipe.cluster.storage) / "killed"
    if not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    weights = safetensors.torch.load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    time.sleep(4)
    return {"fid_random_vgg": float(sum(value.double().abs().sum() for value in weights.values()))}
module = sys.modules["trainers.evaluate"] = types.ModuleType("trainers.evaluate")
module.measure_checkpoint = measure_checkpoint
"""


@pytest.fixture
def slow_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Ray's processes, `trainers.evaluate` is SLOW_MEASUREMENT."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SLOW_MEASUREMENT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]))


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


def final_weights(trained: TrainedRun) -> dict[str, torch.Tensor]:
    """Every trained weight of the finished model, by component and name."""
    with storage.local_folder(trained.folder.model(trained.stages[-1])) as folder:
        return {
            f"{path.parent.name}/{name}": value
            for component in ("vae", "unet", "transformer")
            for path in folder.glob(f"{component}/*.safetensors")
            for name, value in safetensors.torch.load_file(path).items()
        }


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
        assert Image.open(folder / "pictures" / "denoiser-000006.png").size == (3 * 18 - 2, 16)
        assert Image.open(folder / "pictures" / "vae-000006.png").height == 32


def check_fidelity(trained: TrainedRun, steps: list[int]) -> None:
    """A value and a model for each of the steps, once; the training had gone on meanwhile."""
    client, run_id = trained.tracker.client, trained.tracker.run_id
    values = client.get_metric_history(run_id, "fidelity/fid_random_vgg")
    assert [metric.step for metric in values] == steps
    assert len({metric.value for metric in values}) == len(steps)
    later = next(m for m in client.get_metric_history(run_id, "denoiser/loss") if m.step == steps[0] + 2)
    assert later.timestamp < values[0].timestamp
    run = client.get_run(run_id)
    models = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'")
    assert sorted(int(model.params["step"]) for model in models) == steps
    assert trained.metrics["fidelity/fid_random_vgg"] == values[-1].value
    assert trained.failures == {}


def test_a_measurement_that_fails_is_said_and_ends_nothing(
    recipe_document: dict[str, Any], tracking_uri: str, slow_measurement: None, one_ray: None, tmp_path: Path
) -> None:
    recipe = with_values(recipe_document, fidelity={"every_steps": 2})
    tracker = Tracker.start(experiment="e", run_name="r", tags={})
    measured = _measure_beside(
        ray.train.Checkpoint(str(tmp_path)),
        step=4,
        recipe=recipe,
        stage="denoiser",
        run=RunFolder.of(recipe, "none"),
        tracker=tracker,
        data={"dataset_name": "small", "dataset_digest": "d"},
    )
    assert measured == {}
    assert tracker.failures() == {"fidelity at step 4": f"there is no folder {tmp_path}/runs/none/vae/model"}


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
    assert draw(trained.model_uri, tmp_path / "a") == draw(trained.model_uri, tmp_path / "b")

    # The record alone has the whole recipe, and starting a finished run again trains nothing.
    (tmp_path / "again.yaml").write_text(trained.tracker.read_text("recipe.yaml"))
    again = load_recipe(str(tmp_path / "again.yaml"))
    assert again == recipe
    reports.clear()
    assert train(again, "whole", reports.append).model_uri == trained.model_uri
    assert reports == []


def test_a_killed_worker_changes_nothing(
    recipe_document: dict[str, Any], tracking_uri: str, slow_measurement: None, one_ray: None
) -> None:
    """kill -9 on a rank in mid-training: the run goes on by itself and ends with the undisturbed run's weights.

    Beside it, checkpoints are measured: once each, and while the training goes on; which changes nothing either.
    """
    recipe = with_values(
        recipe_document,
        cluster__num_workers=2,
        denoiser__training__steps=40,
        tracking__register_as=None,
    )
    begin_with_vae(recipe, "undisturbed", "disturbed")
    undisturbed = train(recipe, "undisturbed")
    recipe = recipe.model_copy(update={"fidelity": Fidelity(every_steps=16)})
    killed: list[int] = []

    def kill_a_rank(progress: Progress) -> None:
        if progress.stage == "denoiser" and progress.step >= 18 and not killed:
            victim = ray_train_workers()[-1]
            victim.kill()
            killed.append(victim.pid)

    disturbed = train(recipe, "disturbed", kill_a_rank)
    assert len(killed) == 1
    assert_equal(final_weights(disturbed), final_weights(undisturbed))
    check_fidelity(disturbed, steps=[16, 32, 40])
    for name in ("denoiser/loss", "denoiser/validation_loss"):
        assert disturbed.tracker.metric_history(name) == undisturbed.tracker.metric_history(name)


def test_flux_under_zero3_survives_a_worker_killed_while_it_uploads(
    flux_document: dict[str, Any], tracking_uri: str, one_ray: None, tmp_path: Path
) -> None:
    """Two ZeRO-3 ranks, one killed amid a checkpoint's upload: the one before counts, and the end is the same."""
    flux_document["cluster"]["num_workers"] = 2
    flux_document["cluster"]["keep_checkpoints"] = 4  # that of step 6 too
    flux_document["transformer"]["training"]["steps"] = 12
    recipe = FluxRecipe.model_validate(flux_document)
    undisturbed = train(recipe, "undisturbed")
    uploaded = (
        Path(RunFolder.of(recipe, "disturbed").uri) / "transformer/step-000006-of-2/rank-00001-of-00002.safetensors"
    )
    uploaded.parent.mkdir(parents=True)
    os.mkfifo(uploaded)
    reported: list[int] = []
    with ThreadPoolExecutor() as pool:
        killed = pool.submit(kill_amid_upload, uploaded)
        disturbed = train(recipe, "disturbed", lambda progress: reported.append(progress.step))
    assert killed.result()
    assert uploaded.stat().st_size > killed.result(), "uploaded again, and whole"
    assert reported == [2, 4, 6, 8, 10, 12]  # step 6 after the restart, which began at step 4's checkpoint
    assert_equal(final_weights(disturbed), final_weights(undisturbed))
    for name in ("transformer/loss", "transformer/validation_loss"):
        assert disturbed.tracker.metric_history(name) == undisturbed.tracker.metric_history(name)
    assert undisturbed.model_uri == "models:/tiny-flux/1"
    assert draw(undisturbed.model_uri, tmp_path / "a") == draw(undisturbed.model_uri, tmp_path / "b")

    # The same weights leave a checkpoint by the command as well, and a later one that was cut off does not count.
    (Path(disturbed.folder.uri) / "transformer" / "step-000014-of-2").mkdir()
    (Path(disturbed.folder.uri) / "transformer" / "step-000014-of-2" / "rank-00000-of-00002.safetensors").touch()
    found = export_checkpoint(disturbed.folder.uri, tmp_path / "exported", step=None, weights="ema")
    assert found == 12
    weights = {name.partition("/")[2]: v for name, v in final_weights(disturbed).items() if "transformer/" in name}
    assert_equal(
        safetensors.torch.load_file(tmp_path / "exported/transformer/diffusion_pytorch_model.safetensors"),
        weights,
    )


def begin_with_vae(recipe: MSDMRecipe, *names: str) -> None:
    """Put one barely trained autoencoder into these runs, to whose point it adds nothing."""
    first, *others = (RunFolder.of(recipe, name) for name in names)
    reports = Reports()
    train_rank(recipe, "vae", first, device=CPU, report=reports, resume_from=None)
    msdm.export(recipe, "vae", first, reports.checkpoints[max(reports.checkpoints)], Path(first.model("vae")))
    first.mark_complete("vae")
    for other in others:
        shutil.copytree(first.model("vae"), other.model("vae"))


def kill_amid_upload(pipe: Path) -> int:
    """kill -9 the rank that uploads to this pipe as soon as a part of the file has come through.

    The part that came is left in the pipe's place, as a disk would keep it. Returns its number of bytes.
    """
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    part = b""
    while not part:
        time.sleep(0.05)
        with suppress(BlockingIOError):
            part = os.read(reader, 1000)
    (writer,) = (worker for worker in ray_train_workers() if has_open(worker, pipe))
    writer.kill()
    pipe.unlink()
    pipe.write_bytes(part)
    os.close(reader)
    return len(part)


def has_open(process: psutil.Process, path: Path) -> bool:
    descriptors = Path(f"/proc/{process.pid}/fd").iterdir()
    return any(os.path.realpath(descriptor) == str(path.resolve()) for descriptor in descriptors)


def ray_train_workers() -> list[psutil.Process]:
    """The rank processes of the Ray cluster inside this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        title = " ".join(process.cmdline()[:1])
        if "RayTrainWorker" in title:
            found.append(process)
    assert found
    return found


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
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
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

    second = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400, check=False)
    assert second.returncode == 0, second.stdout + second.stderr
    assert " vae " not in "".join(line for line in (output + second.stdout).splitlines() if "/6 " in line)

    # What one rank comes to without stopping, and without Ray.
    straight = Reports()
    train_rank(recipe, "denoiser", RunFolder.of(recipe, "straight"), device=CPU, report=straight, resume_from=None)
    resumed = safetensors.torch.load_file(
        tmp_path / "runs/stopped/denoiser/model/unet/diffusion_pytorch_model.safetensors"
    )
    averages = {name.removeprefix("ema/"): value for name, value in straight.weights.items() if name.startswith("ema/")}
    assert_equal(resumed, averages)
