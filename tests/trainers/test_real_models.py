"""Really trained models go the whole way: drawn from, judged, compared, and the better one becomes the champion."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from cluster.registry import RegisteredModel
from cluster.tracking import Tracker
from data_shards import Manifest, Settings, write_shards
from data_shards.sources import medvqa_records
from medsynth import app
from tests.conftest import DATA
from tests.trainers.test_loop import Reports
from trainers.families import msdm
from trainers.recipe import MSDMRecipe
from trainers.registration import register_model
from trainers.run_folder import RunFolder
from trainers.worker import train_rank

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NUM_IMAGES, NUM_LEARNT_BY_HEART = 100, 2
NAME = "small"


def write(out: Path, *, num_train: int, num_held_out: int) -> str:
    """Shards of the first images with a split that is stated, so that fewer are some of more."""
    source = str(DATA / "colonoscopy")
    records = list(medvqa_records(source))
    chosen = [replace(record, split="train") for record in records[0 : 2 * num_train : 2]]
    chosen += [replace(record, split="validation") for record in records[1 : 2 * num_held_out : 2]]
    settings = Settings(name="real", splits={}, samples_per_shard=32, resize=32)
    write_shards(chosen, str(out), settings, source={"format": "medvqa", "uri": source})
    return str(out)


def recipe_for(document: dict[str, Any], shards: str, *, steps: int, learning_rate: float = 2e-3) -> MSDMRecipe:
    def trained(steps: int, batch: int, learning_rate: float) -> dict[str, Any]:
        pace = {f"{what}_every_steps": steps for what in ("log", "validate", "preview", "checkpoint")}
        return {
            **document["vae"]["training"],
            **pace,
            "steps": steps,
            "global_batch_size": batch,
            "micro_batch_size": batch,
            "learning_rate": learning_rate,
            "learning_rate_schedule": "cosine",
            "warmup_steps": min(20, steps),
            "ema_decay": 0.98,
        }

    document["data"] = {"shards": shards, "resolution": 32}
    document["vae"]["architecture"] |= {"block_out_channels": [16, 32], "mid_block_attention": False}
    document["vae"]["training"] = trained(250, 8, 2e-3)
    document["denoiser"]["architecture"] |= {"block_out_channels": [32, 64]}
    document["denoiser"]["training"] = trained(steps, 4, learning_rate)
    document["denoiser"]["caption_dropout"] = 0.0
    document["sampling"] = {"num_inference_steps": 12, "guidance_scale": 1.0, "prompts": ["a polyp"]}
    return MSDMRecipe.model_validate(document)


def train(recipe: MSDMRecipe, stage: str, run: RunFolder) -> Path:
    """Train a stage in this process and export it to where the run keeps its finished model."""
    reports, steps = Reports(), msdm.training_of(recipe, stage).steps
    msdm.prepare(recipe, stage, run, lambda what, done, total: None)
    train_rank(recipe, stage, run, device=torch.device("cpu"), report=reports, resume_from=None)
    out = Path(run.model(stage))
    msdm.export(recipe, stage, run, reports.checkpoints[steps], out)
    return out


def medsynth(*arguments: str) -> Result:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_better_model_becomes_champion_and_one_that_copies_does_not(
    recipe_document: dict[str, Any], tracking_uri: str, tmp_path: Path
) -> None:
    """Three models of one architecture: trained briefly, trained longer, and one that knows two images by heart."""
    shards = write(tmp_path / "shards", num_train=NUM_IMAGES, num_held_out=NUM_IMAGES)
    few = write(tmp_path / "few", num_train=NUM_LEARNT_BY_HEART, num_held_out=1)
    vae = train(recipe_for(recipe_document, shards, steps=1), "vae", RunFolder(str(tmp_path / "vae")))
    plans = [(shards, 10, 2e-3), (shards, 200, 2e-3), (few, 600, 4e-3)]
    for version, (data, steps, learning_rate) in enumerate(plans, start=1):
        run = RunFolder(str(tmp_path / f"run-{version}"))
        recipe = recipe_for(recipe_document, data, steps=steps, learning_rate=learning_rate)
        if data == shards:
            shutil.copytree(vae, run.model("vae"))
        else:
            train(recipe, "vae", run)
        trained = train(recipe, "denoiser", run)
        tracker = Tracker.start(experiment="e", run_name=f"run-{version}", tags={})
        # That the last one saw but two of the images is what must come out, not be told.
        assert register_model(recipe, Manifest.load(shards), str(trained), tracker, name=NAME) == version
        tracker.finish("FINISHED")

    asked = ["--data", shards, "--num-samples", "300", "--extractor", "random-vgg:32", "--batch-size", "32"]
    asked += ["--cache", str(tmp_path / "features")]
    for version in (1, 2):
        judged = medsynth("evaluate", f"models:/{NAME}/{version}", *asked, "--out", f"promotions/{NAME}-{version}")
        assert judged.exit_code == 0, judged.output
    compared = medsynth("compare", f"models:/{NAME}/1", f"models:/{NAME}/2", "--markdown", "table.md")
    assert compared.exit_code == 0, compared.output

    def promote(version: int, *options: str) -> Result:
        return medsynth("promote", f"models:/{NAME}/{version}", *asked, "--out", "promotions", *options)

    assert "It would become champion. Nothing was changed." in promote(1, "--dry-run").output
    assert RegisteredModel.of(f"models:/{NAME}/1")[0].aliases() == {}
    first, better, worse, copier = promote(1), promote(2), promote(1), promote(3)
    assert [result.exit_code for result in (first, better, worse, copier)] == [0, 0, 3, 3]
    model, _ = RegisteredModel.of(f"models:/{NAME}/1")
    assert model.aliases() == {"champion": 2, "previous": 1}
    assert "quality" in model.version(1).tags["promotion.reason"]
    assert "it copies its training images" in model.version(3).tags["promotion.reason"]
    assert "The champion is version 1 again" in medsynth("promote", f"models:/{NAME}/1", "--rollback").output
    assert model.aliases() == {"champion": 1, "previous": 2}
