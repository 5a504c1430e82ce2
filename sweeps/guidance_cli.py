"""`medsynth sweep --guidance`, and a specification of a guidance sweep: run it, and say what was found."""

from datetime import datetime
from pathlib import PurePosixPath

from rich.console import Console
from rich.table import Table

from cluster import storage
from cluster.progress import progress_lines
from cluster.terminal import command_line, plain, say_starting
from sweeps.guidance_document import FRONT, GRID, GuidanceSweep
from sweeps.guidance_spec import GuidanceSpec
from trainers.evaluation_options import check_asked, check_model
from trainers.fidelity.figures import metric_of


def run_guidance_sweep(
    spec: GuidanceSpec,
    console: Console,
    *,
    out: str | None = None,
    cache: str | None = None,
    workers: int = 1,
    device: str | None = None,
    record: bool = True,
    make_default: bool = True,
) -> GuidanceSweep:
    """Sweep in the folder or s3:// prefix `out`, by default a new one in sweeps-out/, and record it in MLflow."""
    check_asked(spec.data, spec.extractors)
    check_model(spec.model)
    name = PurePosixPath(spec.model.replace(":", "")).name.replace("@", "-")
    place = out or f"sweeps-out/guidance-{name}-{datetime.now():%Y%m%d-%H%M%S}"
    again = command_line(["--out", place])
    console.print(f"Guidance sweep in [bold]{plain(place)}[/]; cut off, it goes on with {plain(again)}", soft_wrap=True)
    say_starting("PyTorch and the model")
    from sweeps.guidance import record_guidance_sweep, sweep_guidance

    with progress_lines(console) as on_progress:
        sweep = sweep_guidance(
            spec.model,
            spec.data,
            place,
            **spec.arguments,
            num_workers=workers,
            device=device,
            cache=cache,
            on_progress=on_progress,
        )
    console.print(table_of(sweep))
    best = ", ".join(f"{key} {value}" for key, value in sweep.best.setting.items())
    console.print(f"Recommended: {plain(best)}", soft_wrap=True)
    pictures = f"{storage.join(place, FRONT)} and {storage.join(place, GRID)}"
    console.print(f"Pictures: {plain(pictures)}", soft_wrap=True)
    if record:
        tracker = record_guidance_sweep(sweep, place, make_default=make_default)
        if make_default and spec.model.startswith("models:/"):
            told = f"{spec.model} is drawn so from now on, unless another setting is asked for"
            console.print(plain(told), soft_wrap=True)
        console.print(f"MLflow: {plain(tracker.ui_command())}", soft_wrap=True)
    return sweep


def table_of(sweep: GuidanceSweep) -> Table:
    """All settings in the order of the grid; those of the front are marked, the recommended one has a star.

    Intervals are in the document and in the picture.
    """
    title = f"{sweep.model.name}: {len(sweep.samples)} images each beside {sweep.reference.num_images} real ones"
    table = Table(title=plain(title), title_justify="left")
    measures = sweep.settings[0].measures
    for column in sweep.best.setting:
        table.add_column(column.replace("num_inference_", "").replace("_scale", "").replace("_", " "), justify="right")
    for name in (sweep.fidelity, sweep.alignment):
        arrow = "↓" if measures[name].better == "lower" else "↑"
        table.add_column(f"{metric_of(name, measures[name]).label} {arrow}", justify="right")
    table.add_column("s/image", justify="right")
    table.add_column("front", justify="center")
    for result in sweep.settings:
        is_best = result.name == sweep.recommended
        table.add_row(
            *(plain(value) for value in result.setting.values()),
            *(f"{result.measures[name].value:.4g}" for name in (sweep.fidelity, sweep.alignment)),
            f"{result.seconds_per_image:.2f}",
            "★" if is_best else "•" if result.name in sweep.front else "",
            style="bold" if is_best else None,
        )
    return table
