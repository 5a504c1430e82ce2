"""The command `medsynth sweep`."""

import json
import signal
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from cluster.errors import UserError
from cluster.names import check_path_part
from cluster.progress import PlainLines, clock
from cluster.terminal import ask, command_line, console, plain, say_starting

if TYPE_CHECKING:
    from sweeps.spec import SweepSpec, Trial
    from sweeps.tune import Swept
    from trainers.launch import Progress

COLOURS = {"running": "cyan", "finished": "green", "stopped": "yellow", "failed": "red"}
OVER_RECIPES, OVER_GUIDANCE, RANGE_TEST = "a sweep over recipes", "a sweep over guidance", "a range test"
OPTIONS = {
    OVER_RECIPES: {"run", "resume"},
    OVER_GUIDANCE: {"guidance", "data", "out", "workers", "device", "cache"},
    RANGE_TEST: {"lr_find", "lr_min", "lr_max", "steps", "run"},
}
"""Options that only some sweeps have."""


def sweep(
    context: typer.Context,
    spec: Annotated[
        str | None,
        typer.Argument(help="Specification of a sweep over recipes or over guidance: YAML file or s3:// URI."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Change a key of the specification, as budget.trials=4; fixed.… takes a recipe's key. With --lr-find: "
            "of the recipe.",
        ),
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="Name of a new sweep, or of a range test.", rich_help_panel="Over recipes")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Name of a sweep that was cut off: it goes on, and repeats nothing.", rich_help_panel="Over recipes"
        ),
    ] = None,
    guidance: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Draw this trained model over guidance scales, steps and samplers; nothing is trained.",
            rich_help_panel="Over guidance",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Shards of real images: a folder or s3:// prefix.", rich_help_panel="Over guidance"),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            help="Folder or s3:// prefix; one that was cut off goes on. Default: sweeps-out/…",
            rich_help_panel="Over guidance",
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(min=1, help="Ray actors that draw and look; 1 needs no Ray.", rich_help_panel="Over guidance"),
    ] = 1,
    device: Annotated[
        str | None,
        typer.Option(help="cpu or cuda. Default: cuda where there is one.", rich_help_panel="Over guidance"),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            help="Where features of real images are kept. Default: features/ in the sweep.",
            rich_help_panel="Over guidance",
        ),
    ] = None,
    lr_find: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="Train a recipe's last stage with ever larger learning rates, and suggest one.",
            rich_help_panel="Range test",
        ),
    ] = None,
    lr_min: Annotated[float, typer.Option(help="Where it begins.", rich_help_panel="Range test")] = 1e-6,
    lr_max: Annotated[
        float, typer.Option(help="Where it ends, if the loss has not blown up.", rich_help_panel="Range test")
    ] = 1.0,
    steps: Annotated[int, typer.Option(help="One rate each.", rich_help_panel="Range test")] = 100,
) -> None:
    """Try recipes over a space of their keys, stop the bad ones early, and register the best model as `candidate`.

    medsynth sweep sweeps/specs/msdm-learning-rate.yaml

    Or find out how a trained model is best drawn, which becomes its registered version's default:

    medsynth sweep --guidance models:/msdm-demo/1 --data demo/shards --workers 2

    Or where to look for a learning rate:

    medsynth sweep --lr-find recipes/msdm-demo.yaml
    """
    from sweeps.guidance_cli import run_guidance_sweep
    from sweeps.guidance_spec import load_guidance_spec
    from sweeps.lr_find_cli import run_lr_find
    from trainers.recipe import read_document

    if spec:
        ask(spec)
    if guidance or (spec and "model" in read_document(spec, "sweep", "'recipe' and 'space'")):
        kind = OVER_GUIDANCE
    else:
        kind = RANGE_TEST if lr_find else OVER_RECIPES
    _check_options(context, kind)
    changes = list(overrides or [])
    if lr_find:
        if spec:
            raise UserError("--lr-find takes the recipe itself, and no specification beside it")
        run_lr_find(lr_find, changes, console, run=run, lr_min=lr_min, lr_max=lr_max, steps=steps)
    elif kind == OVER_GUIDANCE:
        # What is named by an option of its own is quoted, so that it is read as it was typed.
        changes += [f"model={json.dumps(guidance)}"] if guidance else []
        changes += [f"data={json.dumps(data)}"] if data else []
        run_guidance_sweep(
            load_guidance_spec(spec, changes), console, out=out, cache=cache, workers=workers, device=device
        )
    elif spec:
        _sweep_recipes(spec, changes, run, resume)
    else:
        raise UserError(
            "name a specification, such as sweeps/specs/msdm-learning-rate.yaml, or a model with --guidance"
        )


def _check_options(context: typer.Context, kind: str) -> None:
    """Raise UserError for an option that the kind of sweep does not have."""
    for other, options in OPTIONS.items():
        for name in options - OPTIONS[kind]:
            source = context.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE":
                raise UserError(f"--{name.replace('_', '-')} is an option of {other}, and this is {kind}")


