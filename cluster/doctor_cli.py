"""The command `medsynth doctor`."""

from typing import Annotated

import typer

from cluster.terminal import console, plain

MARKS = {True: "[green]✓[/]", False: "[red]✗[/]", None: "[dim]–[/]"}


def doctor(
    bucket: Annotated[
        str | None, typer.Option(help="Place to try reading and writing at, s3://BUCKET/PREFIX.", show_default=False)
    ] = None,
    short: Annotated[
        bool, typer.Option("--short", help="Only what 'medsynth submit' looks at: job server and MLflow.")
    ] = False,
) -> None:
    """See whether everything that a run needs is there; each ✗ tells its remedy, and the exit code is then 1.

    medsynth doctor --bucket s3://bucket/prefix
    """
    from cluster.doctor import examine

    well = True
    for check in examine(bucket, short=short):
        well &= check.ok is not False
        console.print(f"{MARKS[check.ok]} {plain(check.name)}: {plain(check.found)}", soft_wrap=True)
        if check.ok is False:
            console.print(f"  → {plain(check.remedy)}", soft_wrap=True)
    if not well:
        raise typer.Exit(1)
