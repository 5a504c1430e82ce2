"""One rank of a stage's training, as plain code: the same under Ray Train, under torchrun or alone."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch

from cluster import storage
from trainers.families import family_of
from trainers.loop import Report, train
from trainers.recipe import Recipe
from trainers.run_folder import RunFolder
from trainers.watchdog import watchdog

STOP_POLL_SECONDS = 1.0


def train_rank(
    recipe: Recipe,
    stage_name: str,
    run: RunFolder,
    *,
    device: torch.device,
    report: Report,
    resume_from: Path | None,
    save_requested: Callable[[int], bool] = lambda step: False,
) -> int:
    """Train one stage on this rank of the default process group and return the number of finished steps.

    `save_requested` is `loop.train`'s.
    """
    family = family_of(recipe)
    stage, engine = family.build(recipe, stage_name, run, device)
    ranks = {"rank": engine.rank, "world_size": engine.world_size}
    keep_stacks = partial(_keep_stacks, run, f"{stage_name}-rank-{engine.rank}")
    with (
        stop_signal(run, is_rank_zero=engine.rank == 0) as stop_requested,
        watchdog(recipe.cluster.hang_timeout_seconds, keep_stacks) as is_alive,
    ):

        def next_step() -> bool:
            """What the loop asks each step; that it asks is the sign that it lives."""
            is_alive()
            return stop_requested()

        return train(
            training=family.training_of(recipe, stage_name),
            stage=stage,
            engine=engine,
            stream=family.open_stream(recipe, stage_name, run, "train", **ranks),
            validation=family.open_stream(recipe, stage_name, run, "validation", **ranks),
            seed=recipe.seed,
            report=report,
            stop_requested=next_step,
            save_requested=save_requested,
            resume_from=resume_from,
        )


def _keep_stacks(run: RunFolder, name: str, stacks: str) -> None:
    storage.write_bytes(run.stacks(name), stacks.encode())


@contextmanager
def stop_signal(run: RunFolder, *, is_rank_zero: bool) -> Iterator[Callable[[], bool]]:
    """A cheap question the loop may ask each step: was this run asked to stop?

    Rank 0 looks for the run's STOP file in the background; the other ranks learn of it in the step's exchange.
    """
    asked, done = threading.Event(), threading.Event()

    def watch() -> None:
        while not done.wait(STOP_POLL_SECONDS):
            with suppress(storage.StorageError):  # ask again in a second
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
