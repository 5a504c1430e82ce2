"""A run's reports on their way to MLflow: what it could not be told waits in the run's folder until it answers.

So a training outlives its tracking server, and no report is lost or told twice.
"""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass

from cluster import storage
from cluster.documents import read_json_as
from cluster.errors import first_line
from cluster.tracking import Tracker, TrackingError, connect
from trainers.run_folder import RunFolder

RETRY_SECONDS = 10.0
FLUSH_SECONDS = 120.0


@dataclass(frozen=True)
class Report:
    """What a step of a stage said; its preview lies in the run's folder."""

    stage: str
    step: int
    metrics: Mapping[str, float]
    has_picture: bool


def read_waiting(run: RunFolder) -> list[Report]:
    """The reports in the run's folder. Raises UserError if that file is damaged."""
    if not storage.exists(run.unrecorded):
        return []
    return read_json_as(
        list[Report], run.unrecorded, "restore it, or remove it: MLflow never knows the reports in it then"
    )


class Records:
    """The one writer of a run's reports: the controller while it trains, the launcher before and after."""

    def __init__(self, run: RunFolder, tracker: Tracker) -> None:
        self._run = run
        self._tracker = tracker
        self._next_try = 0.0
        self._is_saved = storage.exists(run.unrecorded)
        self._waiting = read_waiting(run)

    def add(self, report: Report) -> int:
        """Tell MLflow of the report and of those that wait; return how many wait after that.

        A server that did not answer is asked again RETRY_SECONDS later, not at each report.
        """
        self._waiting.append(report)
        if time.monotonic() < self._next_try or self._tell():
            with suppress(storage.StorageError):  # it is saved with the next report
                self._save()
        return len(self._waiting)

    def flush(self, seconds: float = FLUSH_SECONDS) -> None:
        """Tell MLflow of all that waits, trying for so long.

        Raises StorageError; and TrackingError if MLflow does not take it, with where the rest is and how to go on.
        """
        deadline = time.monotonic() + seconds
        while self._waiting:
            error = self._tell()
            if error is None:
                return
            if time.monotonic() >= deadline:
                self._save()
                reason = first_line(error)
                raise TrackingError(
                    f"MLflow did not take {len(self._waiting)} reports of {self._run.uri} ({reason}): they wait in "
                    f"{self._run.unrecorded}; nothing is lost: start the run again under its name when MLflow answers"
                )
            time.sleep(min(RETRY_SECONDS, max(0.0, deadline - time.monotonic())))

    def _tell(self) -> Exception | None:
        """Tell MLflow of what waits, in order; return what stopped it, if anything did."""
        try:
            connect(self._tracker.tracking_uri)  # a quick question first: a request would be tried for minutes
            while self._waiting:
                self._tell_one(self._waiting[0])
                del self._waiting[0]
            if self._is_saved:
                storage.delete(self._run.unrecorded)
                self._is_saved = False
        except Exception as error:  # of whatever kind: a record that fails is no reason to end a training
            # The server may have taken what it did not answer to: what it knows is to be asked anew.
            self._tracker = Tracker(self._tracker.tracking_uri, self._tracker.run_id)
            self._next_try = time.monotonic() + RETRY_SECONDS
            return error
        return None

    def _tell_one(self, report: Report) -> None:
        metrics = {f"{report.stage}/{name}": value for name, value in report.metrics.items()}
        self._tracker.log_metrics(metrics, report.step)
        if report.has_picture:
            picture = self._run.picture(report.stage, report.step)
            self._tracker.log_picture(f"{report.stage}/samples", storage.read_bytes(picture), report.step)

    def _save(self) -> None:
        document = [asdict(report) for report in self._waiting]
        storage.write_bytes(self._run.unrecorded, json.dumps(document).encode())
        self._is_saved = True
