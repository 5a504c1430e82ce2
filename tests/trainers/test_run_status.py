"""What a run that did not reach its end leaves: its status in MLflow, and the folder of the run that another owns."""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
from mlflow import MlflowClient
from ray.exceptions import ActorDiedError

from cluster import runtime, storage
from cluster.errors import UserError
from cluster.tracking import Tracker
from trainers import launch, lease, run_folder
from trainers.recipe import MSDMRecipe
from trainers.run_folder import RunFolder


@pytest.fixture
def train(recipe: MSDMRecipe, tracking_uri: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`train_recipe` without Ray, whose ranks do what is given."""
    monkeypatch.setattr(runtime, "connect", lambda **_: nullcontext())
    monkeypatch.setattr(runtime, "check_capacity", lambda **_: None)
    monkeypatch.setattr(runtime, "grows", lambda: False)
    monkeypatch.setattr(runtime, "nodes", lambda: [])
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.05)

    def train(ranks: Callable[[RunFolder, lease.Lease], None], **changes: Any) -> None:
        def stage(
            recipe: Any, stage: Any, manifest: Any, run: RunFolder, tracker: Any, own: lease.Lease, *_: Any
        ) -> None:
            ranks(run, own)

        monkeypatch.setattr(launch, "_train_stage", stage)
        changed = recipe.model_copy(update=changes)
        launch.train_recipe(changed, "tiny", on_progress=lambda _: None, on_stop_requested=lambda: None)

    return train


def status_of(recipe: MSDMRecipe, tracking_uri: str) -> str:
    begun = RunFolder.of(recipe, "tiny").mlflow_run()
    assert begun is not None
    return str(Tracker(tracking_uri, begun["run_id"]).client.get_run(begun["run_id"]).info.status)


@pytest.mark.parametrize(("asked_to_stop", "status"), [(False, "FAILED"), (True, "KILLED")])
def test_what_fails_after_it_was_asked_to_stop_was_stopped(
    asked_to_stop: bool, status: str, recipe: MSDMRecipe, tracking_uri: str, train: Callable[..., None]
) -> None:
    """As when Ray Tune ends the process of a trial whose ranks are still saving."""

    def ranks(run: RunFolder, own: lease.Lease) -> None:
        if asked_to_stop:
            run.request_stop()
        raise RuntimeError("the actor is gone")

    with pytest.raises(RuntimeError, match="gone"):
        train(ranks)
    assert status_of(recipe, tracking_uri) == status


FULL_DISK = """
import resource, sys
from pathlib import Path
import pyarrow.fs, safetensors.torch, torch
from cluster import storage
from cluster.errors import no_room
from trainers import checkpoint, sharded_checkpoint

out = Path(sys.argv[1])
(out / "from").mkdir()
(out / "from" / "file").write_bytes(bytes(10**6))
(out / "to").mkdir()
resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))  # no room for more than 100 kB a file
tensors = {"a": torch.zeros(10**6)}
small = {"a": torch.zeros(1)}
disk = pyarrow.fs.LocalFileSystem()
state = sharded_checkpoint.State(1, 1, 1, {"a": (10**6,)})
for write in (
    lambda: checkpoint.write(out, {"model": tensors}),
    lambda: checkpoint.write(out, {"model": small, "ema": small, "optimizer": tensors}),
    lambda: sharded_checkpoint.save(out, {"weights": tensors}, rank=0, world_size=1, state=state),
    lambda: pyarrow.fs.copy_files(str(out / "from"), str(out / "to"), disk, disk),
    lambda: storage.write_bytes(str(out / "x"), bytes(10**6)),
):
    try:
        write()
    except Exception as error:
        print(no_room(error))
