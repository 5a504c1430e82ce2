"""How long a command takes to answer: help, refusals, first lines; beside what it takes to import PyTorch.

    python -m benchmarks.startup                   # some minutes: each command in a process of its own, in turns

`of_torch` is a command's time over that of `python -c "import torch"` in the same round: a busy machine slows both.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.circumstances import RESULTS, ROOT, circumstances

IMPORT_TORCH = "import torch"
MEDSYNTH = [sys.executable, "-m", "medsynth"]
NOBODY = "http://127.0.0.1:9"  # the discard port, where nobody listens
UNROUTED = "http://192.0.2.1:9000"  # of a network for documentation: packets vanish
DEMO = str(ROOT / "recipes/msdm-demo.yaml")
HELP: Mapping[str, Sequence[str]] = {"help": ["--help"], "help of train": ["train", "--help"]}
REFUSALS: Mapping[str, Sequence[str]] = {
    "mistyped command": ["tain"],
    "no such recipe": ["train", "nowhere.yaml"],
    "mistyped key": ["train", DEMO, "--set", "denoiser.trainin.steps=1"],
    "no such shards": ["train", DEMO],
    "no such table": ["shards", "write", "t.csv", "--out", "o"],
    "nothing to inspect": ["shards", "inspect", "nowhere"],
    "no such model folder": ["generate", "--model", "nowhere", "--prompt", "x"],
    "no such evaluation": ["compare", "a", "b"],
    "no such specification": ["sweep", "spec.yaml"],
}
FROM_MLFLOW = ["generate", "--model", "models:/x/1", "--prompt", "x"]
FROM_S3 = ["train", "s3://bucket/recipe.yaml"]
ASKING: Mapping[str, tuple[Sequence[str], Mapping[str, str]]] = {
    "MLflow on SQLite": (FROM_MLFLOW, {}),
    "no MLflow server": (FROM_MLFLOW, {"MLFLOW_TRACKING_URI": NOBODY}),
    "MLflow, no route": (FROM_MLFLOW, {"MLFLOW_TRACKING_URI": UNROUTED}),
    "no S3 server": (FROM_S3, {"AWS_ENDPOINT_URL": NOBODY}),
    "S3, no route": (FROM_S3, {"AWS_ENDPOINT_URL": UNROUTED}),
}
KEYS = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}
STARTS: Mapping[str, Sequence[str]] = {
    "train": ["train", DEMO, "--set", "data.shards=shards"],
    "generate": ["generate", "--model", "model", "--prompt", "x"],
    "evaluate": ["evaluate", "model", "--data", "shards"],
    "range test": ["sweep", "--lr-find", DEMO, "--set", "data.shards=shards"],
}
"""Of which the first line is awaited, and no more."""


def timed(command: Sequence[str], here: Path, environment: Mapping[str, str], *, only_first_line: bool) -> list[float]:
    """(seconds to the first line of output, or to the end without one; seconds to the end) of a process."""
    began = time.perf_counter()
    with subprocess.Popen(
        command, cwd=here, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        first_line = time.perf_counter() - began
        if only_first_line:
            process.kill()
        process.stdout.read()
        process.wait()
        return [first_line, time.perf_counter() - began]


def prepare(here: Path) -> None:
    """Shards to start with, and a folder that looks like a model's until it is opened."""
    write = ["shards", "write", str(ROOT / "tests/data/colonoscopy"), "--format", "medvqa", "--resize", "64"]
    subprocess.run([*MEDSYNTH, *write, "--out", "shards"], cwd=here, env=environment_of(), check=True)
    (here / "model").mkdir()
    (here / "model" / "model_index.json").write_text("{}")


def environment_of(**changes: str) -> dict[str, str]:
    """Without servers, but for those named."""
    servers = ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "RAY_ADDRESS")
    kept = {name: value for name, value in os.environ.items() if name not in servers}
    return {**kept, "PYTHONPATH": str(ROOT), **changes}


def measure(here: Path, rounds: int) -> dict[str, dict[str, Any]]:
    torch_command = [sys.executable, "-c", IMPORT_TORCH]
    commands: dict[str, tuple[str, Sequence[str], Mapping[str, str]]] = {IMPORT_TORCH: ("", torch_command, {})}
    for kind, cases in (("help", HELP), ("refusal", REFUSALS), ("start", STARTS)):
        commands |= {f"{kind}: {name}": (kind, [*MEDSYNTH, *words], {}) for name, words in cases.items()}
    for name, (words, servers) in ASKING.items():
        commands[f"server: {name}"] = ("server", [*MEDSYNTH, *words], KEYS | dict(servers))
    found: dict[str, list[list[float]]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, (kind, command, servers) in commands.items():
            seconds = timed(command, here, environment_of(**servers), only_first_line=kind == "start")
            if number:  # the first round fills the page cache
                found[name].append(seconds)
    rows: dict[str, dict[str, Any]] = {}
    for name, (kind, _, _) in commands.items():
        first, whole = zip(*found[name], strict=True)
        shares = [seconds[1] / torch[1] for seconds, torch in zip(found[name], found[IMPORT_TORCH], strict=True)]
        rows[name] = {"seconds_to_first_line": round(statistics.median(first), 3)} if kind else {}
        if kind != "start":
            rows[name]["seconds"] = round(statistics.median(whole), 3)
        if kind in ("help", "refusal"):
            rows[name]["of_torch"] = round(statistics.median(shares), 3)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="after one that is not counted")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{date.today()}-startup-cpu.json")
    options = parser.parse_args()
    result = circumstances()
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        result |= {"rounds": options.rounds, "commands": measure(Path(folder), options.rounds)}
    for name, row in result["commands"].items():
        print(f"{name:36}", "  ".join(f"{what} {value:g}" for what, value in row.items()))
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
