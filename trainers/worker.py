"""One rank of a stage's training, as plain code: the same under Ray Train, under torchrun or alone."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from cluster import storage
from data_shards import Manifest, ShardStream
from trainers.engines.ddp import DDPEngine
from trainers.loop import Report, train
from trainers.msdm.stages import denoiser_stage, vae_stage
from trainers.recipe import Data, Recipe, Training
from trainers.run_folder import RunFolder
from trainers.stage import Stage

STAGES = ("vae", "denoiser")
NUM_VAE_EXAMPLES = 8
STOP_POLL_SECONDS = 1.0


def training_of(recipe: Recipe, stage: str) -> Training:
    return recipe.vae.training if stage == "vae" else recipe.denoiser.training


def open_stream(recipe: Recipe, split: str, training: Training, *, rank: int = 0, world_size: int = 1) -> ShardStream:
    data: Data = recipe.data
    return ShardStream(
        data.shards,
        split=split,
        resolution=data.resolution,
        global_batch_size=training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
        seed=recipe.seed,
        rank=rank,
        world_size=world_size,
        horizontal_flip=data.horizontal_flip,
        num_workers=data.num_workers,
    )


def train_rank(
    recipe: Recipe,
    stage_name: str,
    run: RunFolder,
    *,
    device: torch.device,
    report: Report,
    resume_from: Path | None,
) -> int:
    """Train one stage on this rank of the default process group and return the number of finished steps."""
    training = training_of(recipe, stage_name)
    stage = build_stage(recipe, stage_name, run, device)
    engine = DDPEngine(stage.model, training, device)
    ranks = {"rank": engine.rank, "world_size": engine.world_size}
    with stop_signal(run, is_rank_zero=engine.rank == 0) as stop_requested:
        return train(
            training=training,
            stage=stage,
            engine=engine,
            stream=open_stream(recipe, "train", training, **ranks),
            validation=open_stream(recipe, "validation", training, **ranks),
            seed=recipe.seed,
            report=report,
            stop_requested=stop_requested,
            resume_from=resume_from,
        )


def build_stage(recipe: Recipe, stage_name: str, run: RunFolder, device: torch.device) -> Stage:
    if stage_name == "vae":
        validation = open_stream(recipe, "validation", recipe.vae.training)
        batches = islice(validation.one_pass(NUM_VAE_EXAMPLES), 1)
        return vae_stage(recipe, torch.cat([batch.images for batch in batches]), device)
    with storage.local_folder(run.model("vae")) as folder:
        vae = AutoencoderKL.from_pretrained(folder)
    return denoiser_stage(recipe, vae, device)


@contextmanager
def stop_signal(run: RunFolder, *, is_rank_zero: bool) -> Iterator[Callable[[], bool]]:
    """A cheap question the loop may ask each step: was this run asked to stop?

    Rank 0 looks for the run's STOP file in the background; the other ranks learn of it in the step's exchange.
    """
    asked, done = threading.Event(), threading.Event()

    def watch() -> None:
        while not done.wait(STOP_POLL_SECONDS):
            if run.stop_requested():
                asked.set()
                return

    watcher = threading.Thread(target=watch, daemon=True)
    if is_rank_zero:
        watcher.start()
    try:
        yield asked.is_set
    finally:
        done.set()


def check_data(recipe: Recipe) -> Manifest:
    """Raise UserError now, not after minutes, when the shards lack what training will ask for."""
    manifest = Manifest.load(recipe.data.shards)
    for split in ("train", "validation"):
        manifest.split(split)
    return manifest
