"""Which code runs, and as which job of a cluster."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

COMMIT_VARIABLE = "MEDSYNTH_GIT_COMMIT"
"""Tells a job, whose folder is no checkout, from which commit it was uploaded."""
JOB_VARIABLE = "MEDSYNTH_JOB"
"""Tells a job its own id."""
JOB_TAG = "ray_job"
"""The MLflow tag of a run: the job that began it, or went on with it last."""


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


def job_tags() -> Mapping[str, str]:
    """What to tag an MLflow run with so that it is found by its job; nothing outside a job."""
    job = os.environ.get(JOB_VARIABLE)
    return {JOB_TAG: job} if job else {}
