"""What a person sees of a run."""

import io

from rich.console import Console

from trainers.launch import Progress
from trainers.watch import Watch

REPORTS = [
    Progress("vae", 50, 100, {"loss": 0.51, "images_per_second": 12.34, "learning_rate": 1e-4}),
    Progress("vae", 100, 100, {"validation_loss": 0.25}),
    Progress("vae", 100, 100, {}),
]


def test_a_log_gets_a_plain_line_for_each_report_of_figures() -> None:
    out = io.StringIO()
    with Watch(Console(file=out, highlight=False)) as watch:
        for report in REPORTS:
            watch.show(report)
    lines = [line.split(" ", 1)[1].strip() for line in out.getvalue().splitlines()]
    assert lines == [
        "vae 50/100 loss 0.5100  images per second 12.3",
        "vae 100/100 validation loss 0.2500",
    ]


def test_a_terminal_gets_a_bar_that_keeps_the_last_figures() -> None:
    out = io.StringIO()
    with Watch(Console(file=out, force_terminal=True, width=120)) as watch:
        for report in REPORTS:
            watch.show(report)
    last = [line for line in out.getvalue().splitlines() if "100/100" in line][-1]
    assert "validation loss 0.2500" in last
