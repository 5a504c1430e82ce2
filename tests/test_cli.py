"""The command as a stranger types it: help with examples, and one clear line and exit code 2 for each mistake."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import trainers.recipe
from cluster import storage
from cluster.errors import UserError
from cluster.options import OneValueEach
from data_shards import Manifest
from data_shards.cli import app as shards_app
from medsynth import app
from tests.servers import free_port


def medsynth(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The installed command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "medsynth", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )


def run(*arguments: str) -> str:
    """The same in this process, which is faster; mistakes come as UserError."""
    result = CliRunner().invoke(app, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


COMMANDS = [
    ["shards", "write"],
    ["shards", "inspect"],
    ["shards", "verify"],
    ["train"],
    ["generate"],
    ["evaluate"],
    ["compare"],
    ["submit"],
    ["jobs", "list"],
    ["jobs", "status"],
    ["jobs", "logs"],
    ["jobs", "stop"],
    ["doctor"],
    ["stack", "up"],
    ["stack", "status"],
    ["stack", "down"],
]


@pytest.mark.parametrize("command", [[], ["shards"], *COMMANDS])
def test_help_shows_what_it_is_and_an_example(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0
    if command in COMMANDS:
        assert f"medsynth {' '.join(command)} " in result.output.partition("Usage:")[2].partition("\n")[2]


def test_names_of_options_are_whole_on_a_narrow_terminal() -> None:
    """80 columns, as most terminals have. A name that is cut there cannot be typed."""
    for path, command in leaves(get_command(app)):
        result = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "80", "TERM": "dumb"})
        shown = set(result.output.replace(",", " ").split())
        names = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert {name for name in names if name.startswith("--")} <= shown, path


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with the words that call it."""
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, inner in command.commands.items():
        yield from leaves(inner, (*path, name))


def test_a_mistake_is_one_line_on_stderr_and_exit_code_two(recipe_file: Path) -> None:
    result = medsynth("train", str(recipe_file), "--set", "denoiser.training.learning_rat=1e-4")
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert "unknown key 'denoiser.training.learning_rat': did you mean 'learning_rate'?" in line


def one_row(folder: Path) -> str:
    (folder / "t.csv").write_text("image,caption\na.png,x\n")
    return str(folder / "t.csv")


FLUX_TINY = Path(__file__).parent / "data" / "flux-tiny"

MISTAKES: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "no such recipe": (lambda here: ["train", "nowhere.yaml"], "cannot read nowhere.yaml: it is not there"),
    "a recipe of another folder": (
        lambda here: ["train", "recipes/msdm-demo.yaml"],
        "it is not there; did you mean .*/recipes/msdm-demo.yaml\\?",
    ),
    "a mistyped specification": (
        lambda here: ["sweep", "msdm-learning-rat.yaml"],
        "it is not there; did you mean .*/sweeps/specs/msdm-learning-rate.yaml\\?",
    ),
    "a plan of MSDM": (
        lambda here: ["plan", str(here / "recipe.yaml")],
        "medsynth plan is for FLUX; .* is of family msdm, which any GPU made for training holds",
    ),
    "no such shards": (
        lambda here: ["train", str(here / "recipe.yaml"), "--set", "data.shards=nowhere"],
        "no shards at .*nowhere: manifest.json is not there; write them with 'medsynth shards write'",
    ),
    "no such text encoder": (
        lambda here: ["train", str(here / "recipe.yaml"), "--set", "text_encoder.pretrained=no/such-model"],
        "text_encoder.pretrained: cannot load 'no/such-model'",
    ),
    "storage is a file": (
        lambda here: ["train", str(here / "recipe.yaml"), "--set", f"cluster.storage={here / 'recipe.yaml'}"],
        "cannot write .*: File exists|Not a directory",
    ),
    "no such model": (
        lambda here: ["generate", "--model", "models:/nothing/1", "--prompt", "x"],
        "no model 'nothing' is registered: there are none",
    ),
    "no such model folder": (
        lambda here: ["generate", "--model", "nowhere", "--prompt", "x"],
        "there is no folder nowhere",
    ),
    "a folder without a model": (
        lambda here: ["generate", "--model", str(here), "--prompt", "x"],
        "holds no diffusers pipeline",
    ),
    "output is a file": (
        lambda here: ["generate", "--model", str(FLUX_TINY), "--prompt", "x", "--out", str(here / "recipe.yaml")],
        "cannot write .*recipe.yaml.*: File exists; choose another --out",
    ),
    "a bad share": (
        lambda here: ["shards", "write", "t.csv", "--out", "o", "--split", "train=much"],
        "--split train=much: write it as NAME=SHARE",
    ),
    "no such table": (
        lambda here: ["shards", "write", "t.csv", "--out", "o"],
        "cannot read t.csv: it is not there",
    ),
    "a share twice": (
        lambda here: ["shards", "write", "t.csv", "--out", "o", "--split", "val=1", "--split", "Validation=2"],
        "--split Validation=2: split 'validation' has a share already",
    ),
    "a column twice": (
        lambda here: ["shards", "write", "t.csv", "--out", "o", "--caption-column", "a", "--caption-column=b"],
        "--caption-column is given 2 times, and takes one value: leave one",
    ),
    "a model twice": (
        lambda here: ["generate", "--model", "a", "--prompt", "x", "--model", "b"],
        "--model is given 2 times, and takes one value",
    ),
    "a path as the set's name": (
        lambda here: ["shards", "write", one_row(here), "--out", str(here / "o"), "--name", "../x"],
        "cannot be called '../x'.*give another --name",
    ),
    "no such images": (
        lambda here: ["shards", "write", one_row(here), "--images", str(here / "gone"), "--out", str(here / "o")],
        "there is no folder of images at .*gone",
    ),
    "nothing to inspect": (lambda here: ["shards", "inspect", "nowhere"], "no shards at nowhere"),
}


