"""The loop and the DDP engine: equal at any world size, resumed or not, and never a non-finite weight."""

import json
import multiprocessing
from concurrent.futures import Future
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.servers import free_port
from trainers import worker
from trainers.engines import Saving
from trainers.engines.ddp import DDPEngine
from trainers.families import msdm
from trainers.loop import MAX_SKIPPED_STEPS, DivergedError, Report, train
from trainers.msdm.export import export_vae
from trainers.recipe import MSDMRecipe
from trainers.run_folder import RunFolder
from trainers.stage import Stage
from trainers.worker import train_rank

CPU = torch.device("cpu")


class Reports:
    """What the loop reported; checkpoints are kept by step."""

    def __init__(self) -> None:
        self.metrics: dict[int, dict[str, float]] = {}
        self.pixels: dict[int, Tensor] = {}
        self._written: dict[int, Future[None]] = {}
        self._folders: dict[int, Path] = {}

    def __call__(self, step: int, metrics: dict[str, float], pixels: Tensor | None, saving: Saving | None) -> None:
        self.metrics[step] = metrics
        if pixels is not None:
            self.pixels[step] = pixels
        if saving is not None:
            self._written[step] = saving.written
            self._folders[step] = saving.folder

    @property
    def checkpoints(self) -> dict[int, Path]:
        for written in self._written.values():
            written.result(60)
        return self._folders

    @property
    def weights(self) -> dict[str, Tensor]:
        return states(self.checkpoints[max(self.checkpoints)])

    def series(self, name: str) -> list[float]:
        return [self.metrics[step][name] for step in sorted(self.metrics) if name in self.metrics[step]]


def states(checkpoint: Path) -> dict[str, Tensor]:
    return {
        f"{part}/{name}": value
        for part in ("model", "ema")
        for name, value in safetensors.torch.load_file(checkpoint / f"{part}.safetensors").items()
    }


def with_training(recipe: MSDMRecipe, stage: str, **changes: Any) -> MSDMRecipe:
    document = recipe.model_dump()
    document[stage]["training"] |= changes
    return MSDMRecipe.model_validate(document)


def vae_model(recipe: MSDMRecipe, run: RunFolder) -> None:
    """A barely trained autoencoder in the run's folder, which the denoiser stage starts from; trained in bf16."""
    reports = Reports()
    recipe = with_training(recipe, "vae", steps=2, precision="bf16")
    train_rank(recipe, "vae", run, device=CPU, report=reports, resume_from=None)
    batches = next(msdm.open_stream(recipe, "vae", run, "train").batches())
    export_vae(recipe, reports.checkpoints[2], batches, Path(run.model("vae")))


def prepare_denoiser(recipe: MSDMRecipe, run: RunFolder) -> None:
    """Precompute what the denoiser is trained on, with the run's autoencoder, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        msdm.prepare(recipe, "denoiser", run, lambda what, done, total: None)


@pytest.fixture
def run(recipe: MSDMRecipe, tmp_path: Path) -> RunFolder:
    folder = RunFolder(str(tmp_path / "run"))
    vae_model(recipe, folder)
    prepare_denoiser(recipe, folder)
    return folder


@pytest.mark.parametrize(("stage", "channels_last"), [("vae", True), ("denoiser", False), ("denoiser", True)])
def test_resumed_is_bitwise_never_stopped(recipe: MSDMRecipe, run: RunFolder, stage: str, channels_last: bool) -> None:
    recipe = with_training(recipe, stage, channels_last=channels_last)
    straight, resumed = Reports(), Reports()
    train_rank(recipe, stage, run, device=CPU, report=straight, resume_from=None)
    assert sorted(straight.checkpoints) == [2, 4, 6]
    train_rank(recipe, stage, run, device=CPU, report=resumed, resume_from=straight.checkpoints[2])
    assert sorted(resumed.checkpoints) == [4, 6]
    assert straight.weights.keys() == resumed.weights.keys()
    assert all(torch.equal(value, resumed.weights[name]) for name, value in straight.weights.items())
    assert straight.metrics[6]["loss"] == resumed.metrics[6]["loss"]
    assert straight.metrics[6]["validation_loss"] == resumed.metrics[6]["validation_loss"]
    assert torch.equal(straight.pixels[6], resumed.pixels[6])


def train_asked(recipe: MSDMRecipe, run: RunFolder, report: Report, **asked: Any) -> int:
    """Train the denoiser with `stop_requested` and the like of the test's own."""
    stage, engine = msdm.build(recipe, "denoiser", run, CPU)
    return train(
        training=recipe.denoiser.training,
        stage=stage,
        engine=engine,
        stream=msdm.open_stream(recipe, "denoiser", run, "train"),
        validation=msdm.open_stream(recipe, "denoiser", run, "validation"),
        seed=recipe.seed,
        report=report,
        **asked,
    )


