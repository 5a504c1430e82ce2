"""From a recipe to a trained, registered model: Ray Train runs each stage, MLflow records it.

The only module of this folder that imports Ray, but for exporter.py.
"""

import io
import logging
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util.queue import Queue
from torch import Tensor

from cluster import runtime, storage
from cluster.checksums import checksums
from cluster.errors import UserError, did_you_mean, first_line, no_room
from cluster.provenance import git_commit
from cluster.tracking import (
    Status,
    Tracker,
    TrackingError,
    check_tracking,
    default_tracking_uri,
    now_ms,
    without_secrets,
)
from data_shards import Manifest
from trainers import lease
from trainers.checkpoint_folders import checkpoint_folder, resume_point, seal, step_of
from trainers.engines import Saving
from trainers.exporter import Exporter, RankExporter, controller_exporter
from trainers.families import family_of
from trainers.fidelity.extractor_uris import label_of
from trainers.logs import json_logs
from trainers.loop import DivergedError
from trainers.pictures import grid
from trainers.recipe import Recipe, at_absolute_paths, dump_recipe
from trainers.records import Measurement, Records, Report, read_measurement, read_waiting
from trainers.run_folder import Registration, RunFolder
from trainers.worker import train_rank

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
# How often Ray Train takes a report, for which the ranks wait with the one after it: by its default, every two seconds.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
FIDELITY = "fidelity/"
MEASURE_ATTEMPTS = 3  # of a process that measures a checkpoint and is killed


@dataclass(frozen=True)
class Progress:
    """One report of a running stage, or of what is made once before it is trained."""

    stage: str  # or what is being made
    step: int
    steps: int
    metrics: Mapping[str, float]
    unrecorded: int = 0  # reports that wait because MLflow does not answer
    is_preparation: bool = False


@dataclass(frozen=True)
class TrainedRun:
    """Where a finished run's results are."""

    folder: RunFolder
    stages: tuple[str, ...]
    tracker: Tracker
    metrics: Mapping[str, float]  # the last of each, by stage/name
    model_uri: str  # models:/NAME/VERSION, or the model's folder when the recipe registers nothing
    failures: Mapping[str, str]  # what failed beside the training, and why


class RunCutOffError(UserError):
    """What the run needs gave out, such as its storage: when that is back, the same command goes on."""


class RunStopped(Exception):  # noqa: N818 - what happened, not what went wrong
    """The run was asked to stop, has saved its state, and goes on when started again under its name."""


