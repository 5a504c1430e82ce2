"""Jobs of a Ray cluster: what is uploaded, in which environment it runs, and how it is followed and stopped."""

import asyncio
import logging
import os
import posixpath
import re
import secrets
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from aiohttp import ClientError
from ray._private.runtime_env import packaging
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient, JobType

from cluster.errors import UserError, did_you_mean, first_line
from cluster.knock import knock
from cluster.provenance import COMMIT_VARIABLE, git_commit
from cluster.runtime import FORWARDED_VARIABLES
from cluster.terminal import command_line

EXCLUDES = (
    *(".git", ".venv", "venv", "*.egg-info", "/build", "/dist", "__pycache__", ".*_cache", ".hypothesis"),
    *("/data", "/demo", "/runs", "/shards", "/samples", "/evaluations", "/promotions", "/sweeps-out"),
    *("/mlruns", "/mlartifacts", "*.db", "*.db-*", "*.tar", "*.zip", "*.safetensors", "*.ckpt", "*.pt"),
    *("/.medsynth-stack", ".env", "*.pem"),  # secrets
)
"""What is never uploaded, by the patterns of .gitignore; what .gitignore and .rayignore name is not either."""
UPLOAD_BYTES = 100 * 2**20
"""The job server refuses a larger upload, only after it was sent."""
SECRETIVE = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|KEY")
"""Variables of such names seem to be secrets."""
STOP_SECONDS = 600
"""How long a job may take to save its state before Ray ends it by force."""
TRACKING = "MLFLOW_TRACKING_URI"
CONNECT_SECONDS, POLL_SECONDS = 5, 0.5

# They tell of every request, and that .git is left out.
for _module in ("dashboard_sdk", "job.sdk"):
    logging.getLogger(f"ray.dashboard.modules.{_module}").setLevel(logging.ERROR)
for _module in ("packaging", "working_dir"):
    logging.getLogger(f"ray._private.runtime_env.{_module}").setLevel(logging.ERROR)
_silent = logging.getLogger(f"{__name__}.silent")
_silent.setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Submission:
    """A command as a job, before anything is sent."""

    id: str
    entrypoint: str
    runtime_env: Mapping[str, Any]
    metadata: Mapping[str, str]
    variables: Sequence[str]  # names of those that the job is given from this environment
    upload_bytes: int
    notices: Sequence[str]  # what may turn out to be a mistake, in sentences


def prepare(
    words: Sequence[str],
    *,
    folder: Path,
    variables: Sequence[str] = (),
    environment: Mapping[str, str] = os.environ,
) -> Submission:
    """`medsynth WORDS` as a job that runs in a copy of `folder`, with `variables` of the environment beside the usual.

    A training that names no run is given one: the same command, submitted again, then goes on with it.

    Raises UserError for a folder that is too large, a recipe that is not in it, and a variable that is not set or
    makes no sense elsewhere.
    """
    files = files_to_upload(folder)
    check_size(folder, files)
    check_named(words, folder, files)
    job = job_id(words)
    if words[0] == "train" and not any(word == "--run" or word.startswith("--run=") for word in words):
        words = [*words, "--run", job]
    commit = git_commit(folder)
    given = forwarded(variables, environment)
    notices = []
    if TRACKING not in given:
        notices.append(f"{TRACKING} is not set: if the cluster does not set it either, the job's record is lost.")
    if shown := [name for name in variables if SECRETIVE.search(name)]:
        notices.append(
            f"{', '.join(shown)}: Ray shows the value to all who may use the cluster, and writes it into its "
            "logs there; a secret is safer set on the cluster's machines."
        )
    if "medsynth.py" not in files:
        notices.append(f"{folder} has no medsynth.py: the job runs the medsynth that the cluster has installed.")
    return Submission(
        id=job,
        entrypoint=shlex.join(["python", "-m", "medsynth", *words]),
        runtime_env={
            "working_dir": str(folder),
            "excludes": list(EXCLUDES),
            # The second is read by the process of Ray that looks after the job, which has the job's environment.
            "env_vars": {COMMIT_VARIABLE: commit, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **given},
        },
        metadata={
            "command": command_line(["medsynth", *words]),
            "git_commit": commit,
            "medsynth_version": _version(),
            "run": _run_of(words),
        },
        variables=sorted(given),
        upload_bytes=sum(files.values()),
        notices=notices,
    )