def test_a_stop_saves_at_once_and_the_run_goes_on_from_there(
    recipe: MSDMRecipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, stopped, resumed = Reports(), Reports(), Reports()
    recipe = with_training(recipe, "denoiser", precision="bf16")
    train_rank(recipe, "denoiser", run, device=CPU, report=straight, resume_from=None)
    asked = count(1)
    steps = train_asked(
        recipe, run, stopped, stop_requested=lambda: next(asked) == 3, save_requested=lambda step: step == 1
    )
    assert steps == 4  # of a step it is known after the next
    assert sorted(stopped.checkpoints) == [1, 2, 4]  # what was asked for, on schedule, the end
    train_rank(recipe, "denoiser", run, device=CPU, report=resumed, resume_from=stopped.checkpoints[4])
    assert all(torch.equal(value, resumed.weights[name]) for name, value in straight.weights.items())


def test_the_stop_file_reaches_the_loop(recipe: MSDMRecipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "STOP_POLL_SECONDS", 0.01)
    run.request_stop()
    recipe = with_training(recipe, "vae", steps=10_000)
    reports = Reports()
    steps = train_rank(recipe, "vae", run, device=CPU, report=reports, resume_from=None)
    assert steps < 10_000
    assert steps in reports.checkpoints
    run.clear_stop()
    assert not run.stop_requested()


def test_losses_fall_on_real_images(recipe: MSDMRecipe, run: RunFolder) -> None:
    recipe = with_training(recipe, "vae", steps=60, log_every_steps=10, learning_rate=5e-3)
    reports = Reports()
    train_rank(recipe, "vae", run, device=CPU, report=reports, resume_from=None)
    losses = reports.series("loss")
    assert losses[-1] < 0.5 * losses[0]
    assert reports.series("grad_norm")[0] > 0


# --- several ranks ---


def train_on_rank(rank: int, world_size: int, port: int, recipe: MSDMRecipe, run: RunFolder, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    reports = Reports()
    for stage in ("vae", "denoiser"):
        train_rank(recipe, stage, run, device=CPU, report=reports, resume_from=None)
        if rank == 0:
            torch.save((reports.metrics, reports.pixels[6], reports.weights), out / f"{stage}.pt")
    dist.destroy_process_group()


def train_on(world_size: int, recipe: MSDMRecipe, run: RunFolder, out: Path) -> dict[str, Any]:
    out.mkdir()
    port = free_port()
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=train_on_rank, args=(rank, world_size, port, recipe, run, out))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0] * world_size
    return {stage: torch.load(out / f"{stage}.pt") for stage in ("vae", "denoiser")}


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(2, 2), (3, 1)])
def test_several_ranks_equal_one(
    recipe: MSDMRecipe, run: RunFolder, tmp_path: Path, world_size: int, micro_batch_size: int
) -> None:
    """Also where micro-batches cannot be dealt out evenly: four to three ranks."""
    for stage in ("vae", "denoiser"):
        recipe = with_training(recipe, stage, micro_batch_size=micro_batch_size)
    one = train_on(1, recipe, run, tmp_path / "one")
    several = train_on(world_size, recipe, run, tmp_path / "several")
    for stage in ("vae", "denoiser"):
        (metrics_1, pixels_1, weights_1), (metrics_2, pixels_2, weights_2) = one[stage], several[stage]
        assert metrics_1.keys() == metrics_2.keys()
        for step in metrics_1:
            for name in ("loss", "validation_loss", "grad_norm"):
                if name in metrics_1[step]:
                    assert metrics_2[step][name] == pytest.approx(metrics_1[step][name], rel=1e-5, abs=1e-5)
        assert weights_1.keys() == weights_2.keys()
        for name, value in weights_1.items():
            # A tenth of one step of Adam, which makes a whole one of a gradient that is nothing but rounding.
            torch.testing.assert_close(weights_2[name], value, rtol=1e-5, atol=1e-4)
        assert (pixels_1.int() - pixels_2.int()).abs().max() <= 1