def train_recipe(
    recipe: Recipe,
    run_name: str,
    *,
    on_progress: Callable[[Progress], None],
    on_stop_requested: Callable[[], None],
    on_starting: Callable[[str], None] = lambda what: None,
    until: str | None = None,
    start_from: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> TrainedRun:
    """Train every stage, then export and register the model. A run that was stopped goes on under its name.

    With `until`, the name of a stage, those up to it are trained, what the next one reads is prepared, and nothing is
    registered. The last one goes on from another run's checkpoint, `start_from`, if one is given. `tags` are of the
    MLflow run, when it begins.

    Raises UserError for what the user can mend, before any training where possible (HeldError, with nothing changed,
    while another process trains the run), and RunStopped when it was interrupted (Ctrl-C) and has saved its state;
    `on_stop_requested` is called when the saving begins. `on_starting` is told of what takes seconds, or minutes on a
    busy machine, before it tells of itself.
    """
    runtime.check_outlives_job(recipe.cluster.storage)
    recipe = at_absolute_paths(recipe)
    run = RunFolder.of(recipe, run_name)
    family = family_of(recipe)
    trained = _stages_until(family.STAGES, until)
    for place in (recipe.data.shards, run.uri):
        storage.check_answers(place)
    manifest = check_recipe(recipe)
    check_tracking()
    _check_left(run, run.previous(recipe, family.STAGES[-1]))
    storage.check_writable(run.uri)
    cluster, fidelity = recipe.cluster, recipe.fidelity
    num_processes = cluster.min_workers + (fidelity is not None)

    def on_waiting(silent: float, limit: float) -> None:
        what = f"{run.uri} has an owner that gives no sign of life: seconds until it is taken over"
        on_progress(Progress(what, int(silent), int(limit), {}, is_preparation=True))

    on_starting("Ray")
    with (
        lease.held(run.uri, on_waiting) as own,
        runtime.connect(min_cpus=num_processes * cluster.cpus_per_worker),
    ):
        runtime.check_capacity(
            num_workers=cluster.min_workers,
            cpus_per_worker=cluster.cpus_per_worker,
            gpus_per_worker=int(cluster.use_gpu),
            cpus_beside=cluster.cpus_per_worker if fidelity else 0,
            gpus_beside=int(fidelity.use_gpu) if fidelity else 0,
        )
        check_fits(recipe)
        tracker = _begin(recipe, manifest, run, run_name, tags or {})
        status: Status | None = "FAILED"

        def on_preparing(what: str, done: int, total: int) -> None:
            own.check()
            on_progress(Progress(what, done, total, {}, is_preparation=True))

        try:
            release(run)
            for stage in trained:
                own.check()
                if not run.has_model(stage):
                    family.prepare(recipe, stage, run, on_preparing)
                if not run.has_model(stage):
                    begin = start_from if stage == trained[-1] else None
                    training = family.training_of(recipe, stage)
                    on_starting(f"{stage}: the first report comes at step {training.log_every_steps}")
                    _train_stage(recipe, stage, manifest, run, tracker, own, begin, on_progress, on_stop_requested)
            own.check()
            for following in family.STAGES[len(trained) : len(trained) + 1]:
                family.prepare(recipe, following, run, on_preparing)
            on_starting("export and registration")
            Records(run, tracker).flush()
            model_uri = run.model(trained[-1]) if until else register_run(recipe, manifest, run, tracker)
            status = "FINISHED"
        except lease.LostError:
            status = None  # it is for whoever took over to say
            raise
        except (RunStopped, KeyboardInterrupt):
            status = "KILLED"
            raise
        except Exception as error:
            # Whoever asked it to stop may have ended what it needs to stop in order, as Ray Tune does.
            with suppress(storage.StorageError):
                status = "KILLED" if run.stop_requested() else status
            if reason := _outside_reason(error):
                raise RunCutOffError(
                    f"run {run_name} cannot go on: {reason}; when that is mended, the same command goes on from its "
                    "latest checkpoint"
                ) from None
            raise
        finally:
            if status is not None:
                with suppress(UserError):  # what it cannot be told now waits in the run's folder
                    Records(run, tracker).flush(seconds=0)
                finish_run(tracker, status)
    return TrainedRun(run, trained, tracker, tracker.last_metrics(), model_uri, tracker.failures())


def _stages_until(stages: Sequence[str], until: str | None) -> tuple[str, ...]:
    """The stages up to one of them; each reads what the one before made. Raises UserError if none is so named."""
    if until is None:
        return tuple(stages)
    if until not in stages:
        raise UserError(f"there is no stage '{until}': {did_you_mean(until, stages)}there are {', '.join(stages)}")
    return tuple(stages[: stages.index(until) + 1])


def _check_left(run: RunFolder, mlflow_run: Mapping[str, str] | None) -> None:
    """Raise UserError now for what an earlier start has left, and cannot be used."""
    run.placement_group()
    read_waiting(run)
    for name in storage.list_files(run.measured):
        read_measurement(run, name)
    if mlflow_run:
        marker = storage.join(run.uri, "run.json")
        recorded_by(mlflow_run).check_is_there(
            f"restore it, as with 'mlflow runs restore --run-id {mlflow_run['run_id']}', mend MLFLOW_TRACKING_URI, or "
            f"remove {marker} to go on with a new one"
        )


def recorded_by(mlflow_run: Mapping[str, str]) -> Tracker:
    """The record of a run names its server without a password; the environment may know that."""
    known, here = mlflow_run["tracking_uri"], default_tracking_uri()
    return Tracker(here if without_secrets(here) == known else known, mlflow_run["run_id"])


def finish_run(tracker: Tracker, status: Status) -> None:
    """Say in MLflow how the run ended. Where it has failed anyway, that MLflow does not answer hides nothing."""
    try:
        tracker.finish(status)
    except TrackingError:
        if status == "FINISHED":
            raise


def check_recipe(recipe: Recipe) -> Manifest:
    """The manifest of a recipe's data. Raises UserError for what would end its training, before Ray is asked."""
    manifest = family_of(recipe).check(recipe)
    if fidelity := recipe.fidelity:
        label_of(fidelity.extractor)
        for split in fidelity.splits:
            manifest.split(split)
    return manifest


def check_fits(recipe: Recipe) -> None:
    """Raise UserError if the connected cluster's machines could never hold the training.

    Nothing is refused where the cluster grows: of machines that are still to come nothing is known.
    """
    if not runtime.grows():
        family_of(recipe).check_fits(recipe, runtime.nodes())


def emulated_precision(recipe: Recipe) -> str | None:
    """What to say when this machine's CPU would train in a precision that it cannot multiply in, else None."""
    if (
        recipe.cluster.use_gpu
        or not torch.backends.mkldnn.is_available()
        or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        return None
    family = family_of(recipe)
    stages = [stage for stage in family.STAGES if family.training_of(recipe, stage).precision == "bf16"]
    if not stages:
        return None
    changes = " ".join(f"--set {stage}.training.precision=fp32" for stage in stages)
    return f"This CPU only emulates bf16, which takes many times longer: consider {changes}"


def _begin(
    recipe: Recipe, manifest: Manifest, run: RunFolder, run_name: str, further_tags: Mapping[str, str]
) -> Tracker:
    """The MLflow run this run began with, if it is resumed; else a new one that says what will be done."""
    run.clear_stop()
    last_stage = family_of(recipe).STAGES[-1]
    if previous := run.previous(recipe, last_stage):
        recorded = recorded_by(previous)
        run.follow(recipe, last_stage)
        tracker = Tracker.resume(recorded.run_id, recorded.tracking_uri)
        with _failed_if_raised(tracker):
            Records(run, tracker).flush(seconds=0)
            tracker.log_text(dump_recipe(recipe), "recipe.yaml")
        return tracker
    tracker = Tracker.start(
        experiment=recipe.tracking.experiment,
        run_name=run_name,
        tags={
            "git_commit": git_commit(),
            "manifest_digest": manifest.digest,
            "run_folder": run.uri,
            "device": _device(recipe.cluster.use_gpu),
            **further_tags,
        },
        artifact_location=recipe.tracking.artifact_location,
    )
    with _failed_if_raised(tracker):
        tracker.log_params(recipe.model_dump(mode="json"))
        tracker.log_text(dump_recipe(recipe), "recipe.yaml")
        tracker.log_dataset(
            name=manifest.name,
            digest=manifest.digest,
            source=recipe.data.shards,
            context="training",
        )
        run.begin(recipe, {"run_id": tracker.run_id, "tracking_uri": without_secrets(tracker.tracking_uri)})
    return tracker


@contextmanager
def _failed_if_raised(tracker: Tracker) -> Iterator[None]:
    """A run that cannot begin does not stay a running one in MLflow."""
    try:
        yield
    except BaseException:
        with suppress(Exception):
            tracker.finish("FAILED")
        raise


def _device(use_gpu: bool) -> str:
    """What a rank trains on: "H100", by Ray's names for GPUs; "A100 or H100" where the cluster has both."""
    if not use_gpu:
        return "CPU process"
    return " or ".join(sorted({node.accelerator_type or "GPU" for node in runtime.nodes() if node.num_gpus}))


def _train_stage(
    recipe: Recipe,
    stage: str,
    manifest: Manifest,
    run: RunFolder,
    tracker: Tracker,
    own: lease.Lease,
    start_from: str | None,
    on_progress: Callable[[Progress], None],
    on_stop_requested: Callable[[], None],
) -> None:
    """Train one stage under Ray Train and put its model into the run's folder."""
    training, cluster = family_of(recipe).training_of(recipe, stage), recipe.cluster
    data = {"dataset_name": manifest.name, "dataset_digest": manifest.digest}
    measure = partial(_measure_beside, recipe=recipe, stage=stage, run=run, data=data)
    found = resume_point(storage.join(run.uri, stage), ray.__version__, partial(_say_skipped, stage))
    if found and step_of(found) >= training.steps:
        checkpoint = _checkpoint_at(found)
        if _is_measured(recipe, stage, step_of(found)):
            measure(checkpoint, step=step_of(found))
    else:
        trainer, reports = _trainer(recipe, stage, run, tracker, found or start_from, measure)
        result = _fit(trainer, run, own, reports, on_progress, on_stop_requested)
        if result.checkpoint is None or result.metrics is None or result.metrics["step"] < training.steps:
            raise RunStopped
        checkpoint = result.checkpoint
        # It may have been lost with the controller, after the checkpoint was registered; MLflow is told once all the
        # same.
        Records(run, tracker).add(_report(stage, result.metrics))
    resources = {"cpus": cluster.cpus_per_worker, "gpus": int(cluster.use_gpu)}
    runtime.call(_export_stage, recipe, stage, run, checkpoint, **resources)


def _say_skipped(stage: str, name: str, reason: str) -> None:
    logger.warning("%s/%s is passed over: %s", stage, name, reason)


def _checkpoint_at(uri: str) -> ray.train.Checkpoint:
    filesystem, path = storage.arrow_filesystem(uri)
    return ray.train.Checkpoint(path, filesystem)


def _trainer(
    recipe: Recipe,
    stage: str,
    run: RunFolder,
    tracker: Tracker,
    start_from: str | None,
    measure: Callable[..., dict[str, float]],
) -> tuple[ray.train.torch.TorchTrainer, Queue]:
    """What trains a stage, and where its reports arrive."""
    cluster, steps = recipe.cluster, family_of(recipe).training_of(recipe, stage).steps
    filesystem, storage_path = storage.arrow_filesystem(run.uri)
    reports = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": runtime.here()})
    # Ray runs one such task at a time, and awaits those that are left when the ranks have ended.
    beside = {"num_cpus": 0, "scheduling_strategy": runtime.ANYWHERE, "label_selector": runtime.off_spot()}
    validation = ray.train.ValidationConfig(measure, ray_remote_kwargs=beside) if recipe.fidelity else None
    scaling = ray.train.ScalingConfig(  # type: ignore[call-arg] # Ray declares its first version's
        num_workers=cluster.worker_range if cluster.is_elastic else cluster.min_workers,  # type: ignore[arg-type]
        elastic_resize_monitor_interval_s=cluster.resize_seconds,
        use_gpu=cluster.use_gpu,
        resources_per_worker={"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if cluster.use_gpu else {}),
    )
    trainer = ray.train.torch.TorchTrainer(
        _train_worker,
        train_loop_config={
            "recipe": recipe,
            "stage": stage,
            "run": run,
            "tracker": tracker,
            "start_from": start_from,
        },
        scaling_config=scaling,
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if cluster.use_gpu else "gloo"),
        run_config=ray.train.RunConfig(
            name=stage,
            storage_path=storage_path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=cluster.keep_checkpoints),
            # Ray declares the wrong base class here.
            callbacks=[_RecordReports(stage, steps, Records(run, tracker), reports)],  # type: ignore[list-item]
        ),
        validation_config=validation,  # type: ignore[call-arg] # Ray declares the trainer of its first version here.
    )
    return trainer, reports


def release(run: RunFolder) -> None:
    """Give back what the run's ranks still hold of the cluster when the process that launched them was killed.

    Ray Train does so by itself only where Ray's dashboard runs.
    """
    if group := run.placement_group():
        runtime.remove_placement_group(group)


def _fit(
    trainer: ray.train.torch.TorchTrainer,
    run: RunFolder,
    own: lease.Lease,
    reports: Queue,
    on_progress: Callable[[Progress], None],
    on_stop_requested: Callable[[], None],
) -> ray.train.Result:
    """Run the trainer to its end while passing its reports on; the first Ctrl-C asks it to save and stop.

    So does whatever `on_progress` raises, which is raised again when the ranks have ended. Ray's own handler of Ctrl-C
    would abort at once and lose the steps since the last checkpoint. It is only installed on the main thread, so
    training is awaited on another. Raises LostError at once if the run is no longer this process's own.
    """
    outcome: SimpleQueue[ray.train.Result | BaseException] = SimpleQueue()

    def fit() -> None:
        try:
            outcome.put(trainer.fit())
        except BaseException as error:
            outcome.put(error)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    stopping = False
    refusal: Exception | None = None
    while thread.is_alive() or not reports.empty():
        own.check()
        try:
            thread.join(timeout=POLL_SECONDS)
            for report in reports.get_nowait_batch(reports.qsize()):
                if refusal is None:
                    on_progress(Progress(*report))
        except Exception as error:
            refusal = error
            run.request_stop()
        except KeyboardInterrupt:
            if stopping:
                raise
            stopping = True
            run.request_stop()
            on_stop_requested()
    if refusal is not None:
        raise refusal
    result = outcome.get()
    if isinstance(result, BaseException):
        raise getattr(result, "controller_failure", result) from None
    return result


def _outside_reason(error: BaseException) -> str | None:
    """In a line, what gave out if that is why a run ended: storage, room on a disk, memory, machines; else None."""
    failures = error.worker_failures if isinstance(error, ray.train.WorkerGroupError) else {}
    restarts = "after as many restarts as cluster.max_failures allows, " if failures else ""
    for one in [*failures.values(), error]:
        original = getattr(one, "_base_exc", one)
        if reason := no_room(original):
            return restarts + (reason if "room" in reason else f"there is no room left ({reason})")
        if storage.is_outage(original):
            return restarts + str(original)
        if isinstance(original, torch.OutOfMemoryError):
            return f"{restarts}a rank ran out of its GPU's memory: lower micro_batch_size ({first_line(original)})"
        if isinstance(original, RayError) and not isinstance(original, RayTaskError):
            return f"{restarts}a rank's process or machine was lost, as when memory runs out ({first_line(original)})"
    return None


@contextmanager
def _room_is_users() -> Iterator[None]:
    """A disk that is full is the user's to mend: no restart of the ranks would. Raises UserError for that."""
    try:
        yield
    except Exception as error:
        if reason := no_room(error):
            raise UserError(f"there is no room left on {platform.node()}, or where it writes ({reason})") from None
        raise


def _hopeless(error: object) -> UserError | None:
    """The user's mistake, as is a divergence, behind a worker's failure, if it is one: no restart could mend it."""
    original = getattr(error, "_base_exc", error)
    return original if isinstance(original, UserError) and not storage.is_outage(original) else None


def _captions(recipe: Recipe, stage: str, count: int) -> Sequence[str]:
    """What stands below each picture of a preview: its prompt, or what an autoencoder's is."""
    prompts: Sequence[str] = recipe.sampling.prompts
    return prompts if stage == family_of(recipe).STAGES[-1] else ["above: real; below: the same, redrawn"] * count


def _train_worker(config: dict[str, Any]) -> None:
    """What Ray Train runs on each rank."""
    recipe, run, tracker = config["recipe"], config["run"], config["tracker"]
    context = ray.train.get_context()
    log_every_steps = family_of(recipe).training_of(recipe, config["stage"]).log_every_steps
    rank, node = context.get_world_rank(), platform.node()
    origin = {"run": run.name, "mlflow_run_id": tracker.run_id, "stage": config["stage"], "rank": rank}
    origin |= {"world_size": context.get_world_size(), "node": node}
    exporter = RankExporter(run=run.name, stage=config["stage"], rank=rank)
    reported = 0

    def report(step: int, metrics: dict[str, float], pixels: Tensor | None, saving: Saving | None) -> None:
        nonlocal reported
        reported = step
        if pixels is not None and len(pixels):
            png = io.BytesIO()
            grid(pixels, captions=_captions(recipe, config["stage"], len(pixels))).save(png, "PNG")
            storage.write_bytes(run.picture(config["stage"], step), png.getvalue())
        exporter.report(step, metrics)
        if rank == 0:
            logger.info("step %d", step, extra={"metrics": {"step": step, **metrics}})
        ray.train.report(
            {"step": step, "has_picture": pixels is not None, "time_ms": now_ms(), **metrics},
            checkpoint=ray.train.Checkpoint.from_directory(saving.folder) if saving else None,
            checkpoint_dir_name=checkpoint_folder(step, context.get_world_size()),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=partial(_upload, saving.written, exporter.checkpointed) if saving else None,
            validation=saving is not None
            and _is_measured(recipe, config["stage"], step)
            and ray.train.ValidationTaskConfig(fn_kwargs={"step": step}),
        )

    is_saved_for_preemption = False

    def save_requested(step: int) -> bool:
        """Once when Ray is told that a machine of this run will be taken away; the training goes on until it is.

        Asked with every log, as all ranks wait for one another to agree.
        """
        nonlocal is_saved_for_preemption
        if is_saved_for_preemption or step % log_every_steps:
            return False
        is_saved_for_preemption = ray.train.get_preemption_info() is not None
        return is_saved_for_preemption

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None and config["start_from"]:
        checkpoint = _checkpoint_at(config["start_from"])
    if rank == 0:
        storage.write_bytes(run.placement, runtime.current_placement_group().encode())
    with (
        json_logs(sys.stderr, origin),
        tracker.system_metrics(node) if context.get_local_rank() == 0 else nullcontext(),
        checkpoint.as_directory() if checkpoint else nullcontext() as resume_from,
    ):
        logger.info("the rank begins")
        try:
            with _room_is_users():
                train_rank(
                    recipe,
                    config["stage"],
                    run,
                    device=ray.train.torch.get_device(),
                    report=report,
                    resume_from=Path(resume_from) if resume_from else None,
                    save_requested=save_requested,
                )
        except Exception as error:
            logger.exception("the rank ends with an error")
            if isinstance(error, DivergedError):
                # It overtakes the reports on their way, which would be lost: one that waits its turn lets them pass.
                last = {"step": reported, "has_picture": False, "time_ms": now_ms()}
                ray.train.report(last, checkpoint_upload_mode=ray.train.CheckpointUploadMode.SYNC)
            raise


def _upload(
    written: Future[None], on_done: Callable[[], None], checkpoint: ray.train.Checkpoint, name: str
) -> ray.train.Checkpoint:
    """Beside the training: wait until the checkpoint is written, and put it into the run's folder, with checksums."""
    context = ray.train.get_context()
    with _room_is_users():
        written.result()
        seal(Path(checkpoint.path), context.get_world_rank())
        persisted: ray.train.Checkpoint = context.get_storage().persist_current_checkpoint(checkpoint, name)
    on_done()
    return persisted


def _report(stage: str, reported: Mapping[str, Any]) -> Report:
    """What a rank has reported, to which Ray Train adds what was measured beside."""
    values = {name: value for name, value in reported.items() if not name.startswith(FIDELITY)}
    step, has_picture, time_ms = values.pop("step"), values.pop("has_picture"), values.pop("time_ms")
    return Report(stage, step, values, has_picture, time_ms)


class _RecordReports(ray.train.UserCallback):
    """On the controller: every report to MLflow, and on to whoever watches. One process speaks to MLflow."""

    def __init__(self, stage: str, steps: int, records: Records, reports: Queue) -> None:
        self.stage = stage
        self.steps = steps
        self.records = records
        self.reports = reports
        self.restarts = 0

    @cached_property
    def exporter(self) -> Exporter:  # made on the controller, as Ray's metrics do not travel
        return controller_exporter(run=self.records.run.name, stage=self.stage)

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: ray.train.Checkpoint | None
    ) -> None:
        report = _report(self.stage, metrics[0])
        waiting = self.records.add(report)
        self.exporter.set("reports_waiting", waiting)
        self.exporter.set("restarts", self.restarts)
        # Plain values: the queue's own process need not import this project to hold them.
        self.reports.put((self.stage, report.step, self.steps, report.metrics, waiting))

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        # What is raised here ends the training; what a worker raises would be tried again.
        for error in worker_exceptions.values():
            if mistake := _hopeless(error):
                raise mistake
        self.restarts += 1
        self.exporter.set("restarts", self.restarts)


