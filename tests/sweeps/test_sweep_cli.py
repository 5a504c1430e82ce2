"""What a person sees of a sweep."""

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from sweeps.cli import TrialTable, trial_table
from sweeps.spec import SweepSpec, Trial

RATE = "denoiser.training.learning_rate"
TRIALS = (
    Trial(0, "finished", {RATE: 1e-3}, 0.125, 6, 12.0, "a"),
    Trial(1, "running", {RATE: 5e-3}, 0.25, 2, 10.0, "b"),
    Trial(2, "failed", {RATE: 9e-3}, None, 0, 1.0, None),
)


@pytest.fixture
def spec(sweep_document: dict[str, Any]) -> SweepSpec:
    return SweepSpec.model_validate(sweep_document)


def test_the_table_of_trials(spec: SweepSpec) -> None:
    console = Console(file=StringIO(), width=120)
    console.print(trial_table(spec, TRIALS, 6, total=4))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "rates: 2 of 4 trials ended" in lines[0]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert rows == [
        ["0", "finished", "0.001", "0.125", "6/6", ""],
        ["1", "running", "0.005", "0.25", "2/6", "0:00:20"],  # 5 s a step
        ["2", "failed", "0.009", "", "0/6", ""],
    ]


def test_in_a_log_a_change_is_one_line(spec: SweepSpec) -> None:
    console = Console(file=StringIO(), width=60)
    with TrialTable(console, spec, 4) as table:
        table.show(TRIALS[:2], 6)
        table.show(TRIALS[:2], 6)
        table.show(TRIALS, 6)
        table.say("Trial 2 failed: [not] a number")
    said = [line.partition(" ")[2] for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert said == [
        "trial 0 finished: learning_rate 0.001   objective 0.125 at step 6/6",
        "trial 1 running: learning_rate 0.005   objective 0.25 at step 2/6  0:00:20 left",
        "trial 2 failed: learning_rate 0.009 ",
        "Trial 2 failed: [not] a number",
    ]
