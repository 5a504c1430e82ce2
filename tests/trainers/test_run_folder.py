"""What a run's folder says: with which recipe it may go on, and one line for each of its files that is damaged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.checksums import checksums
from cluster.errors import UserError
from cluster.tracking import Tracker, TrackingError
from medsynth import app
from trainers.families import msdm
from trainers.launch import _check_left, register_run
from trainers.recipe import MSDMRecipe, load_recipe
from trainers.records import read_waiting
from trainers.run_folder import COMPLETE, Registration, RunFolder, finished_model


@pytest.fixture
def run(recipe: MSDMRecipe, tmp_path: Path) -> RunFolder:
    """One that was begun."""
    folder = RunFolder(str(tmp_path / "run"))
    folder.begin(recipe, {"run_id": "1", "tracking_uri": "http://127.0.0.1:5000"})
    return folder


def changed(recipe_file: Path, *overrides: str) -> Any:
    return load_recipe(str(recipe_file), overrides)


@pytest.mark.parametrize(
    "override",
    [
        "tracking.register_as=another",
        "tracking.experiment=another",
        "name=another",
        "cluster.max_failures=9",
        "cluster.hang_timeout_seconds=9",
        "data.num_workers=0",
        "data.cache={folder: /tmp/x, max_gigabytes: 1}",
        "vae.training.micro_batch_size=4",
        "denoiser.training.log_every_steps=1",
        "denoiser.training.checkpoint_every_steps=3",
        "denoiser.training.steps=12",
    ],
)
def test_a_run_may_go_on_with_other_values_of_what_does_not_touch_its_weights(
    override: str, run: RunFolder, recipe_file: Path
) -> None:
    other = changed(recipe_file, override)
    assert run.previous(other, "denoiser") == run.mlflow_run()
    run.follow(other, "denoiser")
    assert run.began_with() == other


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "denoiser.training.learning_rate=1",
        "denoiser.training.global_batch_size=8",
        "denoiser.training.steps=4",
        "vae.training.steps=12",
        "sampling.num_inference_steps=3",
        "data.horizontal_flip=true",
    ],
)
def test_what_touches_its_weights_binds_a_run(override: str, run: RunFolder, recipe_file: Path) -> None:
    key = override.partition("=")[0]
    with pytest.raises(UserError, match=rf"was begun with another recipe; {key} differ"):
        run.previous(changed(recipe_file, override), "denoiser")


def test_a_recipe_of_an_earlier_version_lacks_keys_that_are_as_their_defaults(
    run: RunFolder, recipe: MSDMRecipe
) -> None:
    path = Path(run.uri) / "recipe.yaml"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "max_failures" not in line and "weight_decay" not in line))
    assert run.previous(recipe) == run.mlflow_run()


def test_a_finished_stage_that_is_trained_longer_is_no_more_finished(run: RunFolder, recipe_file: Path) -> None:
    longer = changed(recipe_file, "denoiser.training.steps=12")
    run.mark_complete("denoiser")
    with pytest.raises(UserError, match="has no checkpoint to be trained longer from"):
        run.follow(longer, "denoiser")
    assert run.has_model("denoiser")
    (Path(run.uri) / "denoiser" / "step-000006-of-1").mkdir()
    (Path(run.uri) / "denoiser" / "step-000006-of-1" / "state.json").touch()
    run.follow(longer, "denoiser")
    assert not run.has_model("denoiser")


@pytest.mark.parametrize("command", [["train"], ["sweep", "--lr-find"]])
def test_a_command_refuses_a_name_that_leads_elsewhere(command: list[str], recipe_file: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*command, str(recipe_file), "--run", "../x"])
    assert isinstance(result.exception, UserError)
    assert str(result.exception).startswith("--run '../x' cannot be the name of a folder")
    assert not (tmp_path / "runs").exists()


DAMAGED: dict[str, tuple[Callable[[RunFolder, MSDMRecipe], Any], list[bytes]]] = {
    "recipe.yaml": (lambda run, recipe: run.previous(recipe), [b"", b"[]", b"name: x", b"\xff\x00"]),
    "run.json": (lambda run, recipe: run.previous(recipe), [b"", b"[]", b"{}", b'{"run_id": 5}', b"\xff"]),
    "unrecorded.json": (
        lambda run, recipe: read_waiting(run),
        [b"", b"{}", b"5", b"[5]", b'[{"stage": 1}]', b'[{"stage": "vae", "step": "x", "metrics": {}}]', b"\xff"],
    ),
    "placement": (lambda run, recipe: run.placement_group(), [b"xyz", b"\xff\x00", b"abc"]),
    "borrowed": (lambda run, recipe: run.precomputed, [b"", b"\xff\x00", b"a\nb"]),
    "registered.json": (lambda run, recipe: run.registrations(), [b"", b"{}", b"[1]", b'[{"name": "a"}]']),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named_in_one_line_with_the_remedy(name: str, run: RunFolder, recipe: MSDMRecipe) -> None:
    read, damages = DAMAGED[name]
    for damage in damages:
        (Path(run.uri) / name).write_bytes(damage)
        with pytest.raises(UserError) as caught:
            read(run, recipe)
        line = str(caught.value)
        assert f"{run.uri}/{name}" in line
        assert "restore it" in line or "remove it" in line
        assert line.isprintable(), line


def test_a_run_whose_record_was_deleted_in_mlflow_has_a_way_on(run: RunFolder, tracking_uri: str) -> None:
    tracker = Tracker.start(experiment="e", run_name="r", tags={})
    recorded = {"run_id": tracker.run_id, "tracking_uri": tracking_uri}
    _check_left(run, recorded)
    tracker.client.delete_run(tracker.run_id)
    for gone in (tracker.run_id, "0" * 32):
        with pytest.raises(
            TrackingError, match=rf"{gone} is not at .*restore it.*or remove {run.uri}/run.json to go on"
        ):
            _check_left(run, recorded | {"run_id": gone})


def test_a_finished_model_is_registered_once_under_each_name(
    run: RunFolder, recipe_file: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered: list[tuple[str, str]] = []

    def register(*_: Any, name: str, artifact_folder: str, preview: str | None) -> int:
        assert preview is None  # nothing was drawn in this run
        registered.append((name, artifact_folder))
        return 1

    monkeypatch.setattr("trainers.registration.register_model", register)
    once, longer = "tracking.register_as=a", "denoiser.training.steps=12"
    for overrides in ([once], [once], ["tracking.register_as=b"], [once, longer], [once, longer]):
        uri = register_run(changed(recipe_file, *overrides), None, run, None)  # type: ignore[arg-type]
        assert uri == f"models:/{overrides[0][-1]}/1"
    assert registered == [("a", "model"), ("b", "model"), ("a", "model-12-steps")]
    assert run.registrations()[-1] == Registration("a", 12, "models:/a/1")
    assert COMPLETE not in [path.name for path in Path(run.uri).iterdir()]


def test_a_finished_autoencoder_is_taken_from_another_run(recipe_file: Path, tmp_path: Path) -> None:
    other, run = RunFolder(f"{tmp_path}/other"), RunFolder(f"{tmp_path}/run")
    taking = changed(recipe_file, f"vae.pretrained={other.uri}")
    with pytest.raises(UserError, match=r"vae.pretrained: .*other is no run with a finished autoencoder"):
        msdm.check(taking)
    other.begin(changed(recipe_file), {"run_id": "1", "tracking_uri": "x"})
    (Path(other.model("vae"))).mkdir(parents=True)
    (Path(other.model("vae")) / "weights").write_text("trained")
    other.mark_complete("vae", checksums([Path(other.model("vae"))]))
    msdm.check(taking)
    msdm.prepare(taking, "vae", run, lambda *_: None)
    with finished_model(run.model("vae")) as folder:
        assert (folder / "weights").read_text() == "trained"
    with pytest.raises(UserError, match=r"is not of this recipe's vae.architecture"):
        msdm.check(changed(recipe_file, f"vae.pretrained={other.uri}", "vae.architecture.layers_per_block=2"))
    with pytest.raises(UserError, match=r"is of resolution 16, this recipe's data.resolution is 32"):
        msdm.check(changed(recipe_file, f"vae.pretrained={other.uri}", "data.resolution=32"))
