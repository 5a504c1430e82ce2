"""SHA-256 of large local files, computed once as long as they stay as they are.

Kept in medsynth/digests/HASH-OF-PATH.json below $XDG_CACHE_HOME, or ~/.cache: a note a file, whole or not there.
"""

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from cluster import storage

KEPT_FROM_BYTES = 2**20  # smaller files are read as fast as a note on them
SETTLED_SECONDS = 2.0  # clocks of file systems tick this slowly: a file younger than that may change without showing it


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal.

    Read again unless its size, both its times and its inode are those noted when it was read last: a change of content
    sets the time of the last status change, which nobody can set back. What cannot be noted or read back is no error.
    """
    before = _identity(path)
    if before["size"] < KEPT_FROM_BYTES:
        return _read(path)
    note = _folder() / f"{hashlib.sha256(os.fsencode(path.absolute())).hexdigest()}.json"
    with suppress(OSError, ValueError):
        known = json.loads(note.read_bytes())
        if isinstance(known, dict) and known.get("identity") == before:
            return str(known["sha256"])
    started = time.time()
    digest = _read(path)
    is_settled = max(before["mtime_ns"], before["ctime_ns"]) < (started - SETTLED_SECONDS) * 1e9
    if is_settled and _identity(path) == before:
        about = {"path": str(path.absolute()), "identity": before, "sha256": digest}
        with suppress(storage.StorageError):
            storage.write_bytes(str(note), json.dumps(about).encode())
    return digest


def _identity(path: Path) -> dict[str, int]:
    found = path.stat()
    return {
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
        "device": found.st_dev,
        "inode": found.st_ino,
    }


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder() -> Path:
    """Asked each time: XDG's rule is that an empty or relative value counts as none."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (named if named.is_absolute() else Path.home() / ".cache") / "medsynth" / "digests"
