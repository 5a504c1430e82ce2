"""The commands `medsynth submit` and `medsynth jobs list|status|logs|stop`."""

import re
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.errors import UserError, did_you_mean
from cluster.terminal import console, plain, visible

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

    from cluster.jobs import JobServer

app = typer.Typer(no_args_is_help=True)
NOT_AS_JOBS = ("submit", "jobs", "stack")
STATUS_LINES = 5  # of a job's log
COLOURS = {"RUNNING": "cyan", "SUCCEEDED": "green", "STOPPED": "yellow", "FAILED": "red"}

Address = Annotated[
    str | None,
    typer.Option(
        help="The cluster's job server, http://HOST:8265. Default: RAY_API_SERVER_ADDRESS or RAY_ADDRESS.",
        show_default=False,
    ),
]
JobId = Annotated[str, typer.Argument(help="As 'medsynth jobs list' names it.", metavar="ID")]


def submit(
    context: typer.Context,
    command: Annotated[
        list[str], typer.Argument(help="What to run there: any medsynth command with its options.", metavar="COMMAND…")
    ],
    address: Address = None,
    working_dir: Annotated[Path, typer.Option(help="Folder to upload: the code and the recipes.")] = Path(),
    env: Annotated[
        list[str] | None,
        typer.Option(help="Name of an environment variable for the job; its value is that of here. No secrets."),
    ] = None,
    check: Annotated[
        bool, typer.Option(help="See first that the cluster has this Ray, and that MLflow answers.")
    ] = True,
    follow: Annotated[bool, typer.Option(help="Show the job's log until it ends, and exit as it does.")] = True,
) -> None:
    """Run a command as a job of a Ray cluster.

    medsynth submit --address http://127.0.0.1:8265 -- train recipes/msdm-demo.yaml --set data.shards=s3://bucket/shards
    """
    check_command(context, command)
    # Ray takes seconds to import.
    from cluster.jobs import TRACKING, JobServer, mebibytes, prepare, server_address

    at = server_address(address)
    submission = prepare(command, folder=working_dir.absolute(), variables=env or [])
    server = JobServer.connect(at)
    if check:
        _check(server, submission.runtime_env["env_vars"].get(TRACKING))
    for notice in submission.notices:
        console.print(f"[yellow]{plain(notice)}[/]", soft_wrap=True)
    server.submit(submission)
    _say(f"Job {submission.id}: {submission.metadata['command']}")
    _say(f"Uploaded {mebibytes(submission.upload_bytes)}; environment: {', '.join(submission.variables) or 'none'}")
    if follow:
        _follow(server, submission.id)
    else:
        _say(f"Its log: medsynth jobs logs {submission.id} --follow; to stop it: medsynth jobs stop {submission.id}")


@app.command("list")
def list_jobs(address: Address = None) -> None:
    """The jobs of the cluster, the latest last.

    medsynth jobs list --address http://127.0.0.1:8265
    """
    found = _server(address).jobs()
    width = max((len(job.submission_id or "") for job in found), default=0)
    for job in found:
        state = _state(job, width=len("SUCCEEDED"))
        job_id = plain((job.submission_id or "").ljust(width))
        line = f"{job_id}  {state}  {_began(job)}  {_took(job)}  {plain(_command(job))}"
        console.print(line, soft_wrap=True)


@app.command()
def status(job: JobId, address: Address = None) -> None:
    """How a job fares, its record in MLflow, and the end of its log.

    medsynth jobs status train-msdm-demo-20261125-0412-7f3a
    """
    server = _server(address)
    details = server.job(job)
    known = details.metadata or {}
    rows = {
        "job": plain(job),
        "state": _state(details),
        "began": f"{_began(details)}, {_took(details)}",
        "command": plain(_command(details)),
        "run": plain(known.get("run", "")),
        "git commit": plain(known.get("git_commit", "")),
        "medsynth": plain(known.get("medsynth_version", "")),
        "MLflow": plain(_record(details)),
    }
    for name, value in rows.items():
        if value:
            console.print(f"{name:12}{value}", soft_wrap=True)
    typer.echo(_last_lines(server.log(job)))


@app.command()
def logs(
    job: JobId,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until it ends, and exit as it does.")] = False,
) -> None:
    """What a job has printed.

    medsynth jobs logs train-msdm-demo-20261125-0412-7f3a --follow
    """
    server = _server(address)
    if follow:
        _follow(server, job)
    else:
        typer.echo(server.log(job), nl=False)


