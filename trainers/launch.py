"""From a recipe to a trained, registered model: Ray Train runs each stage, MLflow records it.

The only module of this folder that imports Ray, but for exporter.py.
"""

import io
import json
import logging
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
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
from cluster.documents import parsing, read_json
from cluster.errors import UserError, first_line
from cluster.provenance import git_commit
from cluster.tracking import Status, Tracker, TrackingError, default_tracking_uri, without_secrets
from data_shards import Manifest
from trainers.checkpoint_folders import checkpoint_folder
from trainers.engines import Saving
from trainers.exporter import Exporter
from trainers.families import family_of
from trainers.fidelity.extractor_uris import label_of
from trainers.logs import json_logs
from trainers.loop import DivergedError
from trainers.pictures import grid
from trainers.recipe import Recipe, at_absolute_paths, dump_recipe
from trainers.records import Records, Report
from trainers.run_folder import RunFolder
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


class RunStopped(Exception):  # noqa: N818 - what happened, not what went wrong
    """The run was asked to stop, has saved its state, and goes on when started again under its name."""


def train_recipe(
    recipe: Recipe,
    run_name: str,
    *,
    on_progress: Callable[[Progress], None],
    on_stop_requested: Callable[[], None],
    stages: Sequence[str] | None = None,
    start_from: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> TrainedRun:
    """Train every stage, then export and register the model. A run that was stopped goes on under its name.

    With `stages`, only these are trained, what the next one reads is prepared, and nothing is registered. The last one
    goes on from another run's checkpoint, `start_from`, if one is given. `tags` are of the MLflow run, when it begins.

    Raises UserError for what the user can mend, before any training where possible, and RunStopped when it
    was interrupted (Ctrl-C) and has saved its state; `on_stop_requested` is called when the saving begins.
    """
    runtime.check_outlives_job(recipe.cluster.storage)
    recipe = at_absolute_paths(recipe)
    family = family_of(recipe)
    manifest = check_recipe(recipe)
    run = RunFolder.of(recipe, run_name)
    storage.check_writable(run.uri)
    cluster, fidelity = recipe.cluster, recipe.fidelity
    trained = tuple(stages or family.STAGES)
    num_processes = cluster.min_workers + (fidelity is not None)
    with runtime.connect(min_cpus=num_processes * cluster.cpus_per_worker):
        runtime.check_capacity(
            num_workers=cluster.min_workers,
            cpus_per_worker=cluster.cpus_per_worker,
            gpus_per_worker=int(cluster.use_gpu),
            cpus_beside=cluster.cpus_per_worker if fidelity else 0,
            gpus_beside=int(fidelity.use_gpu) if fidelity else 0,
        )
        check_fits(recipe)
        tracker = _begin(recipe, manifest, run, run_name, tags or {})
        status: Status = "FAILED"

        def on_preparing(what: str, done: int, total: int) -> None:
            on_progress(Progress(what, done, total, {}, is_preparation=True))

        try:
            release(run)
            for stage in trained:
                if not run.has_model(stage):
                    family.prepare(recipe, stage, run, on_preparing)
                    begin = start_from if stage == trained[-1] else None
                    _train_stage(recipe, stage, manifest, run, tracker, begin, on_progress, on_stop_requested)
            for following in family.STAGES[len(trained) : len(trained) + 1]:
                family.prepare(recipe, following, run, on_preparing)
            model_uri = run.model(trained[-1]) if stages else register_run(recipe, manifest, run, tracker)
            status = "FINISHED"
        except (RunStopped, KeyboardInterrupt):
            status = "KILLED"
            raise
        except Exception:
            # Whoever asked it to stop may have ended what it needs to stop in order, as Ray Tune does.
            if run.stop_requested():
                status = "KILLED"
            raise
        finally:
            finish_run(tracker, status)
    return TrainedRun(run, trained, tracker, tracker.last_metrics(), model_uri, tracker.failures())


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
    if previous := run.previous(recipe):
        # The record of a run names its server without a password; the environment may know that.
        known, here = previous["tracking_uri"], default_tracking_uri()
        tracker = Tracker.resume(previous["run_id"], here if without_secrets(here) == known else known)
        Records(run, tracker).flush(seconds=0)
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
    start_from: str | None,
    on_progress: Callable[[Progress], None],
    on_stop_requested: Callable[[], None],
) -> None:
    """Train one stage under Ray Train and put its model into the run's folder."""
    cluster, steps = recipe.cluster, family_of(recipe).training_of(recipe, stage).steps
    filesystem, storage_path = storage.arrow_filesystem(run.uri)
    reports = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": runtime.here()})
    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if cluster.use_gpu else {})
    data = {"dataset_name": manifest.name, "dataset_digest": manifest.digest}
    measure = partial(_measure_beside, recipe=recipe, stage=stage, run=run, tracker=tracker, data=data)
    # Ray runs one such task at a time, and awaits those that are left when the ranks have ended.
    beside = {"num_cpus": 0, "scheduling_strategy": runtime.ANYWHERE, "label_selector": runtime.off_spot()}
    validation = ray.train.ValidationConfig(measure, ray_remote_kwargs=beside) if recipe.fidelity else None
    scaling = ray.train.ScalingConfig(  # type: ignore[call-arg] # Ray declares its first version's
        num_workers=cluster.worker_range if cluster.is_elastic else cluster.min_workers,  # type: ignore[arg-type]
        elastic_resize_monitor_interval_s=cluster.resize_seconds,
        use_gpu=cluster.use_gpu,
        resources_per_worker=resources,
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
    result = _fit(trainer, run, reports, on_progress, on_stop_requested)
    if result.checkpoint is None or result.metrics is None or result.metrics["step"] < steps:
        raise RunStopped
    records = Records(run, tracker)
    # It may have been lost with the controller, after the checkpoint was registered; MLflow is told once all the same.
    records.add(_report(stage, result.metrics))
    records.flush()
    resources = {"cpus": cluster.cpus_per_worker, "gpus": int(cluster.use_gpu)}
    runtime.call(_export_stage, recipe, stage, run, result.checkpoint, **resources)


def release(run: RunFolder) -> None:
    """Give back what the run's ranks still hold of the cluster when the process that launched them was killed.

    Ray Train does so by itself only where Ray's dashboard runs.
    """
    if storage.exists(run.placement):
        runtime.remove_placement_group(storage.read_bytes(run.placement).decode())


def _fit(
    trainer: ray.train.torch.TorchTrainer,
    run: RunFolder,
    reports: Queue,
    on_progress: Callable[[Progress], None],
    on_stop_requested: Callable[[], None],
) -> ray.train.Result:
    """Run the trainer to its end while passing its reports on; the first Ctrl-C asks it to save and stop.

    So does whatever `on_progress` raises, which is raised again when the ranks have ended. Ray's own handler of Ctrl-C
    would abort at once and lose the steps since the last checkpoint. It is only installed on the main thread, so
    training is awaited on another.
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
    exporter = Exporter(run=run.name, stage=config["stage"], rank=rank)
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
            {"step": step, "has_picture": pixels is not None, **metrics},
            checkpoint=ray.train.Checkpoint.from_directory(saving.folder) if saving else None,
            checkpoint_dir_name=checkpoint_folder(step, context.get_world_size()),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=partial(_upload, saving.written) if saving else None,
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
        filesystem, path = storage.arrow_filesystem(config["start_from"])
        checkpoint = ray.train.Checkpoint(path, filesystem)
    if rank == 0:
        storage.write_bytes(run.placement, runtime.current_placement_group().encode())
    with (
        json_logs(sys.stderr, origin),
        tracker.system_metrics(node) if context.get_local_rank() == 0 else nullcontext(),
        checkpoint.as_directory() if checkpoint else nullcontext() as resume_from,
    ):
        logger.info("the rank begins")
        try:
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
                last = {"step": reported, "has_picture": False}
                ray.train.report(last, checkpoint_upload_mode=ray.train.CheckpointUploadMode.SYNC)
            raise


def _upload(written: Future[None], checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
    """Beside the training: wait until the checkpoint is written, and put it into the run's folder."""
    written.result()
    persisted: ray.train.Checkpoint = ray.train.get_context().get_storage().persist_current_checkpoint(checkpoint, name)
    return persisted


def _report(stage: str, reported: Mapping[str, Any]) -> Report:
    """What a rank has reported, to which Ray Train adds what was measured beside."""
    values = {name: value for name, value in reported.items() if not name.startswith(FIDELITY)}
    return Report(stage, values.pop("step"), values, values.pop("has_picture"))


class _RecordReports(ray.train.UserCallback):
    """On the controller: every report to MLflow, and on to whoever watches. One process speaks to MLflow."""

    def __init__(self, stage: str, steps: int, records: Records, reports: Queue) -> None:
        self.stage = stage
        self.steps = steps
        self.records = records
        self.reports = reports

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: ray.train.Checkpoint | None
    ) -> None:
        report = _report(self.stage, metrics[0])
        waiting = self.records.add(report)
        # Plain values: the queue's own process need not import this project to hold them.
        self.reports.put((self.stage, report.step, self.steps, report.metrics, waiting))

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        # What is raised here ends the training; what a worker raises would be tried again.
        for error in worker_exceptions.values():
            if mistake := _hopeless(error):
                raise mistake


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
    tracker: Tracker,
    data: Mapping[str, str],
) -> dict[str, float]:
    """Ray Train's validation task: a checkpoint's fidelity, to MLflow. Whatever fails here, the training goes on.

    The work is that of a task within: if this process died, as by lack of memory, Ray would end the training.
    """
    use_gpu = recipe.fidelity is not None and recipe.fidelity.use_gpu
    # Ray itself would try for ever where a process is killed for its memory.
    measure = ray.remote(_measure).options(
        num_cpus=recipe.cluster.cpus_per_worker, num_gpus=int(use_gpu), max_retries=0
    )
    for _ in range(MEASURE_ATTEMPTS):
        try:
            measured = ray.get(measure.remote(recipe, stage, run, checkpoint))
        except RayTaskError as error:
            failure: Exception = error.cause
            break
        except RayError as error:  # its process or machine is gone
            failure = error
        else:
            metrics = {f"{FIDELITY}{name}": value for name, value in measured.items()}
            uri = storage.join(run.uri, stage, Path(checkpoint.path).name)
            tracker.log_checkpoint(uri, step, metrics, **data)
            return metrics
    tracker.log_failure(f"fidelity at step {step}", first_line(failure))
    return {}


