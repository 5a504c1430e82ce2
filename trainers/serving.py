"""A registered model as MLflow serves it: rows of prompts in, one PNG file a row out.

This file is stored with the model as its code (MLflow's models from code), so that no pickle is, and everything that
it imports lies beside it in code/: `mlflow models serve -m models:/NAME@champion --env-manager local`.
"""

import logging
import math
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Event, Lock, current_thread, main_thread
from types import FrameType
from typing import Any

import mlflow.models
import pandas as pd
from mlflow import MlflowException
from mlflow.models import ModelSignature
from mlflow.protos.databricks_pb2 import DEADLINE_EXCEEDED, INVALID_PARAMETER_VALUE, TEMPORARILY_UNAVAILABLE
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from mlflow.types import ColSpec, Schema

from cluster.errors import UserError
from cluster.registry import RegisteredModel, Version, check_registered
from trainers.drawing_settings import SEED, check_prompt
from trainers.generate import about_pictures, load_pipeline, png
from trainers.model_source import NO_SAMPLING, sampling_of

logger = logging.getLogger(__name__)

# Over HTTP, MLflow writes binary columns in base64. There is no schema of inputs, for by one MLflow would drop columns
# that it does not know before the model sees them: `_row` says what there is.
SIGNATURE = ModelSignature(outputs=Schema([ColSpec("binary", "png")]))
COLUMNS = ("prompt", "negative_prompt", "guidance_scale", "true_cfg_scale", "num_inference_steps", "sampler", "seed")
SERVER_TIMEOUT = "MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT"
"""Seconds, after which MLflow's server answers 504; it sets this itself (`mlflow models serve --timeout`)."""
QUEUE_SECONDS = 10.0
"""That a request waits for its turn, at most, before it is told that the server is busy."""


class PromptToPNG(PythonModel):
    """Draws each row by itself: its picture is the first that `medsynth generate` draws for the same prompt and seed.

    What a row leaves out is what the version's tags say when it is loaded, else the model's own; the seed is 0.
    """

    def load_context(self, context: PythonModelContext) -> None:
        self.model_uri = str(context.model_config["model_uri"])
        folder = Path(context.artifacts["pipeline"])
        version = _registered_version(folder, self.model_uri)
        sampling: Mapping[str, Any] = NO_SAMPLING
        if version is not None:
            check_registered(folder, version.tags, self.model_uri)
            sampling = sampling_of(version.tags, self.model_uri)
        self.model = load_pipeline(folder, name=self.model_uri, sampling=sampling)
        self.one_at_a_time = Lock()  # MLflow answers requests on threads, and a pipeline has one noise scheduler
        self.is_ending = Event()
        if SERVER_TIMEOUT in os.environ:
            # The server says that it is ready once this returns: then it can draw.
            self.model.draw(["a picture"], [0], seed=0, settings={"num_inference_steps": 1})
            self._end_with_the_server()

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """[N] rows with columns of COLUMNS, of which only `prompt` must be there, to [N] rows with the column `png`.

        Nothing is drawn before all rows were looked at. In MLflow's server, drawing ends at the server's time limit,
        when whoever asked has his answer already; another request that would wait longer than QUEUE_SECONDS is
        refused. Raises MlflowException: HTTP 400 for what the client can mend, 503 when busy or ending, 504 when late.
        """
        late_at = time.monotonic() + _seconds_to_answer()
        rows = [self._row(row) for row in _records(model_input, params)]
        if not self.one_at_a_time.acquire(timeout=min(QUEUE_SECONDS, late_at - time.monotonic())):
            raise MlflowException(
                f"busy with another request for {QUEUE_SECONDS:g} s: try again later", TEMPORARILY_UNAVAILABLE
            )
        try:
            return pd.DataFrame({"png": [self._png(*row, late_at) for row in rows]})
        finally:
            self.one_at_a_time.release()

    def _row(self, row: Mapping[str, Any]) -> tuple[str, int, dict[str, Any]]:
        """Prompt, seed and settings of a row, all looked at."""
        given = {str(name): value for name, value in row.items() if not _is_missing(value)}
        if unknown := sorted(map(str, row.keys() - set(COLUMNS))):
            raise _refused(f"there is no column {', '.join(unknown)[:200]}: known are {', '.join(COLUMNS)}")
        try:
            prompt = check_prompt(given.pop("prompt", None))
            seed = int(SEED.check("seed", given.pop("seed", 0)))
            self.model.drawing.arguments(given)
        except UserError as error:
            raise _refused(str(error)) from None
        return prompt, seed, given

    def _png(self, prompt: str, seed: int, settings: Mapping[str, Any], late_at: float) -> bytes:
        def on_step() -> None:
            if self.is_ending.is_set():
                raise MlflowException("the server ends", TEMPORARILY_UNAVAILABLE)
            if time.monotonic() > late_at:
                raise MlflowException(
                    "this takes longer than the server may: ask for fewer rows or fewer num_inference_steps",
                    DEADLINE_EXCEEDED,
                )

        (image,) = self.model.draw([prompt], [0], seed=seed, settings=settings, on_step=on_step)
        return png(image, about_pictures(self.model_uri, prompt, seed, self.model.drawing.arguments(settings)))

    def _end_with_the_server(self) -> None:
        """On SIGTERM and SIGINT, stop drawing: the server waits for requests in progress before it ends."""
        if current_thread() is not main_thread():
            return  # only there can signals be listened to

        def listen(number: signal.Signals) -> None:
            server = signal.getsignal(number)

            def end(signum: int, frame: FrameType | None) -> None:
                self.is_ending.set()
                if callable(server):
                    server(signum, frame)

            if callable(server):
                signal.signal(number, end)

        for number in (signal.SIGTERM, signal.SIGINT):
            listen(number)


def _records(model_input: Any, params: Mapping[str, Any] | None) -> list[dict[Any, Any]]:
    """The rows of whatever MLflow makes of a request: a table, a list of rows, or columns."""
    if params:
        raise _refused(f"there are no params, but columns: {', '.join(COLUMNS)}")
    try:
        table = model_input if isinstance(model_input, pd.DataFrame) else pd.DataFrame(model_input)
    except (TypeError, ValueError):
        raise _refused("give rows of columns, as dataframe_records or dataframe_split") from None
    rows: list[dict[Any, Any]] = table.to_dict("records")
    return rows


def _is_missing(value: Any) -> bool:
    """What pandas has where a row has no value."""
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def _seconds_to_answer() -> float:
    """A little less than MLflow's server waits; outside of it, forever."""
    limit = os.environ.get(SERVER_TIMEOUT)
    return 0.9 * float(limit) if limit else float("inf")


def _registered_version(folder: Path, model_uri: str) -> Version | None:
    """The version that is served, of the model that runs:/ID/model became. It is served also where nobody can tell."""
    run_id, _, artifact_folder = model_uri.removeprefix("runs:/").partition("/")
    try:
        return RegisteredModel.version_of_copy(folder, run_id, artifact_folder)
    except UserError as error:
        logger.warning("the model is not checked, and is drawn with its own settings alone: %s", error)
        return None


def _refused(message: str) -> MlflowException:
    return MlflowException(message, INVALID_PARAMETER_VALUE)  # HTTP 400


mlflow.models.set_model(PromptToPNG())