@app.command()
def stop(job: JobId, address: Address = None) -> None:
    """Have a job save its state and stop, and say which command goes on with it.

    medsynth jobs stop train-msdm-demo-20261125-0412-7f3a
    """
    server = _server(address)
    if not server.stop(job):
        _say(f"{job} was not running: {server.job(job).status.value}")
        return
    _say("Asked it to save its state and to stop; waiting for that")
    details = server.ended(job)
    log = server.log(job)
    typer.echo(_last_lines(log))
    _say(details.status.value)
    if details.status.value == "STOPPED" and (command := _continuation(details, log)):
        _say(f"To go on: medsynth submit -- {command}")


def check_command(context: typer.Context, words: Sequence[str]) -> None:
    """Raise UserError, or Typer's error of usage, if a medsynth command could not be called like that."""
    parent = context.find_root()
    command: Any = parent.command
    rest, path = list(words), "medsynth"
    while hasattr(command, "commands"):
        name = rest.pop(0) if rest else ""
        there = [known for known in command.commands if known not in NOT_AS_JOBS]
        if name not in there:
            raise UserError(
                f"'{name}' is no command of {path}: {did_you_mean(name, there)}as a job run {', '.join(there)}"
            )
        command, path = command.commands[name], f"{path} {name}"
    command.make_context(path.removeprefix("medsynth "), rest, parent=parent)


def _check(server: "JobServer", tracking_uri: str | None) -> None:
    """Raise UserError for what would end the job as soon as it began."""
    from cluster import doctor

    for check in (doctor.same_ray(server.ray_version), doctor.mlflow_server(tracking_uri)):
        if check.ok is False:
            raise UserError(f"{check.name}: {check.found}; {check.remedy} (--no-check submits all the same)")


def _server(address: str | None) -> "JobServer":
    from cluster.jobs import JobServer, server_address

    return JobServer.connect(server_address(address))


def _follow(server: "JobServer", job: str) -> None:
    """Show the log to its end, and exit as the job did; Ctrl-C leaves the job alone."""
    from cluster.jobs import exit_code

    try:
        details = server.follow(job, lambda lines: typer.echo(lines, nl=False))
    except KeyboardInterrupt:
        console.print()
        _say(f"The job goes on. Its log: medsynth jobs logs {job} --follow; to stop it: medsynth jobs stop {job}")
        raise typer.Exit(0) from None
    if details.driver_exit_code is None and details.message and exit_code(details) == 1:  # it never began
        typer.echo(details.message, err=True)
    console.print(f"{_state(details)} after {_took(details)}")
    raise typer.Exit(exit_code(details))


def _say(line: str) -> None:
    console.print(visible(line), soft_wrap=True, markup=False)


def _state(job: "JobDetails", width: int = 0) -> str:
    state = job.status.value
    return f"[{COLOURS.get(state, 'default')}]{state:{width}}[/]"


def _command(job: "JobDetails") -> str:
    """As the user gave it; of a job submitted by other means, its entry point."""
    return (job.metadata or {}).get("command", job.entrypoint)


def _began(job: "JobDetails") -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.start_time / 1000)) if job.start_time else ""


def _took(job: "JobDetails") -> str:
    if not job.start_time:
        return ""
    end = job.end_time / 1000 if job.end_time else time.time()
    return str(timedelta(seconds=max(0, round(end - job.start_time / 1000))))


def _last_lines(log: str) -> str:
    return "\n".join(log.splitlines()[-STATUS_LINES:])


def _continuation(job: "JobDetails", log: str) -> str:
    """The medsynth command that goes on with a job: the last that it has named itself, or its own; none of others."""
    commands = [_command(job), *re.findall(r"(?:[Tt]o go on|to resume it): (medsynth .+)", log)]
    return commands[-1].removeprefix("medsynth ") if commands[-1].startswith("medsynth ") else ""


def _record(job: "JobDetails") -> str:
    """Where the job's run is to be seen; in words if it is nowhere yet."""
    from cluster.jobs import tracking_uri_of
    from cluster.tracking import default_tracking_uri, runs_of_job

    uri = tracking_uri_of(job) or default_tracking_uri()
    if not uri.startswith("http"):
        return "no server: MLFLOW_TRACKING_URI names none"
    try:
        runs = runs_of_job(job.submission_id or "", uri)
        return runs[0].ui_command() if runs else "nothing recorded yet"
    except UserError as error:
        return str(error)
