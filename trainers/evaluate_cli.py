"""The command `medsynth evaluate`."""

from datetime import datetime
from pathlib import PurePosixPath
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cluster import storage
from cluster.progress import progress_lines
from trainers.fidelity.evaluation import Evaluation, Measure

console = Console(highlight=False)
ARROWS = {"lower": "↓", "higher": "↑", None: ""}


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="models:/NAME/VERSION, models:/NAME@ALIAS, runs:/ID/model; a run's folder, one of its checkpoints, "
            "a model's folder, or a folder of images."
        ),
    ],
    data: Annotated[str, typer.Option(help="Shards of real images: a folder or s3:// prefix.")],
    split: Annotated[
        list[str] | None,
        typer.Option(
            help="Whose captions and images to compare with; may be given several times. Default: all but train."
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option(min=2, help="Images to draw.")] = 256,
    images_per_prompt: Annotated[int, typer.Option(min=1, help="Diversity is measured among those.")] = 2,
    extractor: Annotated[
        list[str] | None,
        typer.Option(
            help="What turns images into features, KIND or KIND:WEIGHTS; may be given several times, the first decides "
            "on copies. Kinds: inception, clip, biomedclip, dinov2, rad-dino, radimagenet, transformers, random-vgg. "
            "Default: random-vgg, which needs no weights."
        ),
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(min=0, help="Default: the model's own.")] = None,
    true_cfg_scale: Annotated[float | None, typer.Option(min=1, help="FLUX. Default: the model's own.")] = None,
    num_inference_steps: Annotated[int | None, typer.Option(min=1, help="Default: the model's own.")] = None,
    sampler: Annotated[
        str | None,
        typer.Option(help="MSDM: ddpm, ddim or dpm-solver++. FLUX: euler. Default: the model's own."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same images of the same prompts.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images drawn at a time.")] = 8,
    workers: Annotated[int, typer.Option(min=1, help="Ray actors that draw and look; 1 needs no Ray.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
    out: Annotated[
        str | None, typer.Option(help="Folder or s3:// prefix; one that was cut off goes on. Default: evaluations/…")
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(help="Where features of real images are kept. Default: features/ beside the evaluation."),
    ] = None,
    record: Annotated[bool, typer.Option(help="Record it in MLflow, below the run that trained the model.")] = True,
) -> None:
    """Judge a model beside real images: fidelity, alignment, diversity, copies; with a page to look at.

    medsynth evaluate models:/msdm-demo/latest --data demo/shards --num-samples 128 --guidance-scale 3.5
    """
    from trainers.evaluate import Request, record_evaluation
    from trainers.evaluate import evaluate as judge

    place = (
        out
        or f"evaluations/{PurePosixPath(model.replace(':', '')).name.replace('@', '-')}-{datetime.now():%Y%m%d-%H%M%S}"
    )
    asked = {
        "guidance_scale": guidance_scale,
        "true_cfg_scale": true_cfg_scale,
        "num_inference_steps": num_inference_steps,
        "sampler": sampler,
    }
    request = Request(
        shards=data,
        splits=tuple(split) if split else None,
        num_samples=num_samples,
        images_per_prompt=images_per_prompt,
        seed=seed,
        extractors=tuple(extractor or ("random-vgg",)),
        settings={name: value for name, value in asked.items() if value is not None},
        batch_size=batch_size,
    )
    console.print(f"Evaluation in [bold]{place}[/]; cut off, it goes on with --out {place}", soft_wrap=True)
    with progress_lines(console) as on_progress:
        evaluation = judge(
            model,
            request,
            place,
            cache=cache or storage.join(place, "..", "features"),
            num_workers=workers,
            device=device,
            on_progress=on_progress,
        )
    console.print(table_of(evaluation))
    console.print(f"The page for people: {storage.join(place, 'report.html')}", soft_wrap=True)
    if record:
        tracker = record_evaluation(evaluation, place)
        console.print(f"MLflow: {tracker.ui_command()}", soft_wrap=True)


def table_of(evaluation: Evaluation) -> Table:
    """The figures, with their intervals."""
    drawn, real = len(evaluation.samples), evaluation.reference.num_images
    table = Table(title=f"{evaluation.model.name}: {drawn} images beside {real} real ones", title_justify="left")
    for column in ("measure", "", "value", "95 % interval"):
        table.add_column(column, justify="left" if column in ("measure", "") else "right")
    for name, measure in evaluation.measures.items():
        table.add_row(name, ARROWS[measure.better], f"{measure.value:.4g}", _interval(measure))
    return table


def _interval(measure: Measure) -> str:
    return "{:.4g} to {:.4g}".format(*measure.interval) if measure.interval else ""
