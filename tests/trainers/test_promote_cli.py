"""The command `medsynth promote`: its mistakes and its lock; `test_real_models` goes the whole way."""

from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from cluster.errors import UserError
from cluster.registry import RegisteredModel
from trainers.promote_cli import promote

app = typer.Typer()
app.command()(promote)


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["models:/tiny/1"], "give --data SHARDS"),
        (["models:/tiny/7", "--data", "x"], "no shards at x"),
        (["models:/tiny/1", "--rollback"], "no model 'tiny' is registered"),
        (["models:/tiny/1", "--unlock"], "no model 'tiny' is registered"),
        (["models:/tiny/1", "--data", "x", "--gates", "none.yaml"], "none.yaml: it is not there"),
    ],
)
def test_mistakes(tracking_uri: str, arguments: list[str], said: str) -> None:
    result: Any = command(*arguments)
    assert isinstance(result.exception, UserError)
    assert said in str(result.exception)


@pytest.mark.parametrize("option", ["--rollback", "--unlock"])
def test_nothing_is_changed_in_a_dry_run(tracking_uri: str, option: str) -> None:
    model = RegisteredModel(tracking_uri, "tiny")
    model.client.create_registered_model("tiny")
    for _ in range(2):
        model.client.create_model_version("tiny", "s3://nowhere/model")
    model.point("champion", 2)
    model.point("previous", 1)
    model.client.create_registered_model("tiny.promoting", tags={"holder": "someone"})
    result = command("models:/tiny/2", option, "--dry-run")
    assert isinstance(result.exception, UserError)
    assert f"--dry-run changes nothing, and {option} does nothing but change" in str(result.exception)
    assert model.aliases() == {"champion": 2, "previous": 1}
    assert model.unlock(), "the lock is still there"


def test_unlocking(tracking_uri: str) -> None:
    model = RegisteredModel(tracking_uri, "tiny")
    model.client.create_registered_model("tiny")
    model.client.create_model_version("tiny", "s3://nowhere/model")
    assert "was not locked" in command("models:/tiny/1", "--unlock").output
    model.client.create_registered_model("tiny.promoting", tags={"holder": "someone who is no more"})
    assert "Unlocked." in command("models:/tiny/1", "--unlock").output
    with model.lock():
        pass
