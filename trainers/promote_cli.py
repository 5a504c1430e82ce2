"""The command `medsynth promote`."""

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cluster import storage
from cluster.errors import UserError
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
    from cluster.promotion import PromotionDecision

REFUSED = 3
"""Exit code of a promotion that the gates refuse."""


def promote(
    model: Annotated[str, typer.Argument(help="The candidate: models:/NAME/VERSION or models:/NAME/latest.")],
    data: Annotated[
        str | None, typer.Option(help="Shards that it was trained on, with held-out splits: a folder or s3:// prefix.")
    ] = None,
    gates: Annotated[str | None, typer.Option(help="YAML of what differs from recipes/gates/default.yaml.")] = None,
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
        str | None, typer.Option(help="Folder or s3:// prefix of both evaluations. Default: promotions/…")
    ] = None,
    cache: Cache = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Decide and say so, but change nothing.")] = False,
    rollback: Annotated[bool, typer.Option("--rollback", help="Make the previous champion champion again.")] = False,
    unlock: Annotated[bool, typer.Option("--unlock", help="Remove the lock of a promotion that died.")] = False,
) -> None:
    """Make a model the champion of its name, if it passes the gates; exit with 3 if it does not.

    medsynth promote models:/msdm-demo/latest --data demo/shards --num-samples 300
    """
    if dry_run and (rollback or unlock):
        other = "--rollback" if rollback else "--unlock"
        raise UserError(f"--dry-run changes nothing, and {other} does nothing but change: leave out one of them")
    if unlock:
        _unlock(model)
        return
    if rollback:
        _roll_back(model)
        return
    if data is None:
        raise UserError("give --data SHARDS, the shards that the candidate was trained on")

    from trainers.gates import load_gates

    limits = load_gates(gates)
    check_asked(data, extractor)
    check_model(model)
    say_starting("PyTorch and MLflow")
    from trainers.evaluate import evaluate
    from trainers.fidelity.bootstrap import paired_difference
    from trainers.fidelity.evaluation import Evaluation
    from trainers.fidelity.extractors import kept_extractor
    from trainers.fidelity.features import reference_features
    from trainers.promote import Features
    from trainers.promote import promote as decide_and_act

    place = out or f"promotions/{datetime.now():%Y%m%d-%H%M%S}"
    features = cache or storage.join(place, "features")
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

    def real_features(evaluation: Evaluation, label: str) -> Features:
        assert evaluation.generation is not None
        return reference_features(
            data,
            evaluation.reference.splits,
            kept_extractor(evaluation.extractors[label].uri, "cpu"),  # only names them: they are in the cache
            resolution=evaluation.generation.resolution,
            cache=features,
        ).features

    again = command_line(["--out", place])
    console.print(f"Evaluations in [bold]{plain(place)}[/]; to go on with them: {plain(again)}", soft_wrap=True)
    with progress_lines(console) as on_progress:

        def judge(model_uri: str, folder: str) -> Evaluation:
            console.print(f"Evaluating {plain(model_uri)}", soft_wrap=True)
            return evaluate(
                model_uri,
                request,
                folder,
                cache=features,
                num_workers=workers,
                device=device,
                on_progress=on_progress,
            )

        outcome = decide_and_act(
            model,
            data,
            place,
            gates=limits,
            evaluate=judge,
            real_features=real_features,
            paired_difference=paired_difference,
            seed=seed,
            dry_run=dry_run,
        )
    rival = "no champion yet" if outcome.champion is None else f"champion {outcome.champion}"
    console.print(table_of(outcome.decision, title=f"{plain(outcome.name)}: candidate {outcome.candidate}, {rival}"))
    accepted = outcome.decision.accepted
    done = {
        (True, True): f"models:/{plain(outcome.name)}@champion is now version {outcome.candidate}.",
        (True, False): "It would become champion. Nothing was changed.",
        (False, False): "Refused. The champion stays.",
    }[accepted, outcome.moved]
    console.print(done, style="green" if accepted else "red", soft_wrap=True)
    if outcome.audit_run:
        console.print(f"Recorded in MLflow run {outcome.audit_run} and in the version's tags.")
    if not accepted:
        raise typer.Exit(REFUSED)


def table_of(decision: "PromotionDecision", *, title: str) -> Table:
    """Every gate, whether it was passed, and why."""
    table = Table(title=title, title_justify="left")
    for column in ("gate", "passed", "why"):
        table.add_column(column, overflow="fold")
    for check in decision.checks:
        table.add_row(plain(check.gate), "[green]yes[/]" if check.passed else "[red]no[/]", plain(check.reason))
    return table


def _roll_back(uri: str) -> None:
    from trainers.promote import rollback

    before, after = rollback(uri)
    console.print(f"The champion is version {after} again; version {before} is 'previous'.")


def _unlock(uri: str) -> None:
    from cluster.registry import RegisteredModel

    model, _ = RegisteredModel.of(uri)
    console.print("Unlocked." if model.unlock() else f"'{plain(model.name)}' was not locked.")
