"""The direction of imports: medsynth -> sweeps -> trainers -> data_shards -> cluster, and one door for each service."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ORDER = ["medsynth", "sweeps", "trainers", "data_shards", "cluster"]
MODEL_CODE = ("trainers/msdm", "trainers/flux", "trainers/kandinsky")
DOORS = {
    "boto3": {"cluster/storage.py"},
    "botocore": {"cluster/storage.py"},
    "mlflow": {"cluster/tracking.py", "cluster/tracking_store.py", "cluster/registry.py", "trainers/serving.py"},
    "ray": {
        "cluster/runtime.py",
        "cluster/jobs.py",
        "cluster/jobs_cli.py",  # for a type
        "cluster/node_probe.py",
        "trainers/launch.py",
        "trainers/exporter.py",  # what a rank measures, for Ray's metrics exporter
        "sweeps/tune.py",
        "data_shards/parallel.py",
    },
    "deepspeed": {"trainers/engines/zero3.py", "trainers/engines/deepspeed_config.py"},
}


def imports() -> Iterator[tuple[str, int, str]]:
    """(file, line, imported module) of every import, also those inside functions."""
    files = [ROOT / "medsynth.py", *(path for room in ORDER[1:] for path in (ROOT / room).rglob("*.py"))]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert node.level == 0, f"{path}:{node.lineno}: relative import"
                names = [node.module]
            else:
                continue
            for name in names:
                yield path.relative_to(ROOT).as_posix(), node.lineno, name


def test_rooms_import_only_those_below_them() -> None:
    found = list(imports())
    assert len(found) > 100
    wrong = [
        f"{file}:{line}: {room} must not import {name}"
        for file, line, name in found
        if (target := name.split(".")[0]) in ORDER
        and ORDER.index(target) < ORDER.index(room := file.split("/")[0].removesuffix(".py"))
    ]
    assert not wrong, "\n".join(wrong)


def test_each_service_has_one_door() -> None:
    wrong = [
        f"{file}:{line}: {name} enters through {', '.join(sorted(DOORS[service]))}"
        for file, line, name in imports()
        if (service := name.split(".")[0]) in DOORS and file not in DOORS[service]
    ]
    assert not wrong, "\n".join(wrong)


def test_model_code_knows_no_loop_and_no_engine() -> None:
    outer = ("trainers.loop", "trainers.launch", "trainers.worker", "trainers.engines", "trainers.families")
    wrong = [
        f"{file}:{line}: model code must not import {name}"
        for file, line, name in imports()
        if file.startswith(MODEL_CODE) and name.startswith(outer)
    ]
    assert not wrong, "\n".join(wrong)


def test_processes_of_ray_do_not_import_what_they_do_not_need() -> None:
    """A run starts many of them, a sweep many runs; each of these takes seconds of a processor to import."""
    heavy = ("diffusers", "transformers", "deepspeed", "plotly", "matplotlib")
    modules = "trainers.launch, sweeps.tune, trainers.families.msdm, trainers.families.flux, trainers.msdm"
    code = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
