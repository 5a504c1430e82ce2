"""The digests of a folder's files, as lines that `sha256sum --check` reads, to know later that they are the same."""

import hashlib
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cluster.digests import file_digest
from cluster.errors import UserError

SUMS = "SHA256SUMS"
MLFLOW_META = "registered_model_meta"  # a file that MLflow adds to copies that it serves
REMEDY = "restore its files, or train or register it again"


def checksums(folders: Sequence[Path]) -> str:
    """A line for each file below the folders, which are one folder to whoever reads them, in the order of names."""
    paths = {path.relative_to(folder).as_posix(): path for folder in folders for path in _files(folder)}
    with ThreadPoolExecutor() as pool:
        digests = pool.map(file_digest, paths.values())
        lines = [f"{digest}  {name}\n" for name, digest in zip(paths, digests, strict=True)]
    return "".join(sorted(lines, key=lambda line: line[66:]))


def digests_in(sums: str) -> dict[str, str]:
    """The SHA-256 of each file that the lines name, by its name."""
    return {line[66:]: line[:64] for line in sums.splitlines()}


def digest_of(sums: str) -> str:
    """SHA-256 of the lines: one digest for the whole folder."""
    return hashlib.sha256(sums.encode()).hexdigest()


def check_folder(folder: Path, sums: str, uri: str, *, ignoring: Collection[str] = ()) -> None:
    """Raise UserError, which calls the folder `uri`, unless its files are those of `sums`, byte for byte.

    One that `sums` does not name is refused too, for it may take the place of one that it does; but not those to be
    ignored, nor what Python keeps beside code that it ran.
    """
    expected, found = digests_in(sums), digests_in(checksums([folder]))
    for name in sorted(expected.keys() | found.keys()):
        if name in ignoring or "__pycache__" in name.split("/"):
            continue
        if name not in found:
            raise UserError(f"{uri} is not what it was: {name} is missing, of SHA-256 {expected[name]}; {REMEDY}")
        if name not in expected:
            raise UserError(f"{uri} is not what it was: {name} was not there, SHA-256 {found[name]}; {REMEDY}")
        if found[name] != expected[name]:
            raise UserError(
                f"{uri} is not what it was: {name} has SHA-256 {found[name]}, expected {expected[name]}; {REMEDY}"
            )


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