def commands(group: Any, *path: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *path, name)
        else:
            yield " ".join((*path, name)), command


@pytest.mark.parametrize(("name", "command"), commands(get_command(app)))
def test_no_command_drops_the_first_of_two_values(name: str, command: Any) -> None:
    assert isinstance(command, OneValueEach), name


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_explained(mistake: str, recipe_file: Path, tracking_uri: str, tmp_path: Path) -> None:
    arguments, said = MISTAKES[mistake]
    with pytest.raises(UserError, match=said) as error:
        run(*arguments(tmp_path))
    assert "\n" not in str(error.value)


def test_version() -> None:
    assert run("--version") == f"medsynth {version('medsynth')}\n"


def test_an_installed_package_says_where_recipes_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers.recipe, "SOURCE", tmp_path)
    with pytest.raises(UserError, match="recipes and sweeps/specs are folders of the source code: name a file in your"):
        run("train", "recipes/msdm-demo.yaml")


def test_no_mlflow_server(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match="no MLflow server answers"):
        run("generate", "--model", "models:/x/1", "--prompt", "x")


def test_shards_written_inspected_and_verified(small_source: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "shards")
    write = ["shards", "write", str(small_source), "--format", "medvqa", "--out", out, "--samples-per-shard", "5"]
    assert "24 samples in" in run(*write)
    assert "already written" in run(*write)
    manifest = Manifest.load(out)
    inspected = run("shards", "inspect", out)
    for split in ("train", "validation", "test"):
        (row,) = (line for line in inspected.splitlines() if split in line and "│" in line)
        assert f" {sum(shard.num_samples for shard in manifest.split(split))} " in row
    assert "Licences: not stated (24)" in inspected
    assert f"All {len(manifest.shards)} shards are those of the manifest" in run("shards", "verify", out)

    damaged = next(Path(out).glob("*-train-000000.tar"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    result = CliRunner().invoke(shards_app, ["verify", out])
    assert result.exit_code == 1
    assert f"✗ {damaged.name}: SHA-256" in result.output
    damaged.unlink()
    result = CliRunner().invoke(shards_app, ["verify", out])
    assert f"✗ {damaged.name}: missing" in result.output


def test_quarantined_inputs_are_counted_and_the_list_is_named(small_source: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    names = sorted(path.name for path in (small_source / "images").glob("*.jpg"))
    rows = "".join(f"{name},a polyp\n" for name in names)
    table.write_text(f"image,caption\n{rows}gone.jpg,a polyp\n{names[0]}x.jpg,a polyp\n")
    output = run("shards", "write", str(table), "--images", str(small_source / "images"), "--out", "out")
    assert "Left out: 2 inputs (file not found 2); each is named in out/quarantine.jsonl" in output


def test_a_table_on_s3_has_its_images_beside_it(small_source: Path, bucket: str, tmp_path: Path) -> None:
    names = sorted(path.name for path in (small_source / "images").glob("*.jpg"))[:3]
    (small_table := tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"{name},a polyp\n" for name in names))
    for name in names:
        storage.upload_file(small_source / "images" / name, f"{bucket}/{name}")
    storage.upload_file(small_table, f"{bucket}/t.csv")
    how = ["--split", "train=1", "--out", str(tmp_path / "out")]
    assert f"{len(names)} samples in" in run("shards", "write", f"{bucket}/t.csv", *how)