# --- losses that are not finite ---


@pytest.fixture
def poisoned(recipe: MSDMRecipe, run: RunFolder) -> tuple[Stage, list[float]]:
    """The autoencoder's stage with losses multiplied by what the test puts into the list."""
    stage, _ = msdm.build(recipe, "vae", run, CPU)
    factors: list[float] = []

    def objective(model: nn.Module, **prepared: Tensor) -> Tensor:
        losses: Tensor = stage.objective(model, **prepared)
        return losses * (factors.pop(0) if factors else 1.0)

    return replace(stage, objective=objective), factors


def train_poisoned(recipe: MSDMRecipe, stage: Stage, reports: Reports) -> DDPEngine:
    recipe = with_training(
        recipe, "vae", micro_batch_size=4, log_every_steps=1, validate_every_steps=100, checkpoint_every_steps=1
    )
    engine = DDPEngine(stage.model, recipe.vae.training, CPU)
    train(
        training=recipe.vae.training,
        stage=stage,
        engine=engine,
        stream=msdm.open_stream(recipe, "vae", RunFolder.of(recipe, "poisoned"), "train"),
        validation=msdm.open_stream(recipe, "vae", RunFolder.of(recipe, "poisoned"), "validation"),
        seed=0,
        report=reports,
    )
    return engine


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_non_finite_step_leaves_the_weights_as_they_were(
    recipe: MSDMRecipe, poisoned: tuple[Stage, list[float]], factor: float
) -> None:
    stage, factors = poisoned
    factors += [1.0, 1.0, factor, 1.0]
    reports = Reports()
    train_poisoned(recipe, stage, reports)
    before, after, next_one = (states(reports.checkpoints[step]) for step in (2, 3, 4))
    kept = [name for name in before if name.startswith(("model/", "ema/"))]
    assert all(torch.equal(before[name], after[name]) for name in kept)
    counts = [json.loads((reports.checkpoints[step] / "state.json").read_text())["ema_updates"] for step in (2, 3, 4)]
    assert counts == [2, 2, 3], "of a step that was not applied the average knows nothing, as under ZeRO-3"
    assert any(not torch.equal(value, next_one[name]) for name, value in after.items())
    assert all(torch.isfinite(value).all() for value in next_one.values())
    assert [reports.metrics[step]["skipped_steps"] for step in (2, 3, 4)] == [0, 1, 0]


def test_a_diverged_run_ends_with_an_explanation(recipe: MSDMRecipe, poisoned: tuple[Stage, list[float]]) -> None:
    stage, factors = poisoned
    factors += [float("nan")] * (MAX_SKIPPED_STEPS + 5)
    recipe = with_training(recipe, "vae", steps=50)
    with pytest.raises(DivergedError, match="lower the learning rate"):
        train_poisoned(recipe, stage, Reports())
    assert all(torch.isfinite(parameter).all() for parameter in stage.model.parameters())