def _export_stage(recipe: Recipe, stage: str, run: RunFolder, checkpoint: ray.train.Checkpoint) -> None:
    """The finished checkpoint as a model in the diffusers layout, in the run's folder."""
    with _exported(recipe, stage, run, checkpoint) as folder:
        storage.upload_folder(folder, run.model(stage))
        run.mark_complete(stage, checksums([folder]))


@contextmanager
def _exported(recipe: Recipe, stage: str, run: RunFolder, checkpoint: ray.train.Checkpoint) -> Iterator[Path]:
    with TemporaryDirectory() as out, checkpoint.as_directory() as folder:
        family_of(recipe).export(recipe, stage, run, Path(folder), Path(out))
        yield Path(out)


def _is_measured(recipe: Recipe, stage: str, step: int) -> bool:
    """Whether the fidelity of a stage's checkpoint is asked for."""
    family, fidelity = family_of(recipe), recipe.fidelity
    if fidelity is None or stage != family.STAGES[-1]:
        return False
    return step % fidelity.every_steps == 0 or step == family.training_of(recipe, stage).steps


def _measure_beside(
    checkpoint: ray.train.Checkpoint,
    *,
    step: int,
    recipe: Recipe,
    stage: str,
    run: RunFolder,
    data: Mapping[str, Any],
) -> dict[str, float]:
    """Ray Train's validation task: a checkpoint's fidelity, left in the run's folder for `Records` to tell MLflow of.

    Whatever fails here, the training goes on. The work is that of a task within: if this process died, as by lack of
    memory, Ray would end the training.
    """
    use_gpu = recipe.fidelity is not None and recipe.fidelity.use_gpu
    # Ray itself would try for ever where a process is killed for its memory.
    measure = ray.remote(_measure).options(
        num_cpus=recipe.cluster.cpus_per_worker, num_gpus=int(use_gpu), max_retries=0
    )
    metrics: dict[str, float] = {}
    failure: Exception | None = None
    for _ in range(MEASURE_ATTEMPTS):
        try:
            measured = ray.get(measure.remote(recipe, stage, run, checkpoint))
        except RayTaskError as error:
            failure = error.cause
            break
        except RayError as error:  # its process or machine is gone
            failure = error
        else:
            metrics, failure = {f"{FIDELITY}{name}": value for name, value in measured.items()}, None
            break
    uri = storage.join(run.uri, stage, Path(checkpoint.path).name)
    reason = first_line(failure) if failure else ""
    try:
        Measurement(stage, step, uri, metrics=metrics, failure=reason, **data).save(run)
    except storage.StorageError as error:
        logger.warning("the fidelity at step %d is not recorded: %s", step, error)
    return metrics