def _sweep_recipes(spec: str, overrides: Sequence[str], run: str | None, resume: str | None) -> None:
    if run and resume:
        raise UserError("--run names a new sweep, --resume one that was cut off: give one of them")
    from sweeps.spec import load_spec

    loaded = load_spec(spec, overrides)
    from sweeps.space import check, num_trials
    from trainers.families import check_shards

    recipes = check(loaded)
    ask(*sorted({recipe.data.shards for recipe in recipes}))
    for recipe in recipes:
        check_shards(recipe)
    name = resume or run or f"{loaded.name}-{datetime.now():%Y%m%d-%H%M%S}"
    check_path_part(name, "--resume" if resume else "--run")
    changes = [word for change in overrides for word in ("--set", change)]
    command = command_line(["medsynth", "sweep", spec, *changes, "--resume", name])
    total = num_trials(loaded)
    of = f"of at most {total} trials" if total else "for as long as its budget lasts"
    console.print(f"Sweep [bold]{plain(name)}[/] {of}; to resume it: {plain(command)}", soft_wrap=True)
    say_starting("PyTorch, Ray and MLflow")
    from sweeps.tune import SweepStopped, run_sweep

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being ended is being interrupted
    try:
        with TrialTable(console, loaded, total) as table:
            swept = run_sweep(loaded, name, is_new=resume is None, watch=table)
    except SweepStopped:
        console.print(f"Stopped; the trials' checkpoints are kept. To go on: {plain(command)}", soft_wrap=True)
        raise typer.Exit(130) from None
    summarize(console, loaded, swept)
    if swept.best is None:
        raise UserError(f"sweep {name}: no trial was trained to its end, so there is no best: see why in MLflow")


class TrialTable:
    """Shows the trials as they fare: a table that changes in place on a terminal, a line for each change in a log."""

    def __init__(self, console: Console, spec: "SweepSpec", total: int | None) -> None:
        self._console = console
        self._spec = spec
        self._total = total
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._said: dict[int, tuple[str, int]] = {}
        self._lines = PlainLines()
        self._started = time.monotonic()

    def __enter__(self) -> "TrialTable":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, trials: Sequence["Trial"], steps: int) -> None:
        if self._console.is_terminal:
            self._live.update(trial_table(self._spec, trials, steps, total=self._total), refresh=True)
            return
        for trial in trials:
            now = (trial.state, trial.steps)
            if self._said.get(trial.number) != now:
                self._said[trial.number] = now
                self.say(f"trial {trial.number} {trial.state}: {_values(trial.params)} {_progress(trial, steps)}")

    def show_training(self, progress: "Progress") -> None:
        figures = "  ".join(f"{name} {value:.4g}" for name, value in progress.metrics.items() if "loss" in name)
        is_due = progress.is_preparation and self._lines.is_due(progress.stage, progress.step, progress.steps)
        if figures or is_due:
            self.say(f"{progress.stage}, for all trials: {progress.step}/{progress.steps} {figures}".rstrip())

    def say(self, line: str) -> None:
        elapsed = time.strftime("%H:%M:%S", time.gmtime(time.monotonic() - self._started))
        self._console.print(f"{elapsed} {plain(line)}", soft_wrap=True)


def trial_table(spec: "SweepSpec", trials: Sequence["Trial"], steps: int, *, total: int | None) -> Table:
    """A row for each trial: state, values of the keys, the objective's last value, steps of `steps`, time left."""
    ended = sum(trial.state != "running" for trial in trials)
    table = Table(title=f"{plain(spec.name)}: {ended} of {total or '?'} trials ended", title_justify="left")
    for heading in ("trial", "state", *_headings(list(spec.space)), spec.objective.metric, "steps", "left"):
        table.add_column(plain(heading))
    for trial in trials:
        table.add_row(
            str(trial.number),
            f"[{COLOURS[trial.state]}]{trial.state}[/]",
            *(plain(_short(trial.params.get(key, ""))) for key in spec.space),
            "" if trial.value is None else f"{trial.value:.5g}",
            f"{trial.steps}/{trial.end or steps}",
            _left(trial, steps),
        )
    return table


def summarize(console: Console, spec: "SweepSpec", swept: "Swept") -> None:
    """The end of a sweep: its trials, the best recipe, where everything is, and what to do next."""
    console.print(trial_table(spec, swept.trials, swept.steps, total=len(swept.trials)))
    if best := swept.best:
        console.print(f"Best: trial {best.number}, {plain(spec.objective.metric)} {best.value:.5g}")
        table = Table(show_header=False)
        for key, value in best.params.items():
            table.add_row(plain(key), plain(_short(value)))
        table.add_row("recipe", plain(swept.journal.best_recipe))
        table.add_row("model", plain(swept.model_uri))
        console.print(table)
        again = command_line(["medsynth", "train", swept.journal.best_recipe])
        console.print(f"Train it again, or longer: {plain(again)}", soft_wrap=True)
    if swept.shortfall:
        console.print(f"It is not registered: trained for {plain(swept.shortfall)} of its recipe", soft_wrap=True)
    if swept.model_uri and swept.model_uri.startswith("models:/"):
        judge = command_line(["medsynth", "promote", swept.model_uri])
        console.print(f"Judge it: {plain(judge)} --data ...", soft_wrap=True)
    where = f"Everything is in {swept.journal.uri}; MLflow: {swept.tracker.ui_command()}"
    console.print(plain(where), soft_wrap=True)


def _headings(keys: Sequence[str]) -> list[str]:
    """The keys' last names where these tell them apart."""
    last = [key.rpartition(".")[2] for key in keys]
    return [name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)]


def _values(params: Mapping[str, Any]) -> str:
    return "  ".join(f"{name} {_short(params[key])}" for key, name in zip(params, _headings(list(params)), strict=True))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _progress(trial: "Trial", steps: int) -> str:
    value = "" if trial.value is None else f"  objective {trial.value:.5g} at step {trial.steps}/{trial.end or steps}"
    left = _left(trial, steps)
    return f"{value}  {left} left" if left else value


def _left(trial: "Trial", steps: int) -> str:
    """Time to the end of a running trial at its speed so far."""
    done = trial.steps - trial.begin
    if trial.state != "running" or not done:
        return ""
    return clock(trial.seconds / done * ((trial.end or steps) - trial.steps))
