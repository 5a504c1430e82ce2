"""A run's reports on their way to MLflow: what it could not be told waits in the run's folder until it answers.

So a training outlives its tracking server, and no report is lost or told twice.
"""

import json
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field

from cluster import storage
from cluster.documents import read_json_as
from cluster.errors import first_line
from cluster.tracking import Tracker, TrackingError, connect, now_ms
from cluster.tracking_store import impatient
from trainers.run_folder import RunFolder

TELL_SECONDS = 3.0  # how long MLflow may hold up a training
RETRY_SECONDS = 10.0
FLUSH_SECONDS, LAST_TRY_SECONDS = 120.0, 10.0
PATIENCE_SECONDS = 60  # for one answer: whoever waits for it is a thread that nobody waits for


@dataclass(frozen=True)
class Report:
    """What a step of a stage said; its preview lies in the run's folder."""

    stage: str
    step: int
    metrics: Mapping[str, float]
    has_picture: bool
    time_ms: int = field(default_factory=now_ms)
    """When it was said: a report that is told again with the same time is not doubled."""


@dataclass(frozen=True)
class Measurement:
    """What was measured on a checkpoint beside the training, or why that failed."""

    stage: str
    step: int
    checkpoint: str  # its URI
    dataset_name: str
    dataset_digest: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    failure: str = ""
    time_ms: int = field(default_factory=now_ms)

    def save(self, run: RunFolder) -> None:
        """Leave it in the run's folder, for whoever tells MLflow."""
        storage.write_bytes(run.measurement(self.stage, self.step), json.dumps(asdict(self)).encode())


def read_waiting(run: RunFolder) -> list[Report]:
    """The reports in the run's folder. Raises UserError if that file is damaged."""
    if not storage.exists(run.unrecorded):
        return []
    return read_json_as(
        list[Report], run.unrecorded, "restore it, or remove it: MLflow never knows the reports in it then"
    )


def read_measurement(run: RunFolder, name: str) -> Measurement:
    """One of those in the run's folder. Raises UserError if its file is damaged."""
    uri = storage.join(run.measured, name)
    return read_json_as(Measurement, uri, "restore it, or remove it: MLflow never knows what was measured then")


class Records:
    """The one writer of a run's reports: the controller while it trains, the launcher before and after."""

    def __init__(self, run: RunFolder, tracker: Tracker) -> None:
        self.run = run
        self._tracker = tracker
        self._next_try = 0.0
        self._is_saved = storage.exists(run.unrecorded)
        self._waiting = read_waiting(run)
        self._telling: threading.Thread | None = None
        self._error: Exception | None = None

    def add(self, report: Report) -> int:
        """Tell MLflow of the report and of those that wait; return how many wait after that.

        This takes TELL_SECONDS at most, and no time at all while an earlier question has no answer yet, or for
        RETRY_SECONDS after a failure.
        """
        self._waiting.append(report)
        if not self._is_busy() and time.monotonic() >= self._next_try:
            self._tell(TELL_SECONDS)
        waiting = len(self._waiting)
        with suppress(storage.StorageError):  # it is saved with the next report
            self._save()
        return waiting

    def flush(self, seconds: float = FLUSH_SECONDS) -> None:
        """Tell MLflow of all that waits, trying for so long.

        Raises StorageError; and TrackingError if MLflow does not take it, with where the rest is and how to go on.
        """
        deadline = time.monotonic() + seconds
        while self._waiting or self._measured():
            self._tell(max(LAST_TRY_SECONDS, deadline - time.monotonic()))
            if not self._is_busy() and self._error is None:
                continue
            if time.monotonic() >= deadline:
                self._save()
                reason = "it does not answer" if self._error is None else first_line(self._error)
                number = len(self._waiting) + len(self._measured())
                raise TrackingError(
                    f"MLflow did not take {number} reports of {self.run.uri} ({reason}): they wait in its folder; "
                    "nothing is lost: start the run again under its name when MLflow answers"
                )
            time.sleep(min(RETRY_SECONDS, max(0.0, deadline - time.monotonic())))
        self._save()

    def _tell(self, seconds: float) -> None:
        """Have MLflow told of what waits; wait for that so long.

        It is told by a thread: a server can delay an answer in more ways than a client has time-outs for.
        """
        if self._telling is None or not self._telling.is_alive():
            self._telling = threading.Thread(target=self._tell_all, daemon=True)
            self._telling.start()
        self._telling.join(seconds)

    def _is_busy(self) -> bool:
        return self._telling is not None and self._telling.is_alive()

    def _tell_all(self) -> None:
        """Tell MLflow of what waits, in order; what stopped it, if anything did, is in `_error` then."""
        try:
            connect(self._tracker.tracking_uri)
            with impatient(PATIENCE_SECONDS, retries=0):
                while self._waiting:
                    self._tell_one(self._waiting[0])
                    del self._waiting[0]
                for name in self._measured():
                    self._tell_measured(name)
            self._error = None
        except Exception as error:  # of whatever kind: a record that fails is no reason to end a training
            # The server may have taken what it did not answer to: what it knows is to be asked anew.
            self._tracker = Tracker(self._tracker.tracking_uri, self._tracker.run_id)
            self._next_try = time.monotonic() + RETRY_SECONDS
            self._error = error

    def _tell_one(self, report: Report) -> None:
        metrics = {f"{report.stage}/{name}": value for name, value in report.metrics.items()}
        self._tracker.log_metrics(metrics, report.step, report.time_ms)
        if report.has_picture:
            picture = self.run.picture(report.stage, report.step)
            self._tracker.log_picture(f"{report.stage}/samples", storage.read_bytes(picture), report.step)

    def _measured(self) -> list[str]:
        """Names of the measurements that MLflow has not been told of."""
        return storage.list_files(self.run.measured)

    def _tell_measured(self, name: str) -> None:
        uri, found = storage.join(self.run.measured, name), read_measurement(self.run, name)
        if found.failure:
            self._tracker.log_failure(f"fidelity at step {found.step}", found.failure)
        else:
            self._tracker.log_checkpoint(
                found.checkpoint,
                found.step,
                found.metrics,
                dataset_name=found.dataset_name,
                dataset_digest=found.dataset_digest,
                time_ms=found.time_ms,
            )
        storage.delete(uri)

    def _save(self) -> None:
        """Keep what waits in the run's folder; there is no file where nothing does."""
        waiting = list(self._waiting)  # the thread that tells of them may still be at it
        if waiting:
            storage.write_bytes(self.run.unrecorded, json.dumps([asdict(report) for report in waiting]).encode())
            self._is_saved = True
        elif self._is_saved:
            storage.delete(self.run.unrecorded)
            self._is_saved = False
