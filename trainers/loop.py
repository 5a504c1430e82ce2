"""The training loop: one for every model.

What differs between models is in the stage (what is trained, on which loss) and in the engine (on how many
ranks, in which precision). Everything random is a function of the seed and the step, so a run that was stopped
and resumed is the run that was never stopped, at any world size.
"""

import math
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from cluster.errors import UserError
from data_shards import Batch, ShardStream, derive_seed
from trainers.engines import Arriving, Engine, Saving
from trainers.hardware import peak_flops
from trainers.learning_rate import learning_rate_at
from trainers.recipe import Training
from trainers.stage import Stage
from trainers.timing import Interval

MAX_SKIPPED_STEPS = 10  # in a row; a few are bad luck, ten are a diverged run

Report = Callable[[int, dict[str, float], Tensor | None, Saving | None], None]
"""(step, metrics, preview pixels uint8 [N, H, W, 3] on rank 0, this rank's part of a checkpoint); called by every
rank alike. The checkpoint's folder belongs to the callee, who removes it."""


class DivergedError(UserError):
    """Loss or gradients were not finite in too many steps in a row."""


def train(
    *,
    training: Training,
    stage: Stage,
    engine: Engine,
    stream: ShardStream,
    validation: ShardStream,
    seed: int,
    report: Report,
    stop_requested: Callable[[], bool] = lambda: False,
    save_requested: Callable[[int], bool] = lambda step: False,
    resume_from: Path | None = None,
) -> int:
    """Train to `training.steps`, or until a rank is asked to stop, and return the number of finished steps.

    `save_requested` says, to all ranks alike, whether to save after this step too, as when a machine is to go.

    Raises DivergedError after MAX_SKIPPED_STEPS steps in a row whose loss or gradient is not finite; no weight is
    then other than finite.
    """
    step = engine.load(resume_from) if resume_from else 0
    batches = stream.batches(start_step=step)
    peak = peak_flops(engine.device, torch.bfloat16 if training.precision == "bf16" else torch.float32)
    interval = Interval(engine.device)
    arriving: deque[Arriving] = deque()
    skipped_in_a_row = 0
    is_stopping = False

    while step < training.steps and not is_stopping:
        # Draw nothing from a state that a resume could not restore.
        torch.manual_seed(derive_seed(seed, "step", step, engine.rank))

        # Accumulate gradients over this rank's micro-batches.
        with interval.time("data"):
            micro_batches = next(batches)
        loss = torch.zeros((), device=engine.device)
        for number, micro_batch in enumerate(micro_batches, start=1):
            with engine.micro_batch(is_last=number == len(micro_batches)):
                with interval.time("forward"):
                    prepared = stage.prepare(micro_batch, True)
                    with engine.autocast():
                        micro_loss = stage.objective(engine.model, **prepared).mean() * micro_batch.weight
                with interval.time("backward"):
                    engine.backward(micro_loss)
            loss += micro_loss.detach()

        # Update the weights, unless some rank's loss or gradient is not finite.
        learning_rate = learning_rate_at(step, training)
        with interval.time("optimizer"):
            arriving.append(engine.step(learning_rate, loss, stop_requested=stop_requested()))
        step += 1

        # Look at the step before, whose outcome is there by now: waiting for this one's would leave the device idle.
        is_logged = step == training.steps or step % training.log_every_steps == 0
        while len(arriving) > (0 if is_logged or is_stopping else 1):
            outcome = arriving.popleft().read()
            interval.add(outcome)
            is_stopping |= outcome.stop_requested
            skipped_in_a_row = 0 if outcome.applied else skipped_in_a_row + 1
            if skipped_in_a_row >= MAX_SKIPPED_STEPS:
                raise DivergedError(
                    f"loss or gradients were not finite in {MAX_SKIPPED_STEPS} steps in a row up to step {step}; "
                    f"lower the learning rate ({learning_rate:g}) or max_grad_norm ({training.max_grad_norm:g})"
                )

        # Log, validate, draw and save, each at its own pace; the last step does all four.
        is_last = step == training.steps or is_stopping
        metrics: dict[str, float] = {}
        pixels: Tensor | None = None
        saving: Saving | None = None
        if is_last or is_logged:
            metrics = interval.metrics(training.global_batch_size)
            metrics |= {"learning_rate": learning_rate, "world_size": engine.world_size}
            rate = metrics["images_per_second"] * stage.flops_per_image / engine.world_size
            metrics |= {"teraflops_per_second": rate / 1e12, "mfu": rate / peak}
            metrics["replaced_samples"] = engine.mean(stream.replaced, 1) * engine.world_size
            interval = Interval(engine.device)
        if is_last or step % training.validate_every_steps == 0:
            metrics["validation_loss"] = validation_loss(stage, engine, validation, training)
        if is_last or step % training.preview_every_steps == 0:
            pixels = preview(stage, engine)
        with interval.time("stall"):
            if is_last or step % training.checkpoint_every_steps == 0 or save_requested(step):
                saving = save(engine, step)
            if metrics or pixels is not None or saving is not None:
                report(step, metrics, pixels, saving)

    return step


def validation_loss(stage: Stage, engine: Engine, validation: ShardStream, training: Training) -> float:
    """Mean loss of the averaged weights over `training.validation_samples`, each rank taking its share.

    Noise and timesteps are each sample's own, so values of different steps and runs compare.
    """
    total, count = 0.0, 0
    with engine.averaged_model() as model:
        for batch, counts in in_lockstep(engine, validation, training):
            prepared = stage.prepare(batch, False)
            with engine.autocast():
                losses = stage.objective(model, **prepared)
            if counts:
                total += float(losses.double().sum())
                count += len(losses)
    return engine.mean(total, count)


def in_lockstep(engine: Engine, validation: ShardStream, training: Training) -> Iterator[tuple[Batch, bool]]:
    """(batch, whether it counts): this rank's share of the split, then repetitions until every rank has had its own.

    Where weights are cut over the ranks, a forward needs all of them, so they must run equally many.
    """
    share = validation.one_pass(training.micro_batch_size, training.validation_samples)
    last: Batch | None = None
    while True:
        batch = next(share, None)
        if not engine.any_rank(batch is not None):
            return
        # A rank with no share at all, of a split smaller than the number of ranks, borrows a batch of others'.
        if batch is not None or last is None:
            last = batch or next(validation.batches())[0]
        yield last, batch is not None


def preview(stage: Stage, engine: Engine) -> Tensor:
    """Pictures of the averaged weights, drawn by all ranks; whole on rank 0, empty elsewhere."""
    # Equally many on each rank, so some are drawn twice: ranks that share weights must run equally many forwards.
    rounds = range(math.ceil(stage.num_previews / engine.world_size))

    def pictures_of(rank: int) -> list[int]:
        return [(rank + turn * engine.world_size) % stage.num_previews for turn in rounds]

    with engine.averaged_model() as model:
        drawn = stage.preview(model, pictures_of(engine.rank))
    by_picture: dict[int, Tensor] = {}
    for rank, pixels in enumerate(engine.gather(drawn)):
        by_picture = dict(zip(pictures_of(rank), pixels, strict=True)) | by_picture
    return torch.stack([by_picture[i] for i in sorted(by_picture)]) if by_picture else torch.empty(0)


def save(engine: Engine, step: int) -> Saving | None:
    """This rank's part of a checkpoint, in a folder of its own; None if it has none."""
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
    saving = engine.save(folder, step)
    if saving is None:
        folder.rmdir()
    return saving
