"""MLflow: runs, metrics and pictures. Models that came of them are in cluster/registry.py.

Always a client with a run id, never MLflow's global run: several processes write to one run.
"""

import io
import logging
import os
import re
import shlex
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from time import time
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar
from urllib.parse import unquote, urlsplit

from cluster.errors import UserError, first_line
from cluster.provenance import ray_job
from cluster.tracking_store import SQLITE, URI, check_store, impatient, sqlite_file, sqlite_uri
from cluster.tracking_store import TrackingError as TrackingError
from cluster.tracking_store import without_secrets as without_secrets

# Read by mlflow when it is imported: its notices are not for our users' terminals.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")

import mlflow.artifacts
from mlflow import MlflowClient, MlflowException
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, LoggedModelStatus, Metric, Param
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from PIL import Image
from sqlalchemy.exc import SQLAlchemyError

logger = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")
Status = Literal["FINISHED", "FAILED", "KILLED"]
# MLflow refuses larger batches, longer values and longer digests.
METRICS_PER_BATCH, PARAMS_PER_BATCH = 1000, 100
PARAM_LENGTH, DIGEST_LENGTH = 6000, 36
FAILED = "failed: "  # how the names of tags begin that say what failed beside the training
JOBS_TAG = "ray_jobs"  # of a run: the ids of the jobs of a Ray cluster that have worked on it
SYSTEM_METRICS_SECONDS = 5
TEXT_SECONDS = 30
LOGIN = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")