def _measure(recipe: Recipe, stage: str, run: RunFolder, checkpoint: ray.train.Checkpoint) -> dict[str, float]:
    from trainers.evaluate import measure_checkpoint

    with _exported(recipe, stage, run, checkpoint) as folder:
        return measure_checkpoint(recipe, folder)


def register_run(recipe: Recipe, manifest: Manifest, run: RunFolder, tracker: Tracker) -> str:
    """Make the finished model a version of the recipe's registered model, once, and return its URI.

    The same model may be registered under other names too, and one that was trained longer is another model.
    """
    name, family = recipe.tracking.register_as, family_of(recipe)
    model = run.model(family.STAGES[-1])
    if name is None:
        return model
    steps = family.training_of(recipe, family.STAGES[-1]).steps
    known = run.registrations()
    for one in known:
        if (one.name, one.steps) == (name, steps):
            return one.model_uri
    # It takes all that draws pictures, for seconds, and workers import this module too.
    from cluster.registry import MODEL_FOLDER
    from trainers.registration import register_model

    # The files of a registered version never change.
    is_first = all(one.steps == steps for one in known)
    folder = MODEL_FOLDER if is_first else f"{MODEL_FOLDER}-{steps}-steps"
    pictures = storage.join(run.uri, "pictures")
    previews = sorted(file for file in storage.list_files(pictures) if file.startswith(f"{family.STAGES[-1]}-"))
    preview = storage.join(pictures, previews[-1]) if previews else None
    version = register_model(recipe, manifest, model, tracker, name=name, artifact_folder=folder, preview=preview)
    model_uri = f"models:/{name}/{version}"
    run.note_registration(Registration(name, steps, model_uri))
    return model_uri
