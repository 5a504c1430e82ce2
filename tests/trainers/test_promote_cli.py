"""The command `medsynth promote`, with models that really draw: they are tiny, and never trained."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from cluster.errors import UserError
from cluster.registry import RegisteredModel
from cluster.tracking import Tracker
from data_shards import Manifest, Settings, write_shards
from data_shards.sources import medvqa_records
from tests.conftest import DATA
from trainers.msdm import MSDMPipeline
from trainers.promote_cli import promote
from trainers.recipe import MSDMRecipe
from trainers.registration import register_model

app = typer.Typer()
app.command()(promote)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Shards of real images, half of them held out."""
    source, out = str(DATA / "colonoscopy"), str(tmp_path_factory.mktemp("halves"))
    settings = Settings(name="halves", splits={"train": 0.5, "validation": 0.5}, samples_per_shard=16, resize=32)
    write_shards(list(medvqa_records(source))[:64], out, settings, source={"format": "medvqa", "uri": source})
    return out


@pytest.fixture
def model(
    pipeline: MSDMPipeline, recipe: MSDMRecipe, halves: str, tracking_uri: str, tmp_path: Path
) -> RegisteredModel:
    """Versions 1 and 2 have the same weights."""
    pipeline.save_pretrained(tmp_path / "exported")
    for version in (1, 2):
        tracker = Tracker.start(experiment="e", run_name="r", tags={"git_commit": "abc"})
        exported = str(tmp_path / "exported")
        assert register_model(recipe, Manifest.load(halves), exported, tracker, name="tiny") == version
    return RegisteredModel(tracking_uri, "tiny")


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


@pytest.mark.slow
def test_the_command(model: RegisteredModel, halves: str) -> None:
    asked = ["--data", halves, "--num-samples", "16", "--extractor", "random-vgg:64", "--num-inference-steps", "2"]
    asked = [*asked, "--device", "cpu", "--out", "evaluations"]

    dry = command("models:/tiny/1", *asked, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "It would become champion. Nothing was changed." in dry.output
    assert model.aliases() == {}

    first = command("models:/tiny/1", *asked)
    assert first.exit_code == 0, first.output
    assert "models:/tiny@champion is now version 1." in first.output
    assert model.aliases() == {"champion": 1}

    # The same weights again are not better, whatever the figures.
    second = command("models:/tiny/latest", *asked)
    assert second.exit_code == 3, second.output
    assert re.search(r"quality\s+│ no", second.output)
    assert "Refused. The champion stays." in second.output
    assert model.aliases() == {"champion": 1}
    assert model.version(2).tags["promotion.decision"] == "refused"
    assert "kid_random_vgg_64" in model.version(2).tags["promotion.reason"]

    model.point("champion", 2)
    model.point("previous", 1)
    back = command("models:/tiny@champion", "--rollback")
    assert back.exit_code == 0, back.output
    assert model.aliases() == {"champion": 1, "previous": 2}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["models:/tiny/1"], "give --data SHARDS"),
        (["models:/tiny/7", "--data", "x"], "no model 'tiny' is registered"),
        (["models:/tiny/1", "--rollback"], "no model 'tiny' is registered"),
        (["models:/tiny/1", "--unlock"], "no model 'tiny' is registered"),
        (["models:/tiny/1", "--data", "x", "--gates", "none.yaml"], "none.yaml: it is not there"),
    ],
)
def test_mistakes(tracking_uri: str, arguments: list[str], said: str) -> None:
    result: Any = command(*arguments)
    assert isinstance(result.exception, UserError)
    assert said in str(result.exception)


def test_unlocking(tracking_uri: str) -> None:
    model = RegisteredModel(tracking_uri, "tiny")
    model.client.create_registered_model("tiny")
    model.client.create_model_version("tiny", "s3://nowhere/model")
    assert "was not locked" in command("models:/tiny/1", "--unlock").output
    model.client.create_registered_model("tiny.promoting", tags={"holder": "someone who is no more"})
    assert "Unlocked." in command("models:/tiny/1", "--unlock").output
    with model.lock():
        pass