print(no_room(ValueError("File not found")))
"""


def test_a_full_disk_is_known_whoever_writes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    root = Path(__file__).parents[2]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=True)
    *full, other = ended.stdout.splitlines()
    assert len(full) == 5
    assert all("File too large" in line for line in full), ended.stdout
    assert other == "None"


OUTAGE = storage.StorageError("cannot write s3://b/x: no server answers")


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (OSError(28, "No space left on device"), r"there is no room left \(\[Errno 28\] No space left on device\)"),
        (OUTAGE, "cannot write s3://b/x: no server answers"),
        (ray.train.WorkerGroupError("trace\n" * 60, {0: OUTAGE}), "cannot write s3://b/x: no server answers"),
        (ray.train.WorkerGroupError("trace", {1: ActorDiedError()}), "a rank's process or machine was lost"),
        (
            ray.train.WorkerGroupError("trace", {1: torch.OutOfMemoryError("CUDA")}),
            "a rank ran .*: lower micro_batch_size",
        ),
    ],
)
def test_what_gave_out_is_said_in_a_line_and_the_same_command_goes_on(
    failure: Exception, said: str, recipe: MSDMRecipe, tracking_uri: str, train: Callable[..., None]
) -> None:
    def ranks(run: RunFolder, own: lease.Lease) -> None:
        raise failure

    with pytest.raises(
        launch.RunCutOffError, match=f"^run tiny cannot go on: (after .*)?{said}.*the same command goes on"
    ) as caught:
        train(ranks)
    assert "\n" not in str(caught.value)
    assert status_of(recipe, tracking_uri) == "FAILED"


def test_stages_are_trained_until_one_of_them(recipe: MSDMRecipe) -> None:
    assert [launch._stages_until(("vae", "denoiser"), until) for until in ("vae", "denoiser", None)] == [
        ("vae",),
        ("vae", "denoiser"),
        ("vae", "denoiser"),
    ]
    with pytest.raises(UserError, match="there is no stage 'denoise': did you mean 'denoiser'"):
        launch.train_recipe(recipe, "tiny", on_progress=lambda _: None, on_stop_requested=lambda: None, until="denoise")
    assert not Path(RunFolder.of(recipe, "tiny").uri).exists()


def test_a_second_start_while_one_trains_changes_nothing(
    recipe: MSDMRecipe, tracking_uri: str, train: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the wish to stop, or what the first one's ranks hold of the cluster."""
    removed: list[str] = []
    monkeypatch.setattr(runtime, "remove_placement_group", removed.append)
    refused: list[str] = []

    def ranks(run: RunFolder, own: lease.Lease) -> None:
        Path(run.placement).write_bytes(b"ab" * 14)
        run.request_stop()
        before = {path: path.read_bytes() for path in Path(run.uri).glob("*") if path.is_file()}
        with pytest.raises(lease.HeldError, match=r"in use by .* since ") as told:
            launch.train_recipe(recipe, "tiny", on_progress=lambda _: None, on_stop_requested=lambda: None)
        refused.append(str(told.value))
        assert {path: path.read_bytes() for path in Path(run.uri).glob("*") if path.is_file()} == before
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        train(ranks)
    assert len(refused) == 1
    assert not removed
    client = MlflowClient(tracking_uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == recipe.tracking.experiment]
    assert len(client.search_runs([experiment.experiment_id])) == 1


def test_a_start_that_was_taken_over_from_ends_and_says_nothing_in_mlflow(
    recipe: MSDMRecipe, tracking_uri: str, train: Callable[..., None]
) -> None:
    def ranks(run: RunFolder, own: lease.Lease) -> None:
        assert lease._take(run.uri, 2)
        for _ in range(200):
            own.check()
            time.sleep(0.05)

    with pytest.raises(lease.LostError, match="was taken over by"):
        train(ranks)
    assert status_of(recipe, tracking_uri) == "RUNNING"


def test_the_legend_of_a_runs_folder_names_each_file() -> None:
    """Whoever finds a file in there looks it up in one place."""
    root = Path(__file__).parents[2]
    sources = [path.read_text() for room in ("trainers", "sweeps") for path in (root / room).rglob("*.py")]
    own = (root / "trainers" / "run_folder.py").read_text().replace("self.uri", "run.uri")
    written = {name for text in [*sources, own] for name in re.findall(r'join\(run\.uri, "([^"{]+)"', text)}
    written |= {"lr-find.json", "lr-find.png"}
    assert {"run.json", "recipe.yaml", "unrecorded.json", "measured", "registered.json", "STOP"} <= written
    assert run_folder.__doc__
    named = re.findall(r"^RUN/([\w.-]+)", run_folder.__doc__, re.MULTILINE)
    assert written <= set(named)
    assert len(named) == len(set(named))
