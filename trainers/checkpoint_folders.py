"""The folders that checkpoints lie in: step-000040-of-2 is that of step 40, written by two ranks.

Beside the files that a rank wrote lie their checksums, SHA256SUMS-00001 of rank 1, by which a checkpoint is known to be
whole. Ray Train keeps an index of a stage's checkpoints, which is followed as long as it is right.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cluster import storage
from cluster.checksums import checksums, digests_in
from cluster.documents import parsing, read_json
from cluster.errors import UserError

CHECKPOINT = re.compile(r"step-(\d+)-of-(\d+)")
SEAL = "SHA256SUMS-"  # with the rank's number
INDEX = "checkpoint_manager_snapshot.json"  # as Ray Train names it


def checkpoint_folder(step: int, num_ranks: int) -> str:
    """The name of a checkpoint's folder: ranks of another number must never find their files beside half of these."""
    return f"step-{step:06d}-of-{num_ranks}"


def step_of(checkpoint: str) -> int:
    """The step of a checkpoint, by its URI or the name of its folder."""
    match = CHECKPOINT.fullmatch(checkpoint.rstrip("/").rpartition("/")[2])
    assert match, checkpoint
    return int(match[1])


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


def seal(folder: Path, rank: int) -> None:
    """Put the checksums of all that a rank wrote beside it."""
    (folder / f"{SEAL}{rank:05d}").write_text(checksums([folder]))


def fault_of(checkpoint: str) -> str | None:
    """Why the checkpoint at this URI is not whole; None if each of its files is what its rank wrote.

    Reads all of it. Raises StorageError if it cannot be read now.
    """
    names = storage.list_files(checkpoint)
    seals = [name for name in names if name.startswith(SEAL)]
    expected: dict[str, str] = {}
    for seal in seals:
        expected |= digests_in(storage.read_bytes(storage.join(checkpoint, seal)).decode(errors="replace"))
    others = set(names) - set(seals)
    for name in sorted(expected.keys() | others):
        if name not in others:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} has no checksum"
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda name: storage.sha256(storage.join(checkpoint, name)), expected)
        for name, digest in zip(expected, digests, strict=True):
            if digest != expected[name]:
                return f"{name} is not what was written"
    return None if expected else "it is empty"


def resume_point(stage: str, ray_version: str, on_skipped: Callable[[str, str], None]) -> str | None:
    """URI of the checkpoint that the stage, whose folder is at this URI, goes on from; None leaves that to Ray Train.

    As long as all that Ray's index lists is there, and its latest checkpoint is whole, it is right: a newer one was
    never reported. Otherwise the index is removed, for Ray would not start with it, and the newest whole checkpoint is
    found. `on_skipped` is told of each that is passed over, and why.

    Raises UserError if there were checkpoints and none of them is whole.
    """
    files = storage.list_files(stage)
    has_index = INDEX in files
    faults = _index_faults(stage, files, ray_version) if has_index else {}
    if has_index and not faults:
        return None
    newest = ""
    for name in sorted(complete_checkpoints(files), key=lambda name: (step_of(name), name), reverse=True):
        fault = faults.get(name) or fault_of(storage.join(stage, name))
        if fault is None:
            newest = name
            break
        faults[name] = fault
    for name, fault in faults.items():
        on_skipped(name, fault)
    if newest:
        if has_index:
            storage.delete(storage.join(stage, INDEX))
        return storage.join(stage, newest)
    if not has_index:
        return None
    raise UserError(
        f"no checkpoint of {stage} is whole ({'; '.join(f'{name}: {fault}' for name, fault in faults.items())}): "
        f"restore one, remove {stage} to train this stage from its beginning, or choose another --run name"
    )


def _index_faults(stage: str, files: Sequence[str], ray_version: str) -> dict[str, str]:
    """Why Ray Train's index of a stage cannot be followed, by the name of what is wrong; empty if it can."""
    try:
        listed, latest = _indexed(storage.join(stage, INDEX), ray_version)
    except storage.StorageError:
        raise
    except UserError as error:
        return {INDEX: str(error)}
    complete = complete_checkpoints(files)
    faults = {name: "it is not there, or not all of it" for name in listed if name not in complete}
    # One of an earlier version has no checksums; Ray lists only what was uploaded.
    is_sealed = any(name.startswith(f"{latest}/{SEAL}") for name in files)
    if latest not in faults and is_sealed and (fault := fault_of(storage.join(stage, latest))):
        faults[latest] = fault
    return faults


def _indexed(index: str, ray_version: str) -> tuple[list[str], str]:
    """The names of the checkpoints that Ray Train's index lists, and of the latest.

    Raises UserError if the index is damaged, or of another version of Ray, which may not read it.
    """
    document = read_json(index)
    with parsing(index):
        if document["ray_version"] != ray_version:
            raise ValueError(f"it was written by Ray {document['ray_version']}")
        listed = [result["checkpoint_dir_name"] for result in document["checkpoint_results"]]
        latest = document["latest_checkpoint_result"]["checkpoint_dir_name"]
        if not all(isinstance(name, str) and CHECKPOINT.fullmatch(name) for name in [*listed, latest]):
            raise ValueError("it lists what are no checkpoints")
        if latest not in listed or len(document["checkpoint_report_indices"]) != len(listed):
            raise ValueError("it contradicts itself")
        return listed, latest