def default_tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or a SQLite file in this folder; SQLite paths are made absolute.

    A login in an http(s) URI is moved to the variables that MLflow reads one from: it quotes its URI in its errors.
    """
    uri = os.environ.get(URI) or f"{SQLITE}mlflow.db"
    with suppress(ValueError):  # of what is no URI: `connect` says so
        if uri.startswith("http") and (login := urlsplit(uri)).username:
            uri = without_secrets(uri)
            password = unquote(login.password or "")
            os.environ.update(zip((URI, *LOGIN), (uri, unquote(login.username), password), strict=True))
    file = sqlite_file(uri)
    return uri if file is None else sqlite_uri(file) + "".join(uri.partition("?")[1:])


def _explaining(
    method: Callable[Concatenate["Tracker", P], R],
) -> Callable[Concatenate["Tracker", P], R]:
    """A method of a Tracker that raises TrackingError, within seconds, if its store does not answer or refuses."""

    @wraps(method)
    def explaining(self: "Tracker", /, *arguments: P.args, **settings: P.kwargs) -> R:
        with explained(self.tracking_uri):
            return method(self, *arguments, **settings)

    return explaining


@dataclass
class Tracker:
    """One MLflow run. May be sent to other processes, where it goes on writing to the same run.

    Its methods raise TrackingError if the server or database does not answer or refuses.
    """

    tracking_uri: str = field(repr=False)  # that of a database may hold a password
    run_id: str
    _last_steps: dict[str, int] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """With this process's login, for one that has none; it travels, and is in nothing that is written."""
        return {**vars(self), "login": {name: os.environ[name] for name in LOGIN if name in os.environ}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        login = state.pop("login")
        if not any(name in os.environ for name in LOGIN):
            os.environ.update(login)
        vars(self).update(state)

    @classmethod
    def start(
        cls,
        *,
        experiment: str,
        run_name: str,
        tags: Mapping[str, str],
        tracking_uri: str | None = None,
        artifact_location: str | None = None,
    ) -> "Tracker":
        """Begin a run. Raises TrackingError if the server does not answer or refuses.

        `artifact_location` counts when the experiment is new; without it a server decides, and with SQLite
        artifacts go to mlartifacts/ beside the database.
        """
        uri = tracking_uri or default_tracking_uri()
        client = connect(uri, for_writing=True)
        with explained(uri):
            known = client.get_experiment_by_name(experiment)
            if known is None:
                experiment_id = _create_experiment(client, experiment, artifact_location or _local_artifacts(uri))
            elif known.lifecycle_stage == "deleted":
                raise UserError(f"the MLflow experiment '{experiment}' was deleted: restore it, or name another")
            else:
                experiment_id = known.experiment_id
            run = client.create_run(experiment_id, run_name=run_name, tags={**_with_job(""), **tags})
        return cls(uri, run.info.run_id)

    @classmethod
    def resume(cls, run_id: str, tracking_uri: str) -> "Tracker":
        """Go on with a run that was begun earlier."""
        client = connect(tracking_uri, for_writing=True)
        with explained(tracking_uri):
            client.update_run(run_id, status="RUNNING")
            jobs = client.get_run(run_id).data.tags.get(JOBS_TAG, "")
            for key, value in _with_job(jobs).items():
                client.set_tag(run_id, key, value)
        return cls(tracking_uri, run_id)

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.tracking_uri)

    @_explaining
    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log nested values under dotted names."""
        flat = [Param(key, str(value)[:PARAM_LENGTH]) for key, value in _flatten(params)]
        for some in _batches(flat, PARAMS_PER_BATCH):
            self.client.log_batch(self.run_id, params=some)

    @_explaining
    def log_metrics(self, metrics: Mapping[str, float], step: int, time_ms: int | None = None) -> None:
        """Log values of a step. MLflow would append a step twice, so what is logged already is left as it is.

        `time_ms` is when they were measured, since 1970; else it is now. The very same values of one time are one to
        MLflow: a request that timed out may arrive after it was sent again.
        """
        new = [key for key in metrics if self._last_step(key) < step]
        then = now_ms() if time_ms is None else time_ms
        values = [Metric(key, float(metrics[key]), then, step) for key in new]
        for some in _batches(values, METRICS_PER_BATCH):
            self.client.log_batch(self.run_id, metrics=some)
        self._last_steps |= dict.fromkeys(new, step)

    def _last_step(self, key: str) -> int:
        """The last logged step of a metric: also of what an earlier process logged."""
        if key not in self._last_steps:
            self._last_steps[key] = max((step for step, _ in self.metric_history(key)), default=-1)
        return self._last_steps[key]

    @_explaining
    def metric_history(self, key: str) -> list[tuple[int, float]]:
        """(step, value) in the order of logging."""
        return [(metric.step, metric.value) for metric in self.client.get_metric_history(self.run_id, key)]

    @_explaining
    def last_metrics(self) -> dict[str, float]:
        """The latest value of each metric."""
        return dict(self.client.get_run(self.run_id).data.metrics)

    @_explaining
    def params(self) -> dict[str, str]:
        return dict(self.client.get_run(self.run_id).data.params)

    @_explaining
    def experiment(self) -> str:
        """Name of the run's experiment."""
        client = self.client
        return str(client.get_experiment(client.get_run(self.run_id).info.experiment_id).name)

    def check_is_there(self, remedy: str) -> None:
        """Raise TrackingError, which ends in the remedy, if the run was deleted, or the server never had it."""
        client = connect(self.tracking_uri)
        with explained(self.tracking_uri):
            try:
                is_there = client.get_run(self.run_id).info.lifecycle_stage == "active"
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
                is_there = False
        if not is_there:
            place = without_secrets(self.tracking_uri)
            raise TrackingError(f"the MLflow run {self.run_id} is not at {place}, or was deleted there: {remedy}")

    def log_text(self, text: str, artifact_file: str) -> None:
        # A page with pictures has megabytes, which a server hands on to S3 before it answers.
        with explained(self.tracking_uri, is_patient=True), impatient(TEXT_SECONDS):
            self.client.log_text(self.run_id, text, artifact_file)

    @_explaining
    def read_text(self, artifact_file: str) -> str:
        uri = f"runs:/{self.run_id}/{artifact_file}"
        return mlflow.artifacts.load_text(artifact_uri(self.client, uri))

    def log_folder(self, folder: Path, artifact_path: str) -> None:
        with explained(self.tracking_uri, is_patient=True):
            self.client.log_artifacts(self.run_id, str(folder), artifact_path)

    @_explaining
    def log_picture(self, key: str, png: bytes, step: int) -> None:
        """Log a picture of a step, once; MLflow shows the steps of a key side by side."""
        name = f"images/{key.replace('/', '~')}+step+{step}+"  # as MLflow names it
        if not any(known.path.startswith(name) for known in self.client.list_artifacts(self.run_id, "images")):
            self.client.log_image(self.run_id, Image.open(io.BytesIO(png)), key=key, step=step)

    @_explaining
    def log_dataset(self, *, name: str, digest: str, source: str, context: str) -> None:
        """Say which data the run used: the whole digest goes into the tag `manifest_digest` of the input."""
        dataset = Dataset(name, digest[:DIGEST_LENGTH], "medsynth-shards", f'{{"uri": "{source}"}}')
        tags = [InputTag("mlflow.data.context", context), InputTag("manifest_digest", digest)]
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, tags)])

    @_explaining
    def log_checkpoint(
        self,
        uri: str,
        step: int,
        metrics: Mapping[str, float],
        *,
        dataset_name: str,
        dataset_digest: str,
        time_ms: int | None = None,
    ) -> None:
        """Log what was measured on a checkpoint: at its step of the run, and as figures of the model RUN-step-N.

        MLflow links the figures to that model and to the data set, as `log_dataset` named it. Done again, as after
        a restart, it adds only what is missing.
        """
        client, run = self.client, self.client.get_run(self.run_id)
        experiment, name = run.info.experiment_id, f"{run.info.run_name}-step-{step}"
        name = re.sub("[/:.%\"']", "-", name)  # MLflow refuses these in names of models
        known = client.search_logged_models([experiment], f"source_run_id = '{self.run_id}' AND name = '{name}'")
        model = (
            known[0]
            if known
            else client.create_logged_model(
                experiment, name, self.run_id, params={"step": str(step)}, tags={"checkpoint": uri}
            )
        )
        outputs = run.outputs.model_outputs if run.outputs else []
        if model.model_id not in [output.model_id for output in outputs]:
            client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step)])
        then = now_ms() if time_ms is None else time_ms
        new = [
            Metric(key, float(value), then, step, model.model_id, dataset_name, dataset_digest[:DIGEST_LENGTH])
            for key, value in metrics.items()
            if step not in dict(self.metric_history(key))
        ]
        client.log_batch(self.run_id, metrics=new)
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)

    @_explaining
    def log_failure(self, what: str, reason: str) -> None:
        """Say that something beside the training failed, which the run outlives."""
        self.client.set_tag(self.run_id, f"{FAILED}{what}", reason)

    @_explaining
    def failures(self) -> dict[str, str]:
        """What failed beside the training, and why."""
        tags = self.client.get_run(self.run_id).data.tags
        return {key.removeprefix(FAILED): reason for key, reason in tags.items() if key.startswith(FAILED)}

    def finish(self, status: Status) -> None:
        with explained(self.tracking_uri, f"end of run {self.run_id}"):
            connect(self.tracking_uri).set_terminated(self.run_id, status)

    @contextmanager
    def system_metrics(self, node: str) -> Iterator[None]:
        """Log this machine's processor, memory, disk, network and GPUs inside the block, as system/NODE/...

        mlflow waits minutes for a server that does not answer. No rank does: the first question is asked beside it,
        without an answer it goes without, and at its end the last values have SYSTEM_METRICS_SECONDS.
        """
        monitors: list[SystemMetricsMonitor] = []

        def begin() -> None:
            try:
                connect(self.tracking_uri)
                monitor = SystemMetricsMonitor(
                    self.run_id, resume_logging=True, node_id=node, tracking_uri=self.tracking_uri
                )
                monitor.start()
                monitors.append(monitor)
            except Exception as error:  # of whatever kind: it is no reason to end a training
                logger.warning("no system metrics: %s", first_line(error))

        threading.Thread(target=begin, daemon=True).start()
        try:
            yield
        finally:
            for monitor in monitors:
                last_words = threading.Thread(target=monitor.finish, daemon=True)
                last_words.start()
                last_words.join(SYSTEM_METRICS_SECONDS)

    @_explaining
    def ui_command(self) -> str:
        """What to type, or to open, to see the run."""
        if self.tracking_uri.startswith("http"):
            run = self.client.get_run(self.run_id)
            return f"{without_secrets(self.tracking_uri)}/#/experiments/{run.info.experiment_id}/runs/{self.run_id}"
        return f"mlflow ui --backend-store-uri {shlex.quote(without_secrets(self.tracking_uri))}"


