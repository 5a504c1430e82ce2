"""What a command imports before it refuses, and what it says before it imports what takes seconds."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "ray", "mlflow", "diffusers", "transformers", "boto3", "matplotlib", "scipy")

WATCHED = """
import json, sys
from importlib.abc import MetaPathFinder
from typer.testing import CliRunner
heavy, cases, may_import = json.loads(sys.argv[1])

class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in heavy:
            raise RuntimeError(f"imported {name}")

if not may_import:
    sys.meta_path.insert(0, Refuse())
from medsynth import app
for case in cases:
    result = CliRunner().invoke(app, case)
    there = [name for name in heavy if name in sys.modules]
    print(json.dumps([result.output, repr(result.exception), there]))
"""


def outcomes(cases: list[list[str]], *, may_import: bool) -> list[Any]:
    """(output, exception, heavy modules imported by then) of each command, all in one process: starting takes time.

    Unless they may be imported, the import of one ends the command.
    """
    arguments = json.dumps([HEAVY, cases, may_import])
    found = subprocess.run(
        [sys.executable, "-c", WATCHED, arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return [json.loads(line) for line in found.stdout.splitlines()]


def recipe(name: str) -> str:
    return str(ROOT / "recipes" / f"{name}.yaml")


def test_what_is_refused_without_a_server_imports_nothing_heavy(shards: str, tmp_path: Path) -> None:
    demo, sweep = recipe("msdm-demo"), str(ROOT / "sweeps/specs/msdm-learning-rate.yaml")
    (tmp_path / "images").mkdir()
    (tmp_path / "gates.yaml").write_text("colour: red")
    cases = {
        "": [],
        "Usage": ["--help"],
        "No such command": ["tain"],
        "No such option": ["train", "--recipe", demo],
        "cannot read nowhere.yaml": ["train", "nowhere.yaml"],
        "did you mean 'training'": ["train", demo, "--set", "denoiser.trainin.steps=1"],
        "no shards at demo/shards": ["train", demo],
        "cannot read t.csv": ["shards", "write", "t.csv", "--out", "o"],
        "no shards at nowhere": ["shards", "inspect", "nowhere"],
        "no shards at there": ["shards", "verify", "there"],
        "is for FLUX": ["shards", "precompute", demo],
        "there is no folder nowhere": ["generate", "--model", "nowhere", "--prompt", "x"],
        "holds no diffusers pipeline": ["generate", "--model", "images", "--prompt", "x"],
        "write models:/NAME/VERSION": ["generate", "--model", "models:/x", "--prompt", "x"],
        "there is no folder gone": ["evaluate", "gone", "--data", shards],
        "no shards at gone": ["evaluate", "images", "--data", "gone"],
        "cannot read none.yaml": ["promote", "models:/x/1", "--data", "x", "--gates", "none.yaml"],
        "colour": ["promote", "models:/x/1", "--data", "x", "--gates", "gates.yaml"],
        "no evaluation at a": ["compare", "a", "b"],
        "cannot read nowhere/recipe.yaml": ["export", "nowhere", "--out", "x"],
        "did you mean 'h100'": ["plan", recipe("flux-full-8gpu"), "--gpu", "h10"],
        "cannot read spec.yaml": ["sweep", "spec.yaml"],
        "unknown key 'budget.trial'": ["sweep", sweep, "--set", "budget.trial=1"],
        "unknown key 'vae.x'": ["sweep", sweep, "--set", f"recipe={demo}", "--set", "fixed.vae.x=1"],
        "there is no folder model": ["sweep", "--guidance", "model", "--data", shards],
        "cannot read lr.yaml": ["sweep", "--lr-find", "lr.yaml"],
        "is no command of medsynth": ["submit", "--", "tain"],
        "s3": ["stack", "status"],
    }
    for said, (output, error, there) in zip(cases, outcomes(list(cases.values()), may_import=True), strict=True):
        assert said in output + error, cases[said]
        assert there == [], cases[said]


def test_a_press_of_tab_imports_nothing_heavy() -> None:
    code = f"""
import sys, medsynth
try:
    medsynth.app(prog_name="medsynth")
finally:
    print([name for name in {HEAVY} if name in sys.modules])
