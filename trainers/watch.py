"""What a person sees while a run trains: a bar on a terminal, a line for each report in a log."""

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bars,
)
from rich.table import Table

from cluster.progress import PlainLines

if TYPE_CHECKING:
    from trainers.launch import Progress, TrainedRun

SHOWN = {"loss": ".4f", "validation_loss": ".4f", "images_per_second": ".1f", "mfu": ".0%", "grad_norm": ".2f"}


class Watch:
    """Shows the reports of a run as they come."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Bars(
            TextColumn("{task.description:>16}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._lines = PlainLines()
        self._started = time.monotonic()
        self._is_recorded = True

    def __enter__(self) -> "Watch":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def show(self, progress: "Progress") -> None:
        if self._is_recorded != (progress.unrecorded == 0):
            self._is_recorded = progress.unrecorded == 0
            self.say(
                "MLflow answers again; it knows all reports."
                if self._is_recorded
                else "MLflow does not answer; the training goes on, and its reports wait in the run's folder."
            )
        figures = _figures(progress.metrics)
        if not self._console.is_terminal:
            is_due = progress.is_preparation and self._lines.is_due(progress.stage, progress.step, progress.steps)
            if not figures and not is_due:
                return
            elapsed = time.strftime("%H:%M:%S", time.gmtime(time.monotonic() - self._started))
            self.say(f"{elapsed} {progress.stage} {progress.step}/{progress.steps} {figures}".rstrip())
            return
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = self._bars.add_task(progress.stage, total=progress.steps, figures="")
        shown = figures or self._bars.tasks[self._tasks[progress.stage]].fields["figures"]
        self._bars.update(self._tasks[progress.stage], completed=progress.step, figures=shown)

    def say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True)

    def say_stopping(self) -> None:
        self.say("Stopping: saving the state. Ctrl-C again to give up on it.")


@contextmanager
def watching(console: Console, command: str) -> Iterator[Watch]:
    """Show a run that trains inside the block; if it is interrupted, say that `command` goes on with it, and exit."""
    from trainers.launch import RunStopped

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being ended is being interrupted: save first
    try:
        with Watch(console) as watch:
            yield watch
    except RunStopped:
        console.print(f"Stopped and saved. To go on: {command}", soft_wrap=True)
        raise typer.Exit(130) from None
    except KeyboardInterrupt:
        console.print(f"Stopped at once; what was finished is kept. To go on: {command}", soft_wrap=True)
        raise typer.Exit(130) from None


def summarize(console: Console, trained: "TrainedRun", prompt: str) -> None:
    """The end of a run: its figures, where the pictures are, and what to do next."""
    table = Table(title="Result", show_header=False, title_justify="left")
    for stage in trained.stages:
        values = {name.removeprefix(f"{stage}/"): v for name, v in trained.metrics.items() if name.startswith(stage)}
        table.add_row(stage, _figures(values))
    if fidelity := {name: value for name, value in trained.metrics.items() if name.startswith("fidelity/")}:
        figures = (f"{name.removeprefix('fidelity/').replace('_', ' ')} {fidelity[name]:.4g}" for name in fidelity)
        table.add_row("fidelity", "  ".join(figures))
    console.print(table)
    # Not in the table, which would cut them at the 80 columns of a job's log.
    for what, place in (
        ("Model", trained.model_uri),
        ("Pictures", f"{trained.folder.uri}/pictures"),
        ("MLflow", trained.tracker.ui_command()),
    ):
        console.print(f"{what}: {place}", soft_wrap=True, markup=False, highlight=False)
    for what, reason in trained.failures.items():
        console.print(f"[yellow]Failed: {what}: {escape(reason)}[/]", soft_wrap=True)
    command = f'medsynth generate --model {trained.model_uri} --prompt "{prompt}" --num-images 8 --seed 0 --out samples'
    console.print(f"Draw from it: {command}", soft_wrap=True)


def _figures(metrics: Mapping[str, float]) -> str:
    return "  ".join(
        f"{name.replace('_', ' ')} {metrics[name]:{form}}" for name, form in SHOWN.items() if name in metrics
    )
