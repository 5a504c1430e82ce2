"""What a person sees while a run trains: a bar on a terminal, a line for each report in a log."""

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table

from cluster.errors import UserError
from cluster.progress import PlainLines, TimeLeft
from cluster.terminal import command_line, plain
from trainers.families import family_of

if TYPE_CHECKING:
    from trainers.launch import Progress, TrainedRun
    from trainers.recipe import Recipe

SHOWN = {"loss": ".4f", "validation_loss": ".4f", "images_per_second": ".1f", "mfu": ".0%", "grad_norm": ".2f"}
WHOLE, STARTING = "all stages", "starting"


def work_of(recipe: "Recipe") -> dict[str, float]:
    """How many images each stage trains on: about what it takes, until its own speed is known."""
    family = family_of(recipe)
    training = {stage: family.training_of(recipe, stage) for stage in family.STAGES}
    return {stage: float(asked.steps * asked.global_batch_size) for stage, asked in training.items()}


class Watch:
    """Shows the reports of a run as they come."""

    def __init__(self, console: Console, time_left: TimeLeft | None = None) -> None:
        self._console = console
        self._time_left = time_left
        self._bars = Bars(
            TextColumn("{task.description:>16}"),
            BarColumn(),
            TextColumn("{task.fields[done]}"),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._figures: dict[str, str] = {}
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
        left = ""
        if self._time_left is not None:
            self._time_left.update(progress.stage, progress.step / max(progress.steps, 1), time.monotonic())
            left = str(self._time_left)
        if not self._console.is_terminal:
            is_due = progress.is_preparation and self._lines.is_due(progress.stage, progress.step, progress.steps)
            if not figures and not is_due:
                return
            told = f"{progress.stage} {progress.step}/{progress.steps} {figures}".rstrip()
            self._say_when(f"{told}  ({left})" if left and not progress.is_preparation else told)
            return
        self._end_starting()
        self._bar(progress.stage, progress.step, progress.steps, f"{progress.step}/{progress.steps}", figures)
        if self._time_left is not None:
            self._bar(WHOLE, int(1000 * self._time_left.share), 1000, left, "")

    def say_starting(self, what: str) -> None:
        """It takes its time before it tells of itself."""
        if not self._console.is_terminal:
            self._say_when(f"Starting: {what}")
            return
        self._end_starting()
        self._tasks[STARTING] = self._bars.add_task(STARTING, total=None, done=plain(what), figures="")

    def _end_starting(self) -> None:
        if STARTING in self._tasks:
            self._bars.remove_task(self._tasks.pop(STARTING))

    def _bar(self, name: str, completed: int, total: int, done: str, figures: str) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(plain(name), total=total, done="", figures="")
        self._figures[name] = figures or self._figures.get(name, "")  # the last ones stay until there are others
        self._bars.update(self._tasks[name], completed=completed, done=done, figures=self._figures[name])

    def _say_when(self, line: str) -> None:
        self.say(f"{time.strftime('%H:%M:%S', time.gmtime(time.monotonic() - self._started))} {line}")

    def say(self, line: str) -> None:
        self._console.print(plain(line), soft_wrap=True)

    def say_stopping(self) -> None:
        self.say("Stopping: saving the state. Ctrl-C again to give up on it.")


@contextmanager
def watching(console: Console, command: str, time_left: TimeLeft | None = None) -> Iterator[Watch]:
    """Show a run that trains inside the block, with `time_left` of all its stages, if it is given.

    If the run is interrupted, say that `command` goes on with it, and exit.
    """
    from trainers.launch import RunCutOffError, RunStopped

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being ended is being interrupted: save first
    try:
        with Watch(console, time_left) as watch:
            yield watch
    except RunCutOffError as error:
        raise UserError(f"{error}: {command}") from None
    except RunStopped:
        console.print(f"Stopped and saved. To go on: {plain(command)}", soft_wrap=True)
        raise typer.Exit(130) from None
    except KeyboardInterrupt:
        console.print(f"Stopped at once; what was finished is kept. To go on: {plain(command)}", soft_wrap=True)
        raise typer.Exit(130) from None


def summarize(console: Console, trained: "TrainedRun", prompt: str) -> None:
    """The end of a run: its figures, where the pictures are, and what to do next."""
    table = Table(title="Result", show_header=False, title_justify="left")
    for stage in trained.stages:
        values = {name.removeprefix(f"{stage}/"): v for name, v in trained.metrics.items() if name.startswith(stage)}
        table.add_row(plain(stage), _figures(values))
    if fidelity := {name: value for name, value in trained.metrics.items() if name.startswith("fidelity/")}:
        figures = (f"{name.removeprefix('fidelity/').replace('_', ' ')} {fidelity[name]:.4g}" for name in fidelity)
        table.add_row("fidelity", "  ".join(figures))
    console.print(table)
    # Not in the table, which would cut them where a log has 80 columns.
    where = {"Model": trained.model_uri, "Pictures": f"{trained.folder.uri}/pictures"}
    for what, place in (where | {"MLflow": trained.tracker.ui_command()}).items():
        console.print(f"{what}: {plain(place)}", soft_wrap=True)
    for what, reason in trained.failures.items():
        console.print(f"[yellow]Failed: {plain(what)}: {plain(reason)}[/]", soft_wrap=True)
    asked = ["--model", trained.model_uri, "--prompt", prompt, "--num-images", 8, "--seed", 0, "--out", "samples"]
    console.print(f"Draw from it: {plain(command_line(['medsynth', 'generate', *asked]))}", soft_wrap=True)


def _figures(metrics: Mapping[str, float]) -> str:
    return "  ".join(
        f"{name.replace('_', ' ')} {metrics[name]:{form}}" for name, form in SHOWN.items() if name in metrics
    )