"""
    completion = {"_MEDSYNTH_COMPLETE": "complete_bash", "COMP_WORDS": "medsynth gen", "COMP_CWORD": "1"}
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **completion},
    )
    assert found.stdout.splitlines() == ["generate", "[]"]


def test_what_takes_long_to_start_says_so_first(shards: str, recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    flux = [recipe("flux-tiny"), "--set", f"data.shards={shards}"]
    sweep = ["--set", f"recipe={recipe('msdm-demo')}", "--set", f"fixed.data.shards={shards}"]
    cases = [
        ["train", str(recipe_file)],
        ["sweep", str(ROOT / "sweeps/specs/msdm-learning-rate.yaml"), *sweep],
        ["sweep", "--lr-find", str(recipe_file)],
        ["sweep", "--guidance", "model", "--data", shards],
        ["generate", "--model", "model", "--prompt", "a polyp"],
        ["evaluate", "model", "--data", shards],
        ["promote", "models:/x/1", "--data", shards],
        ["plan", *flux],
        ["shards", "precompute", *flux],
    ]
    for case, (output, error, _) in zip(cases, outcomes(cases, may_import=False), strict=True):
        assert "imported " in error, (case, error)
        assert "Starting: " in output or "Asking MLflow" in output, case


def test_who_asks_mlflow_says_so_first() -> None:
    asked = [["generate", "--prompt", "x", "--model", "models:/x/1"], ["compare", "models:/x/1", "b"]]
    for output, error, _ in outcomes(asked, may_import=False):
        assert "imported mlflow" in error
        assert output.startswith("Asking MLflow for models:/x/1")


def test_the_command_that_goes_on_is_exactly_the_command(shards: str, recipe_file: Path, tmp_path: Path) -> None:
    hostile = "a [bold]run of 'Zoë' [x] :skull: $HOME"
    odd = tmp_path / "my [draft] recipe's.yaml"
    odd.write_text(recipe_file.read_text())
    change = f'sampling.prompts=["{"a polyp, " * 20}"]'  # longer than a line
    asked = [str(odd), "--set", change, "--set", f"data.shards={shards}"]
    cases = [["train", *asked, "--run", hostile], ["sweep", "--lr-find", *asked, "--run", hostile]]
    spec = [str(ROOT / "sweeps/specs/msdm-learning-rate.yaml"), "--set", f"recipe={recipe('msdm-demo')}"]
    spec += ["--set", f"fixed.data.shards={shards}", "--set", 'fixed.sampling.prompts=["a [b]"]']
    cases.append(["sweep", *spec, "--run", hostile])
    train, rates, sweep = outcomes(cases, may_import=False)
    told = [output.splitlines()[0].partition("to resume it: ") for output, _, _ in (train, rates, sweep)]
    assert [before.startswith((f"Run {hostile}", f"Range test {hostile}", f"Sweep {hostile}")) for before, *_ in told]
    commands = [shlex.split(command) for _, _, command in told]
    assert commands[0] == ["medsynth", "train", *asked, "--run", hostile]
    assert commands[1][:-8] == ["medsynth", "sweep", "--lr-find", *asked]
    assert commands[1][-2:] == ["--run", hostile]
    assert commands[2] == ["medsynth", "sweep", *spec, "--resume", hostile]


def test_names_of_others_are_printed_as_they_stand(shards: str, tmp_path: Path) -> None:
    """A manifest comes from whoever made the shards, and speaks to the terminal of whoever looks at them."""
    (tmp_path / "there").mkdir()
    for path in Path(shards).iterdir():
        (tmp_path / "there" / path.name).symlink_to(path)
    document = json.loads((Path(shards) / "manifest.json").read_text())
    document |= {
        "name": "[red]set[/] \x1b[31m",
        "licences": {"CC [BY]\x07": 24},
        "quarantined": {"[/]": 1},
        "conversions": {"\\[bold]": 1},
        "near_duplicates": {"[link=x]": 1},
        "split_rule": "by [group]\nand so on",
    }
    (tmp_path / "there" / "manifest.json").unlink()
    (tmp_path / "there" / "manifest.json").write_text(json.dumps(document))
    missing = "\x1b[31m[/]nowhere"
    ((output, _, _),) = outcomes([["shards", "inspect", "there"]], may_import=True)
    for said in (
        "[red]set[/] \\x1b[31m",
        "CC [BY]\\x07 (24)",
        "[/] (1)",
        "\\[bold] (1)",
        "[link=x] (1)",
        "[group]\\nand",
    ):
        assert said in output
    alone = subprocess.run(
        [sys.executable, "-m", "medsynth", "train", missing],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert alone.stderr.startswith("Error: cannot read \\x1b[31m[/]nowhere: it is not there")


def test_threads_of_pytorch_wait_without_spinning_unless_told_otherwise() -> None:
    """In the command's own process and, inherited, in those that it starts."""
    code = "import os, medsynth; print(os.environ['OMP_WAIT_POLICY'])"
    unset = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    for given, expected in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        found = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**unset, "PYTHONPATH": str(ROOT), **given},
        )
        assert found.stdout == f"{expected}\n"
