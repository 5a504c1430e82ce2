"""The front door: one command that mounts each folder's commands."""

import os
import sys
from importlib import metadata
from typing import Annotated

import typer
from rich.console import Console

from cluster import doctor_cli, jobs_cli
from cluster.environment import wait_passively
from cluster.errors import UserError
from cluster.options import refuse_repeats
from cluster.stack_cli import app as stack
from cluster.terminal import plain
from data_shards import cli as shards_cli
from data_shards.cli import app as shards
from sweeps import cli as sweeps
from trainers import cli as trainers
from trainers import compare_cli, evaluate_cli, promote_cli

wait_passively()
# A user's terminal is for our messages; libraries below speak up through exceptions.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

app = typer.Typer(
    help="Train text-to-image diffusion models on medical images with captions, on a laptop or a Ray cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(shards, name="shards", help="Turn a data set into shards, and look at them.")
shards.command()(trainers.precompute)
shards_cli.reader_of_recipe = trainers.reader_of_recipe
app.command()(trainers.train)
app.command()(trainers.generate)
app.command()(sweeps.sweep)
app.command()(evaluate_cli.evaluate)
app.command()(compare_cli.compare)
app.command()(promote_cli.promote)
app.command()(trainers.plan)
app.command()(trainers.export)
app.command(context_settings={"allow_interspersed_args": False})(jobs_cli.submit)
app.add_typer(jobs_cli.app, name="jobs", help="Jobs of a Ray cluster: list, status, logs, stop.")
app.command()(doctor_cli.doctor)
app.add_typer(stack, name="stack", help="S3, MLflow and Ray as servers on this machine.")
refuse_repeats(app)


def say_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"medsynth {metadata.version('medsynth')}")
        raise typer.Exit


@app.callback()
def medsynth(
    version: Annotated[
        bool, typer.Option("--version", callback=say_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    """The options of no command."""


def main() -> None:
    """Run a command; a user's mistake is one line on stderr and exit code 2."""
    try:
        app()
    except UserError as error:
        Console(stderr=True).print(f"[bold red]Error:[/] {plain(error)}", soft_wrap=True, highlight=False, emoji=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
