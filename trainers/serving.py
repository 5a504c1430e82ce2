"""A registered model as MLflow serves it: rows of prompts in, one PNG file a row out.

This file is stored with the model as its code (MLflow's models from code), so that no pickle is, and everything that
it imports lies beside it in code/: `mlflow models serve -m models:/NAME@champion --env-manager local`.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import mlflow.models
import pandas as pd
from mlflow import MlflowException
from mlflow.models import ModelSignature
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from mlflow.types import ColSpec, Schema

from cluster.errors import UserError
from cluster.registry import RegisteredModel, Version, check_registered
from trainers.generate import about_pictures, load_pipeline, png
from trainers.model_source import NO_SAMPLING, sampling_of

logger = logging.getLogger(__name__)

SIGNATURE = ModelSignature(
    inputs=Schema(
        [
            ColSpec("string", "prompt"),
            ColSpec("double", "guidance_scale", required=False),
            ColSpec("long", "num_inference_steps", required=False),
            ColSpec("long", "seed", required=False),
        ]
    ),
    # Over HTTP, MLflow writes binary columns in base64.
    outputs=Schema([ColSpec("binary", "png")]),
)
SMALLEST = {"guidance_scale": 0, "num_inference_steps": 1, "seed": 0}


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

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """[N] rows of SIGNATURE.inputs to [N] rows with the column `png`; there are no `params`."""
        return pd.DataFrame({"png": [self._png(row) for row in model_input.to_dict("records")]})

    def _png(self, row: Mapping[str, Any]) -> bytes:
        given = {name: value for name, value in row.items() if not pd.isna(value)}
        prompt = given.pop("prompt", None)
        if not isinstance(prompt, str):
            raise _refused(f"prompt must be text, not {prompt!r}")
        for name, value in given.items():
            if value < SMALLEST[name]:
                raise _refused(f"{name} must be at least {SMALLEST[name]}, not {value}")
        seed = given.pop("seed", 0)
        try:
            with self.one_at_a_time:
                (image,) = self.model.draw([prompt], [0], seed=seed, settings=given)
        except UserError as error:
            raise _refused(str(error)) from None
        return png(image, about_pictures(self.model_uri, prompt, seed, self.model.drawing.arguments(given)))


def _registered_version(folder: Path, model_uri: str) -> Version | None:
    """The version that is served, of the model that runs:/ID/model became. It is served also where nobody can tell."""
    try:
        return RegisteredModel.version_of_copy(folder, model_uri.removeprefix("runs:/").partition("/")[0])
    except UserError as error:
        logger.warning("the model is not checked, and is drawn with its own settings alone: %s", error)
        return None


def _refused(message: str) -> MlflowException:
    return MlflowException(message, INVALID_PARAMETER_VALUE)  # HTTP 400


mlflow.models.set_model(PromptToPNG())
