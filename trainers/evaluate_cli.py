"""The command `medsynth evaluate`."""

import re
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cluster import storage
from cluster.progress import progress_lines
from cluster.terminal import command_line, console, plain, say_starting
from trainers.evaluation_options import (
    BatchSize,
    Cache,
    Compile,
    Device,
    Extractors,
    GuidanceScale,
    ImagesPerPrompt,
    NumInferenceSteps,
    NumSamples,
    Precision,
    Sampler,
    Seed,
    Splits,
    TrueCFGScale,
    Workers,
    check_asked,
    check_model,
    request_of,
)

if TYPE_CHECKING:
    from trainers.fidelity.evaluation import Evaluation, Measure


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="models:/NAME/VERSION, models:/NAME@ALIAS, runs:/ID/model; a run's folder, one of its checkpoints, "
            "a model's folder, or a folder of images."
        ),
    ],
    data: Annotated[str, typer.Option(help="Shards of real images: a folder or s3:// prefix.")],
    split: Splits = None,
    num_samples: NumSamples = 300,
    images_per_prompt: ImagesPerPrompt = 2,
    extractor: Extractors = None,
    guidance_scale: GuidanceScale = None,
    true_cfg_scale: TrueCFGScale = None,
    num_inference_steps: NumInferenceSteps = None,
    sampler: Sampler = None,
    precision: Precision = None,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    workers: Workers = 1,
    device: Device = None,
    compile: Compile = False,
    out: Annotated[
        str | None, typer.Option(help="Folder or s3:// prefix; one that was cut off goes on. Default: evaluations/…")
    ] = None,
    cache: Cache = None,
    no_record: Annotated[bool, typer.Option("--no-record", help="Leave it out of MLflow.")] = False,
) -> None:
    """Judge a model beside real images: fidelity, alignment, diversity, copies; with a page to look at.

    medsynth evaluate models:/msdm-demo/latest --data demo/shards --num-samples 300 --guidance-scale 3.5
    """
    check_asked(data, extractor)
    check_model(model, may_be_images=True)
    say_starting("PyTorch and the model")
    from trainers.evaluate import evaluate as judge
    from trainers.evaluate import record_evaluation
    from trainers.fidelity.evaluation import REPORT
    from trainers.fidelity.report import limits_of, missing_of, obedience

    place = out or f"evaluations/{name_for(model)}-{datetime.now():%Y%m%d-%H%M%S}"
    request = request_of(
        data,
        splits=split,
        num_samples=num_samples,
        images_per_prompt=images_per_prompt,
        extractors=extractor,
        seed=seed,
        batch_size=batch_size,
        compile=compile,
        guidance_scale=guidance_scale,
        true_cfg_scale=true_cfg_scale,
        num_inference_steps=num_inference_steps,
        sampler=sampler,
        precision=precision,
    )
    again = command_line(["--out", place])
    console.print(f"Evaluation in [bold]{plain(place)}[/]; cut off, it goes on with {plain(again)}", soft_wrap=True)
    with progress_lines(console) as on_progress:
        evaluation = judge(
            model,
            request,
            place,
            cache=cache or storage.join(storage.absolute(place).rpartition("/")[0], "features"),
            num_workers=workers,
            device=device,
            on_progress=on_progress,
        )
    console.print(table_of(evaluation))
    for note in (obedience(evaluation), *limits_of(evaluation), *missing_of(evaluation)):
        console.print(f"• {plain(note)}", soft_wrap=True)
    console.print(f"The page for people: {plain(storage.join(place, REPORT))}", soft_wrap=True)
    if not no_record:
        tracker = record_evaluation(evaluation, place)
        console.print(f"MLflow: {plain(tracker.ui_command())}", soft_wrap=True)


def name_for(model: str) -> str:
    """A folder's name that tells which model lies in it: models:/polyps@champion is polyps-champion."""
    return re.sub(r"[^\w.]+", "-", model.removeprefix("models:/").removeprefix("runs:/").rstrip("/")).strip("-")[-60:]


def table_of(evaluation: "Evaluation") -> Table:
    """The figures, with their intervals."""
    from trainers.fidelity.figures import what_is_best

    drawn, real = len(evaluation.samples), evaluation.reference.num_images
    table = Table(title=f"{plain(evaluation.model.name)}: {drawn} images beside {real} real ones", title_justify="left")
    for column in ("measure", "", "value", "95 % interval"):
        table.add_column(column, justify="left" if column in ("measure", "") else "right")
    for name, measure in evaluation.measures.items():
        best = what_is_best(measure).removesuffix(" is best")
        table.add_row(plain(name), best, f"{measure.value:.4g}", _interval(measure))
    return table


def _interval(measure: "Measure") -> str:
    return "{:.4g} to {:.4g}".format(*measure.interval) if measure.interval else ""
