"""The specifications that are shipped run as they are written, on less data and for fewer steps and trials."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from cluster import runtime
from medsynth import app
from sweeps.guidance_document import GuidanceSweep
from sweeps.spec import load_spec
from tests.conftest import PREVIEW_PROMPTS
from tests.sweeps.test_tune_trials import begin_with_shared_vae
from trainers.msdm import MSDMPipeline
from trainers.recipe import load_recipe

pytestmark = pytest.mark.slow

SPECS = Path(__file__).parents[2] / "sweeps" / "specs"


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with runtime.connect(min_cpus=2):
        yield


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Specifications name their recipes from here."""
    monkeypatch.chdir(SPECS.parents[1])


def medsynth(*arguments: str, **changes: Any) -> str:
    settings = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    result = CliRunner().invoke(app, [*arguments, *settings], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.usefixtures("tracking_uri")
def test_msdm_learning_rate(shards: str, text_encoder_folder: Path, tmp_path: Path) -> None:
    fixed = {
        "data.shards": shards,
        "data.resolution": 16,
        "text_encoder.pretrained": text_encoder_folder,
        "vae.architecture": "{latent_channels: 8, block_out_channels: [8, 8], layers_per_block: 1, norm_num_groups: 4}",
        "vae.training.steps": 2,
        "denoiser.architecture": "{block_out_channels: [8, 16], cross_attention: [false, true], layers_per_block: 1, "
        "num_attention_heads: 2, norm_num_groups: 4}",
        "denoiser.training.steps": 4,
        "denoiser.training.validate_every_steps": 2,
        "cluster.storage": tmp_path,
    }
    changes = {f"fixed.{key}": value for key, value in fixed.items()} | {"budget.trials": 1, "scheduler.grace_steps": 2}
    spec = load_spec(str(SPECS / "msdm-learning-rate.yaml"), [f"{key}={value}" for key, value in changes.items()])
    begin_with_shared_vae(spec, "rates")
    said = medsynth("sweep", str(SPECS / "msdm-learning-rate.yaml"), "--run", "rates", **changes)
    assert "Best: trial" in said
    assert f"medsynth train {tmp_path}/rates/best.yaml" in said.replace("\n", "")
    load_recipe(f"{tmp_path}/rates/best.yaml")
    report = {path.name for path in Path(tmp_path, "rates", "report").iterdir()}
    assert {"history.png", "slice.png", "parallel-coordinates.png", "pareto.png", "sweep.html"} <= report
    assert "It is not registered: trained for vae 2 of 1,600 steps, denoiser 4 of 850 steps of its recipe" in said
    assert not MlflowClient().search_registered_models(), "so short a training is nobody's latest version"
    (experiment,) = MlflowClient().search_experiments(filter_string="name = 'msdm-demo'")
    (run,) = MlflowClient().search_runs([experiment.experiment_id], "tags.`medsynth.kind` = 'trial'")
    parent = run.data.tags["mlflow.parentRunId"]
    artifacts = {file.path for file in MlflowClient().list_artifacts(parent)}
    assert {"sweep.yaml", "best-recipe.yaml", "report"} <= artifacts


@pytest.mark.usefixtures("tracking_uri")
def test_flux_learning_rate(shards: str, precomputed: str, flux_folder: Path, tmp_path: Path) -> None:
    fixed = {
        "pretrained": flux_folder,
        "max_tokens": 16,
        "data.shards": shards,
        "data.precomputed": precomputed,
        "data.resolution": 32,
        "sampling.prompts": list(PREVIEW_PROMPTS),
        "transformer.training.steps": 4,
        "transformer.training.validate_every_steps": 2,
        "cluster.storage": tmp_path,
    }
    changes = {f"fixed.{key}": value for key, value in fixed.items()} | {"budget.trials": 1, "scheduler.grace_steps": 2}
    said = medsynth("sweep", str(SPECS / "flux-learning-rate.yaml"), "--run", "rates", **changes)
    assert "Best: trial" in said
    assert "It is not registered: trained for transformer 4 of" in said


@pytest.mark.usefixtures("tracking_uri")
def test_msdm_guidance(pipeline: MSDMPipeline, real_shards: str, extractor: str, tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "sweep"
    pipeline.save_pretrained(model)
    changes = {
        "guidance_scales": "[1,4]",
        "num_inference_steps": "[2,3]",
        "num_samples": 16,
        "extractors": f"['{extractor}']",
    }
    arguments = ["--guidance", str(model), "--data", real_shards, "--out", str(out), "--workers", "2"]
    said = medsynth("sweep", str(SPECS / "msdm-guidance.yaml"), *arguments, "--device", "cpu", **changes)
    found = GuidanceSweep.load(str(out))
    assert len(found.settings) == 2 * 2 * 3  # the samplers are the specification's
    assert said.count("★") == 1
    assert "Recommended: guidance_scale" in said