def _measure(recipe: Recipe, stage: str, run: RunFolder, checkpoint: ray.train.Checkpoint) -> dict[str, float]:
    from trainers.evaluate import measure_checkpoint

    with _exported(recipe, stage, run, checkpoint) as folder:
        return measure_checkpoint(recipe, folder)


def register_run(recipe: Recipe, manifest: Manifest, run: RunFolder, tracker: Tracker) -> str:
    """Make the finished model a version of the recipe's registered model, once, and return its URI."""
    name = recipe.tracking.register_as
    if name is None:
        return run.model(family_of(recipe).STAGES[-1])
    marker = storage.join(run.uri, "registered.json")
    if storage.exists(marker):
        document = read_json(marker)
        with parsing(marker):
            return str(document["model_uri"])
    # It takes all that draws pictures, for seconds, and workers import this module too.
    from trainers.registration import register_model

    stage = family_of(recipe).STAGES[-1]
    folder = storage.join(run.uri, "pictures")
    previews = sorted(file for file in storage.list_files(folder) if file.startswith(f"{stage}-"))
    preview = storage.join(folder, previews[-1]) if previews else None
    version = register_model(recipe, manifest, run.model(stage), tracker, name=name, preview=preview)
    model_uri = f"models:/{name}/{version}"
    storage.write_bytes(marker, json.dumps({"model_uri": model_uri}).encode())
    return model_uri