def now_ms() -> int:
    """Milliseconds since 1970, as MLflow counts."""
    return int(time() * 1000)


def find_run(run_id: str) -> Tracker | None:
    """A run to read from, if the server of this environment knows it. Raises TrackingError if it does not answer."""
    uri = default_tracking_uri()
    if (file := sqlite_file(uri)) and not file.exists():
        return None  # to ask would make an empty one
    client = connect(uri)
    with explained(uri):
        try:
            client.get_run(run_id)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
    return Tracker(uri, run_id)


def runs_of_job(job: str, tracking_uri: str) -> list[Tracker]:
    """The runs that a job of a Ray cluster has worked on, first those that others are below. Raises TrackingError."""
    client = connect_to_read(tracking_uri)
    with explained(tracking_uri):
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        like = f"tags.{JOBS_TAG} LIKE '%{job}%'"
        found = client.search_runs(experiments, like, order_by=["attributes.start_time"])
    of_job = [run for run in found if job in run.data.tags[JOBS_TAG].split()]
    parents = sorted(of_job, key=lambda run: "mlflow.parentRunId" in run.data.tags)
    return [Tracker(tracking_uri, run.info.run_id) for run in parents]


def _with_job(jobs: str) -> Mapping[str, str]:
    """The tag of a run that these jobs have worked on, once this one does; nothing outside a job."""
    job = ray_job()
    return {JOBS_TAG: f"{jobs} {job}".strip()} if job and job not in jobs.split() else {}


