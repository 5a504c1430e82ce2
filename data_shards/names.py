"""Names of images, splits and sets: which of them are one, which file they name, and the keys of samples.

A table names `p1/scan 1.jpg` -> its file, found over other spellings -> its key `p1_scan_1-c7371901`
"""

import hashlib
import re
import unicodedata
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from cluster import storage
from cluster.errors import UserError

ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".tif", ".tiff", ".bmp", ".dib", ".gif", ".webp"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c", ".dcm", ".dicom"),
)
"""Of the formats that are read. What follows a dot otherwise is part of a name: `scan1.1` is no `scan1`."""
SPLITS = {"valid": "validation", "val": "validation", "dev": "validation"}
NOT_FOUND = "file not found"
MAX_NAME_BYTES, MAX_PART_BYTES = 1024, 255  # of an object on S3, and of a file's name on usual disks
MAX_KEY_BYTES = 160
MAX_SPLIT_LENGTH = 64
MAX_SET_BYTES = 255 - len(b".-NNNNNN.tar.index.json.12345678")  # of NAME-SPLIT, which names files


class NameProblemError(Exception):
    """Why a name cannot be used; the message begins with the kind of its fault."""


# --- images ---


def without_ending(name: str) -> str:
    """The name without the ending of an image, if it has one."""
    stem, dot, ending = name.rpartition(".")
    return stem if dot and stem and f".{ending.lower()}" in ENDINGS else name


def normal(name: str, folder: str) -> str:
    """One spelling for all of one name: relative to `folder`, with `/`, in Unicode's composed form (NFC)."""
    name = unicodedata.normalize("NFC", name).replace("\\", "/")
    for base in _spellings(folder) if "/" in name else ():
        name = name.removeprefix(base)
    if "://" in name:
        return name
    root = "/" if name.startswith("/") else ""
    return root + "/".join(part for part in name.split("/") if part not in ("", "."))


@lru_cache(64)
def _spellings(folder: str) -> tuple[str, ...]:
    """How an absolute path to a file in `folder` may begin."""
    if storage.is_remote(folder):
        return (storage.join(unicodedata.normalize("NFC", folder), ""),)
    path = Path(storage.absolute(folder))
    paths = [unicodedata.normalize("NFC", f"{where}/") for where in (path, path.resolve())]
    return (*(f"file://{where}" for where in paths), *paths)


def find(folder: str, name: str) -> str:
    """The URI of the file in `folder` that a normal name means: that very file, or the one that differs in the case of
    its ending, in Unicode's form, or in the ending that the name lacks. Raises NameProblemError."""
    *parents, last = name.split("/")
    if "://" in name:
        raise NameProblemError(f"{NOT_FOUND}: it is a URL; download the images and name their files")
    if name.startswith("/") or ".." in (*parents, last) or re.match(r"~[^/]*/|[A-Za-z]:/", name):
        inside = listing(folder).alike(last)
        hint = f"'{min(inside)}' is in it" if inside else "name files relative to it, or give the one they are in"
        raise NameProblemError(f"path leaves the image folder: {hint}")
    if len(name.encode()) > MAX_NAME_BYTES or max(len(part.encode()) for part in (*parents, last)) > MAX_PART_BYTES:
        raise NameProblemError(f"{NOT_FOUND}: its name is too long for a file's")
    if storage.exists(uri := storage.join(folder, name)):
        return uri
    here = _subfolder(folder, parents)
    alike = listing(here).alike(last) if here else []
    meant = [other for other in alike if _means(last, other)]
    if here and len(meant) == 1:
        return storage.join(here, meant[0])
    if meant:
        raise NameProblemError(f"ambiguous name: it may be {' or '.join(sorted(meant))}; give the whole name")
    near = ["/".join((*parents, other)) for other in alike] or listing(folder).alike(last)
    raise NameProblemError(f"{NOT_FOUND}: there is '{min(near)}'" if near else NOT_FOUND)


