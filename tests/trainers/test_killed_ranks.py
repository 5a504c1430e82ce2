"""Ranks that are killed, and measurements that fail, change nothing of what a run comes to."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray.train
import safetensors.torch
import torch

from cluster import runtime, storage
from cluster.environment import variables
from cluster.tracking import Tracker
from tests.trainers.test_launch import assert_equal, begin_with_vae, draw, train, with_values
from trainers.export import export_checkpoint
from trainers.launch import Progress, TrainedRun, _measure_beside
from trainers.recipe import Fidelity, FluxRecipe
from trainers.records import Records
from trainers.run_folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("killed-ranks")]  # one process has the one Ray

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


@pytest.fixture(scope="module", autouse=True)
def _one_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cluster inside this process for all runs; in its processes, `trainers.evaluate` is SLOW_MEASUREMENT."""
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(SLOW_MEASUREMENT)
    with (
        variables({"PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}),
        runtime.connect(min_cpus=3),
    ):
        yield


def final_weights(trained: TrainedRun) -> dict[str, torch.Tensor]:
    """Every trained weight of the finished model, by component and name."""
    with storage.local_folder(trained.folder.model(trained.stages[-1])) as folder:
        return {
            f"{path.parent.name}/{name}": value
            for component in ("vae", "unet", "transformer")
            for path in folder.glob(f"{component}/*.safetensors")
            for name, value in safetensors.torch.load_file(path).items()
        }


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
    recipe_document: dict[str, Any], tracking_uri: str, tmp_path: Path
) -> None:
    recipe = with_values(recipe_document, fidelity={"every_steps": 2})
    tracker = Tracker.start(experiment="e", run_name="r", tags={})
    run = RunFolder.of(recipe, "none")
    measured = _measure_beside(
        ray.train.Checkpoint(str(tmp_path)),
        step=4,
        recipe=recipe,
        stage="denoiser",
        run=run,
        data={"dataset_name": "small", "dataset_digest": "d"},
    )
    assert measured == {}
    Records(run, tracker).flush(seconds=0)
    assert tracker.failures() == {"fidelity at step 4": f"there is no folder {tmp_path}/runs/none/vae/model"}


def test_a_killed_worker_changes_nothing(recipe_document: dict[str, Any], tracking_uri: str) -> None:
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
    flux_document: dict[str, Any], tracking_uri: str, tmp_path: Path
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