def job_id(words: Sequence[str]) -> str:
    """A new name that says what the job does and when it was made: train-msdm-demo-20261125-0412-x7f3."""
    what = [word for word in words[:2] if not word.startswith("-")]
    if len(what) > 1 and what[1].endswith((".yaml", ".yml")):
        what[1] = PurePosixPath(what[1]).stem
    name = re.sub(r"[^\w.]+", "-", "-".join(what)).strip("-")[:60]
    return f"{name}-{datetime.now(UTC):%Y%m%d-%H%M}-{secrets.token_hex(2)}"


def forwarded(variables: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that a job is given: those named, and those that name servers, never credentials.

    Raises UserError, which shows no value, for one that is not set or names what only this machine has.
    """
    for name in variables:
        if "=" in name:
            raise UserError(f"--env {name.partition('=')[0]}: give the name alone, the value is that of here")
        if name not in environment:
            raise UserError(f"--env {name}: it is not set here; export it first")
    given = {name: environment[name] for name in (*FORWARDED_VARIABLES, *variables) if name in environment}
    if TRACKING not in given and (uri := environment.get(TRACKING)):
        if uri.startswith(("sqlite:", "file:")) or ":" not in uri:
            raise UserError(
                f"{TRACKING} names a file of this machine, which the cluster does not have: name a server by "
                f"http://…, or go without it: env -u {TRACKING} medsynth submit …"
            )
        if urlsplit(uri).password:
            raise UserError(
                f"{TRACKING} has a password in it, which Ray would show to all who may use the cluster: set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on the cluster's machines instead, "
                f"or insist: --env {TRACKING}"
            )
        given[TRACKING] = uri
    return given


def files_to_upload(folder: Path) -> dict[str, int]:
    """Name and bytes of every file of the folder that Ray would upload, by Ray's own reading of the ignore files.

    Raises UserError if there is no such folder, or it cannot be read.
    """
    folder = folder.absolute()
    sizes: dict[str, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size

    if not folder.is_dir():
        raise UserError(f"there is no folder {folder} to upload: give another --working-dir")
    excluded = packaging._get_excludes(folder, list(EXCLUDES))
    try:
        packaging._dir_travel(folder, [excluded], note, include_gitignore=True, logger=_silent)
    except OSError as error:
        raise UserError(f"cannot read {error.filename} to upload it: {error.strerror}; name it in .rayignore") from None
    return sizes


def check_size(folder: Path, files: Mapping[str, int]) -> None:
    """Raise UserError, naming the largest files, if the job server would refuse an upload of these."""
    total = sum(files.values())
    if total <= UPLOAD_BYTES:
        return
    largest = sorted(files, key=lambda name: files[name], reverse=True)[:3]
    named = ", ".join(f"{name} ({mebibytes(files[name])})" for name in largest)
    raise UserError(
        f"{folder} has {mebibytes(total)} to upload, the job server takes {mebibytes(UPLOAD_BYTES)}; the largest: "
        f"{named}: move data to shared storage, or name it in .gitignore or .rayignore"
    )


def check_named(words: Sequence[str], folder: Path, files: Mapping[str, int]) -> None:
    """Raise UserError for a YAML file, such as a recipe, that a command names and the job would not find.

    Of what is at an absolute path, or at a URI, only the cluster can say whether it is there.
    """
    for word in words:
        name = posixpath.normpath(word)
        if not name.endswith((".yaml", ".yml")) or "=" in word or "://" in word or name.startswith("/"):
            continue
        if name in files:
            continue
        if (folder / name).exists():
            raise UserError(
                f"{word} is not uploaded: it is outside {folder}, or excluded there (see .gitignore and .rayignore); "
                "put it elsewhere, or on shared storage"
            )
        there = [known for known in files if known.endswith((".yaml", ".yml"))]
        raise UserError(
            f"there is no {word} in {folder}: {did_you_mean(name, there)}"
            "a job finds files of the folder that is uploaded (--working-dir), and shared storage"
        )


def mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def server_address(given: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """The job server's address: the one given, RAY_API_SERVER_ADDRESS or RAY_ADDRESS. Raises UserError if none is."""
    address = given or environment.get("RAY_API_SERVER_ADDRESS") or environment.get("RAY_ADDRESS")
    if not address:
        raise UserError("name the cluster's job server: --address http://HOST:8265, or RAY_API_SERVER_ADDRESS")
    if not re.match(r"https?://[^/]", address):
        raise UserError(
            f"{address} is no address of a job server: give the http:// address of the cluster's dashboard, "
            "such as http://HOST:8265, with --address or RAY_API_SERVER_ADDRESS"
        )
    return address.rstrip("/")


@dataclass(frozen=True)
class JobServer:
    """The job server of a cluster. Its methods raise UserError when it does not answer, or knows no such job."""

    address: str
    client: JobSubmissionClient

    @classmethod
    def connect(cls, address: str) -> "JobServer":
        try:  # Ray itself would wait for minutes
            knock(address, CONNECT_SECONDS)
        except (OSError, ValueError) as error:
            raise UserError(
                f"no job server answers at {address} ({getattr(error, 'strerror', None) or error}): start the cluster "
                "with 'ray start --head', and check address, port (8265) and tunnel"
            ) from None
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # or Ray would rather believe RAY_ADDRESS than its argument
        with _explained(address):
            return cls(address, JobSubmissionClient(address))

    @property
    def ray_version(self) -> str:
        """Of the cluster."""
        return self.client._server_ray_version or "unknown"

    def submit(self, submission: Submission) -> None:
        """Upload the folder and have the job started."""
        with _explained(self.address):
            self.client.submit_job(
                entrypoint=submission.entrypoint,
                submission_id=submission.id,
                runtime_env=dict(submission.runtime_env),
                metadata=dict(submission.metadata),
            )

    def jobs(self) -> list[JobDetails]:
        """All that were submitted, the latest last."""
        with _explained(self.address):
            found = self.client.list_jobs()
        return sorted((job for job in found if job.type is JobType.SUBMISSION), key=lambda job: job.start_time or 0)

    def job(self, job: str) -> JobDetails:
        with _explained(self.address, job):
            return self.client.get_job_info(job)

    def log(self, job: str) -> str:
        """All that the job has printed so far."""
        with _explained(self.address, job):
            return self.client.get_job_logs(job)

    def follow(self, job: str, show: Callable[[str], None]) -> JobDetails:
        """Show what the job prints, from its beginning until it has ended; it goes on if this is interrupted."""

        async def tail() -> None:
            async for lines in self.client.tail_job_logs(job):
                show(lines)

        self.job(job)
        with _explained(self.address, job):
            asyncio.run(tail())
        return self.ended(job)

    def ended(self, job: str) -> JobDetails:
        """The job when it has ended, which is waited for."""
        while not (details := self.job(job)).status.is_terminal():
            time.sleep(POLL_SECONDS)
        return details

    def stop(self, job: str) -> bool:
        """Ask the job to save its state and to stop; False if it was not running."""
        with _explained(self.address, job):
            return self.client.stop_job(job)


def exit_code(job: JobDetails) -> int:
    """What its command would have exited with in a terminal: 130 if it was stopped."""
    if job.status == JobStatus.SUCCEEDED:
        return 0
    return 130 if job.status == JobStatus.STOPPED else job.driver_exit_code or 1


def tracking_uri_of(job: JobDetails) -> str | None:
    """The MLflow server that the job was given, if any."""
    env_vars = (job.runtime_env or {}).get("env_vars") or {}
    uri: str | None = env_vars.get(TRACKING)
    return uri


def _run_of(words: Sequence[str]) -> str:
    """The run that a command names, or none."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word in ("--run", "--resume"):
            return following
        if word.startswith(("--run=", "--resume=")):
            return word.partition("=")[2]
    return ""


def _version() -> str:
    try:
        return metadata.version("medsynth")
    except metadata.PackageNotFoundError:
        return "unknown"


@contextmanager
def _explained(address: str, job: str | None = None) -> Iterator[None]:
    """Turn what Ray's client raises into one line."""
    try:
        yield
    except AuthenticationError:
        raise UserError(
            f"the job server at {address} asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH to that of the cluster"
        ) from None
    except (ClientError, OSError, RuntimeError, ValueError, KeyError) as error:
        message = first_line(error)
        if job and "404" in message:
            raise UserError(f"{address} knows no job '{job}': see 'medsynth jobs list'") from None
        if "404" in message:
            raise UserError(f"{address} answers, but is no job server: give the address of Ray's dashboard") from None
        raise UserError(f"the job server at {address} refuses: {message}") from None
