"""Which code runs, and as which job of a Ray cluster."""

import json
import os
import subprocess
from pathlib import Path

COMMIT_VARIABLE = "MEDSYNTH_GIT_COMMIT"
"""Tells a job, whose folder is no checkout, from which commit it was uploaded."""
RAY_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""By which Ray tells the process of a job about it; those of its tasks and actors are not told."""


def git_commit(folder: Path | None = None) -> str:
    """The commit of the code that runs, or of another folder, with a + if it was changed since.

    'unknown' outside a checkout, unless the job that this is was told.
    """
    if folder is None and (told := os.environ.get(COMMIT_VARIABLE)):
        return told
    here = folder or Path(__file__).parent
    try:
        commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=here, text=True, stderr=subprocess.DEVNULL)
        changes = subprocess.check_output(["git", "status", "--porcelain", "-uno"], cwd=here, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + ("+" if changes.strip() else "")


def ray_job() -> str | None:
    """The id of the job that this process was started as; None where it was not."""
    told = json.loads(os.environ.get(RAY_JOB_VARIABLE, "{}"))
    job: str | None = told.get("metadata", {}).get("job_submission_id")
    return job