def connect(tracking_uri: str, *, for_writing: bool = False) -> MlflowClient:
    """A client, after one quick question to the server or database: mlflow itself would ask for minutes."""
    check_store(tracking_uri, for_writing=for_writing)
    return MlflowClient(tracking_uri)


def connect_to_read(tracking_uri: str) -> MlflowClient:
    """A client, as `connect` makes it; but where there is no database, mlflow would make an empty one.

    Raises TrackingError then too.
    """
    if (file := sqlite_file(tracking_uri)) and not file.exists():
        raise TrackingError(
            f"nothing is recorded or registered here: there is no MLflow database {file}; set {URI} to the server or "
            "database that has it, or work in the folder of that database"
        )
    return connect(tracking_uri)


def check_tracking(tracking_uri: str | None = None) -> None:
    """Raise TrackingError, within seconds, unless the store, by itself the environment's, answers and lets us in."""
    uri = tracking_uri or default_tracking_uri()
    check_store(uri, for_writing=True)
    if (file := sqlite_file(uri)) is None or file.exists():  # else it would be made, which takes seconds
        with explained(uri):
            MlflowClient(uri).search_experiments(max_results=1)


def artifact_uri(client: MlflowClient, uri: str) -> str:
    """runs:/ID/path as the place where its artifact is."""
    run_id, _, path = uri.removeprefix("runs:/").partition("/")
    return f"{client.get_run(run_id).info.artifact_uri}/{path}"


def _create_experiment(client: MlflowClient, name: str, artifact_location: str | None) -> str:
    """The new experiment's id; that of another process's, if one made it just now."""
    try:
        return str(client.create_experiment(name, artifact_location))
    except MlflowException as error:
        made = client.get_experiment_by_name(name)
        if error.error_code != "RESOURCE_ALREADY_EXISTS" or made is None:
            raise
        return str(made.experiment_id)


def _local_artifacts(tracking_uri: str) -> str | None:
    # Without a server MLflow would put artifacts below whichever folder a process happens to work in.
    file = sqlite_file(tracking_uri)
    return (file.parent / "mlartifacts").as_uri() if file else None


def _batches(items: list[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@contextmanager
def explained(tracking_uri: str, what: str = "", *, is_patient: bool = False) -> Iterator[None]:
    """Turn what MLflow raises into one line that names the server and, where the user can do something, what.

    Without `is_patient`, which is for large files, a question has ten seconds. A patient block must not stand within
    one that is not.
    """
    try:
        with nullcontext() if is_patient else impatient():
            yield
    except (MlflowException, SQLAlchemyError, OSError, ValueError) as error:
        code = error.error_code if isinstance(error, MlflowException) else ""
        message = first_line(error)
        if code in ("UNAUTHENTICATED", "PERMISSION_DENIED") or re.search(r"error code 40[13]\b", message):
            message = "access refused; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD of one who may do this"
        elif re.search(r"error code 404\b|valid JSON|^Expecting value", message):
            message = f"its answer is not that of an MLflow server of this version ({message[:100]}): mend {URI}"
        place = f"{what} at " if what else ""
        raise TrackingError(f"MLflow, {place}{without_secrets(tracking_uri)}: {message}") from None
