"""What a person sees of a run."""

import io
import re
import signal
import time

import pytest
import typer
from rich.console import Console

from cluster.errors import UserError
from cluster.progress import TimeLeft
from cluster.tracking import Tracker
from trainers.launch import Progress, RunCutOffError, RunStopped, TrainedRun
from trainers.run_folder import RunFolder
from trainers.watch import Watch, summarize, watching

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


def test_a_log_gets_a_line_for_each_quarter_of_what_is_prepared() -> None:
    out = io.StringIO()
    with Watch(Console(file=out, highlight=False)) as watch:
        for done in (0, 90, 180, 270, 400, 802):
            watch.show(Progress("encoding images", done, 802, {}, is_preparation=True))
        watch.show(Progress("encoding prompts", 0, 0, {}, is_preparation=True))
    lines = [line.split(" ", 1)[1].strip() for line in out.getvalue().splitlines()]
    assert lines == ["encoding images 270/802", "encoding images 802/802"]


def test_a_terminal_gets_a_bar_that_keeps_the_last_figures() -> None:
    out = io.StringIO()
    with Watch(Console(file=out, force_terminal=True, width=120)) as watch:
        for report in REPORTS:
            watch.show(report)
    last = [line for line in out.getvalue().splitlines() if "100/100" in line][-1]
    assert "validation loss 0.2500" in last


def test_a_run_of_two_stages_tells_its_share_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    out, now = io.StringIO(), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Watch(Console(file=out), TimeLeft({"vae": 100.0, "denoiser": 300.0})) as watch:
        for second, stage, step in ((50, "vae", 50), (75, "vae", 100), (200, "denoiser", 50), (350, "denoiser", 100)):
            now[0] = second
            watch.show(Progress(stage, step, 100 if stage == "vae" else 150, {"loss": 1.0}))
    told = [line.rpartition("(")[2].rstrip(")") for line in out.getvalue().splitlines()]
    assert told == [
        "12% of all",  # the seconds before the first report were of starting: they are no speed
        "25% of all, 0:02:30 left",  # 50 of 100 in 25 s, so 300 in 150 s
        "50% of all, 0:01:40 left",  # a stage's own speed is known from its second report on
        "75% of all, 0:02:30 left",  # the other half of that stage took 150 s
    ]


def test_a_resumed_run_counts_what_was_done_as_done_but_not_as_speed() -> None:
    left = TimeLeft({"vae": 100.0, "denoiser": 100.0})
    left.update("denoiser", 0.5, 1000.0)
    assert str(left) == "75% of all"
    left.update("encoding images", 0.1, 1005.0)
    left.update("denoiser", 0.6, 1010.0)
    assert str(left) == "80% of all, 0:00:40 left"


def test_what_starts_is_named_before_it_reports() -> None:
    out = io.StringIO()
    with Watch(Console(file=out)) as watch:
        watch.say_starting("Ray")
    assert out.getvalue() == "00:00:00 Starting: Ray\n"
    out = io.StringIO()
    with Watch(Console(file=out, force_terminal=True, width=120), TimeLeft({"vae": 1.0})) as watch:
        watch.say_starting("Ray")
        watch.say_starting("vae")
        watch.show(REPORTS[0])
    stage, whole = [line for line in out.getvalue().splitlines() if "━" in line][-2:]
    assert re.search("vae.* 50/100 +loss 0.5100", stage)
    assert re.search("all stages.* 50% of all", whole)


def test_the_summary_has_the_last_fidelity_and_what_failed() -> None:
    out = io.StringIO()
    trained = TrainedRun(
        folder=RunFolder("runs/a"),
        stages=("vae", "denoiser"),
        tracker=Tracker("sqlite:///mlflow.db", "run"),
        metrics={"denoiser/loss": 0.5, "fidelity/fid_random_vgg": 12.3456, "fidelity/recall": 0.25},
        model_uri="models:/a/1",
        failures={"fidelity at step 20": "cannot read weights [abc]"},
    )
    summarize(Console(file=out, width=200, highlight=False), trained, "a polyp")
    assert "fid random vgg 12.35  recall 0.25" in out.getvalue()
    assert "Failed: fidelity at step 20: cannot read weights [abc]" in out.getvalue()


def test_the_summary_cuts_no_address_in_a_jobs_log() -> None:
    """A log is 80 columns wide, to Rich."""
    out = io.StringIO()
    folder = RunFolder(f"s3://bucket/{'long/' * 20}run")
    tracker = Tracker(f"sqlite:////{'long/' * 20}mlflow.db", "run")
    trained = TrainedRun(folder, ("vae",), tracker, {}, folder.model("vae"), {})
    summarize(Console(file=out, width=80), trained, "a polyp")
    shown = out.getvalue().splitlines()
    assert f"Model: {folder.model('vae')}" in shown
    assert f"Pictures: {folder.uri}/pictures" in shown
    assert f"MLflow: mlflow ui --backend-store-uri {tracker.tracking_uri}" in shown


@pytest.mark.parametrize(
    ("interruption", "said"), [(RunStopped, "Stopped and saved"), (KeyboardInterrupt, "Stopped at once")]
)
def test_who_interrupts_a_run_is_told_how_to_go_on(interruption: type[BaseException], said: str) -> None:
    out = io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    try:
        with (
            pytest.raises(typer.Exit) as caught,
            watching(Console(file=out, width=60), "medsynth train r.yaml --run again"),
        ):
            raise interruption
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.exit_code == 130
    assert said in out.getvalue()
    assert out.getvalue().rstrip().endswith("To go on: medsynth train r.yaml --run again")


def test_what_gave_out_is_told_with_the_command_that_goes_on() -> None:
    error = RunCutOffError("run a cannot go on: no room; the same command goes on")
    with (
        pytest.raises(UserError, match="the same command goes on: medsynth train x --run a"),
        watching(Console(file=io.StringIO()), "medsynth train x --run a"),
    ):
        raise error
