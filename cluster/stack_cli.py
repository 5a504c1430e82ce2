"""The commands `medsynth stack up|status|down`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cluster.terminal import command_line, console, plain, visible

if TYPE_CHECKING:
    from cluster.stack import Status

app = typer.Typer(no_args_is_help=True)

Folder = Annotated[Path, typer.Option(help="Where all of the stack is: data, logs, keys.")]
FOLDER = Path(".medsynth-stack")
KEPT = "Default: as last time, at first"


@app.command()
def up(
    folder: Folder = FOLDER,
    mlflow_port: Annotated[int | None, typer.Option(min=1, max=65535, help=f"{KEPT} 5000.")] = None,
    s3_port: Annotated[int | None, typer.Option(min=1, max=65535, help=f"{KEPT} 9000.")] = None,
    ray_port: Annotated[int | None, typer.Option(min=1, max=65535, help=f"{KEPT} 6379.")] = None,
    dashboard_port: Annotated[int | None, typer.Option(min=1, max=65535, help=f"{KEPT} 8265.")] = None,
    bucket: Annotated[str | None, typer.Option(help=f"Made in S3. {KEPT} medsynth.")] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="That Ray counts. Default: the machine's.")] = None,
) -> None:
    """Start what does not run yet of S3, MLflow and Ray on this machine, and wait until all three answer.

    medsynth stack up && source .medsynth-stack/env
    """
    from cluster import stack

    folder = folder.absolute()
    options = {
        "mlflow_port": mlflow_port,
        "s3_port": s3_port,
        "ray_port": ray_port,
        "dashboard_port": dashboard_port,
        "bucket": bucket,
        "cpus": cpus,
    }
    changes = {name: value for name, value in options.items() if value is not None}
    with console.status("waiting until S3, MLflow and Ray answer"):
        started = stack.up(folder, changes)
        found = stack.status(folder)
    _print(found)
    kept = [server.name for server in found if server.name not in started]
    console.print(f"Started: {', '.join(started) or 'nothing'}. Already ran: {', '.join(kept) or 'nothing'}.")
    source = command_line(["source", os.path.relpath(folder / stack.ENVIRONMENT)])
    console.print(f"To use it, run in each shell: {plain(source)}, which is", soft_wrap=True)
    for line in stack.shell_lines(folder):
        console.print(f"  {visible(line)}", soft_wrap=True, markup=False)


@app.command()
def status(folder: Folder = FOLDER) -> None:
    """Show how each server is; exit with 1 if one is not up.

    medsynth stack status
    """
    from cluster import stack

    found = stack.status(folder.absolute())
    _print(found)
    if any(server.state != "up" for server in found):
        raise typer.Exit(1)


@app.command()
def down(folder: Folder = FOLDER) -> None:
    """End what `up` started, and nothing else; runs, artifacts and objects are there again after the next `up`.

    medsynth stack down
    """
    from cluster import stack

    with console.status("waiting until all have ended"):
        ended = stack.down(folder.absolute())
    names = ", ".join(ended) or "nothing, for nothing ran"
    console.print(f"Ended: {names}. Data and logs stay in {plain(folder)}.", soft_wrap=True)


def _print(found: list["Status"]) -> None:
    table = Table(box=None)
    for column in ("server", "state", "address", "pid", "log"):
        table.add_column(column, overflow="fold")
    for server in found:
        color = "green" if server.state == "up" else "red"
        pid = "" if server.pid is None else str(server.pid)
        log = os.path.relpath(server.log)
        table.add_row(server.name, f"[{color}]{server.state}[/]", plain(server.url), pid, plain(log))
    console.print(table)
