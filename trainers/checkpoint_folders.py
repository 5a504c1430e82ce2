"""The folders that checkpoints lie in: step-000040-of-2 is that of step 40, written by two ranks."""

import re
from collections.abc import Iterable

CHECKPOINT = re.compile(r"step-(\d+)-of-(\d+)")


def checkpoint_folder(step: int, num_ranks: int) -> str:
    """The name of a checkpoint's folder: ranks of another number must never find their files beside half of these."""
    return f"step-{step:06d}-of-{num_ranks}"


def complete_checkpoints(names: Iterable[str]) -> list[str]:
    """Folders of checkpoints of which no rank's file is missing, among the files of a stage's folder.

    One whose upload was cut off is no checkpoint, though it may be the latest.
    """
    files: dict[str, set[str]] = {}
    for folder, _, name in (name.partition("/") for name in names):
        files.setdefault(folder, set()).add(name)
    return [
        folder
        for folder, there in files.items()
        if (match := CHECKPOINT.fullmatch(folder))
        and ("state.json" in there or sum(name.startswith("rank-") for name in there) == int(match[2]))
    ]