def _subfolder(folder: str, parents: list[str]) -> str | None:
    for parent in parents:
        found = listing(folder).folders.get(parent)
        if found is None:
            return None
        folder = storage.join(folder, found)
    return folder


def _means(name: str, file: str) -> bool:
    """Whether a normal name may mean the file."""
    file = unicodedata.normalize("NFC", file)
    stem, files_stem = without_ending(name), without_ending(file)
    return stem == files_stem and (stem == name or file[len(files_stem) :].lower() == name[len(stem) :].lower())


class Listing(NamedTuple):
    """What is directly in a folder."""

    files: dict[str, list[str]]
    """By their names without endings, in one case and Unicode's composed form."""
    folders: dict[str, str]
    """By their names in the composed form."""

    def alike(self, name: str) -> list[str]:
        return self.files.get(_folded(name), [])


@lru_cache(256)
def listing(folder: str) -> Listing:
    """What is in `folder`, read once: call `listing.cache_clear` before it may have changed."""
    found = Listing({}, {})
    for name in storage.list_folder(folder):
        if name.endswith("/"):
            found.folders[unicodedata.normalize("NFC", name[:-1])] = name[:-1]
        else:
            found.files.setdefault(_folded(name), []).append(name)
    return found


def _folded(name: str) -> str:
    return without_ending(unicodedata.normalize("NFC", name)).casefold()


# --- keys ---


def key_of(source_id: str) -> str:
    """The key of a sample, which follows from its name alone: that without its ending, if WebDataset can hold it.

    WebDataset cuts names at the first dot, and slashes would make folders. A name in which such characters have to be
    replaced, or that is too long, gets a digest of it. Names that differ in an image's ending only have one key.
    """
    stem = without_ending(source_id)
    plain = _replaced(stem)
    return plain if plain == stem and len(plain.encode()) <= MAX_KEY_BYTES else distinct_key(plain, stem)


def drawn_name(source_id: str) -> str:
    """What an image without a group is drawn into a split by. Never to be changed, or images would move from one split
    to another when a data set is written again."""
    path = PurePosixPath(source_id.replace("\\", "/"))
    return _replaced(str(path.with_suffix("") if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".dcm") else path))


def _replaced(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)


def distinct_key(plain: str, *names: str) -> str:
    """A plain key, cut to a length that files may have, with a digest of what it stands for."""
    digest = hashlib.sha256("\0".join(names).encode()).hexdigest()[:8]
    return f"{plain.encode()[:MAX_KEY_BYTES].decode(errors='ignore')}-{digest}"


# --- splits and sets ---


def split_name(name: str) -> str:
    """The one name of a split that a table, a file or an option may write otherwise: `Train`, `val`, `dev`."""
    name = name.strip().lower()
    return SPLITS.get(name, name)


def check_split(name: str) -> None:
    """Raise UserError for a split whose name does not fit the names of files."""
    if not re.fullmatch(r"\w[\w-]*", name) or len(name) > MAX_SPLIT_LENGTH:
        shown = name if len(name) <= MAX_SPLIT_LENGTH else f"{name[:MAX_SPLIT_LENGTH]}…"
        raise UserError(
            f"split {shown!r} cannot name files: use at most {MAX_SPLIT_LENGTH} letters, digits, '-' and '_', such as "
            "'fold_1'"
        )


def check_set(name: str, splits: list[str]) -> None:
    """Raise UserError for a set whose name does not fit the names of files, with those of its splits."""
    if not re.fullmatch(r"[^./\\\x00-\x1f\x7f\ud800-\udfff][^/\\\x00-\x1f\x7f\ud800-\udfff]*", name):
        raise UserError(f"a set of shards cannot be called {name!r}, as its files begin with that: give another --name")
    longest = max(map(len, (f"{name}-{split}".encode() for split in splits)), default=0)
    if longest > MAX_SET_BYTES:
        raise UserError(f"the set's name with a split's has {longest} bytes, {MAX_SET_BYTES} fit: shorten --name")
