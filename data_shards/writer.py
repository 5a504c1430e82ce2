"""From records to shards: check every image, split by group, shuffle, write; what is bad is named and counted.

    records -> checked (or quarantined) -> split and shuffled -> one piece of work a shard -> manifest

Same records and settings give the same bytes. The manifest comes last: until it is there the shards are unfinished,
and writing again completes them.
"""

import hashlib
import io
import json
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from cluster import storage
from cluster.errors import UserError
from cluster.progress import OnProgress
from data_shards import names
from data_shards.decode import FORMATS, ImageError, open_image, read_image
from data_shards.duplicates import Duplicate, find_duplicates, perceptual_hash
from data_shards.manifest import MANIFEST, Manifest, SampleEntry, ShardEntry, ShardIndex, index_name
from data_shards.parallel import Map, mapping, names_cluster
from data_shards.sample import Record, derive_seed

QUARANTINE = "quarantine.jsonl"
DUPLICATES = "duplicates.jsonl"
PASSED_THROUGH = {("JPEG", "RGB"): "jpg", ("JPEG", "L"): "jpg", ("PNG", "RGB"): "png", ("PNG", "L"): "png"}
NOT_FOUND = names.NOT_FOUND
NOT_SHARED = (
    "is not there on all machines of the cluster: keep images and --out on s3://, or in a folder that all of them share"
)
CHECKED_AT_ONCE = 64  # images of one task on a cluster: a second or so
NO_GROUPS = "each image is a group of its own"

Splits = Mapping[str, float]


class BadInputError(Exception):
    """Why a record goes into quarantine."""


@dataclass(frozen=True)
class Settings:
    """How shards are made of records."""

    name: str
    splits: Splits
    """Share of each split; shares are of groups, so counts of samples come near them."""
    samples_per_shard: int = 1000
    seed: int = 0
    resize: int | None = None
    """Shorter side in pixels to which larger images are reduced; None keeps the bytes of plain JPEG and PNG."""
    max_quarantined: float = 1.0
    """Share of the inputs that may be bad."""

    def __post_init__(self) -> None:
        for split in self.splits:
            names.check_split(split)
        names.check_set(self.name, list(self.splits))


@dataclass(frozen=True)
class Checked:
    """A record whose image was decoded once and found good."""

    key: str
    record: Record
    uri: str
    crc32: int
    conversion: str | None  # what the image had been, if it has to be converted
    perceptual_hash: bytes


@dataclass(frozen=True)
class Piece:
    """What one shard will hold."""

    name: str
    split: str
    samples: Sequence[Checked]


def write_shards(
    records: Iterable[Record],
    out: str,
    settings: Settings,
    *,
    source: Mapping[str, str],
    overwrite: bool = False,
    num_workers: int = 4,
    on_progress: OnProgress = lambda what, done, total: None,
) -> Manifest:
    """Write shards, quarantine.jsonl, duplicates.jsonl and manifest.json to `out` and return the manifest.

    Images are checked and shards written by `num_workers` threads, or by the cluster that RAY_ADDRESS names: the bytes
    are the same. A second call with the same input writes nothing. Raises UserError if `out` holds shards of other
    input or settings (unless `overwrite`), if a split is empty or cannot name files, or if too many inputs are bad.
    """
    if names_cluster():
        from cluster.runtime import check_outlives_job

        check_outlives_job(out, "--out ")
    out = storage.absolute(out)
    storage.check_writable(out)
    inputs = [_normal(record) for record in records]
    _check_splits(inputs, settings)
    names.listing.cache_clear()
    with mapping(num_workers) as apply:
        checked, quarantine = _check_all(inputs, settings, apply, on_progress)
        try:
            if not checked:
                raise UserError(f"none of {len(inputs)} inputs can be used: {_first(quarantine)}")
            parts = _split(checked, settings)
        except UserError:
            if quarantine and not storage.exists(storage.join(out, MANIFEST)):
                _write_lines(storage.join(out, QUARANTINE), quarantine)  # often it is why
            raise
        fingerprint = _fingerprint(parts, settings)
        if existing := _finished(out, fingerprint, overwrite):
            on_progress("shards already written", len(existing.shards), len(existing.shards))
            return existing
        pieces = list(_pieces(parts, settings))
        shards: list[ShardEntry] = []
        for shard in apply(partial(write_shard, out=out, resize=settings.resize), pieces):
            _check_shared(storage.join(out, shard.name))
            shards.append(shard)
            on_progress("writing shards", len(shards), len(pieces))
    _tidy(out, settings)
    duplicates = _duplicates(parts)
    _write_lines(storage.join(out, QUARANTINE), quarantine)
    _write_lines(storage.join(out, DUPLICATES), [asdict(duplicate) for duplicate in duplicates])
    manifest = Manifest(
        name=settings.name,
        source={**source, "fingerprint": fingerprint},
        split_rule=_split_rule(parts, settings),
        groups={split: len({_group(sample) for sample in part}) for split, part in parts.items()},
        captions={split: sum(len(s.record.captions) for s in part) for split, part in parts.items()},
        licences=Counter(s.record.licence or "not stated" for part in parts.values() for s in part),
        quarantined=Counter(q["kind"] for q in quarantine),
        conversions=Counter(s.conversion for part in parts.values() for s in part if s.conversion),
        near_duplicates=Counter(f"{found.split}-{found.other_split}" for found in duplicates),
        shards=tuple(shards),
    )
    manifest.save(out)
    return manifest


def write_shard(piece: Piece, out: str, resize: int | None) -> ShardEntry:
    """Write one shard, whole or not at all, and describe it; one made of the same before is only described."""
    made_of = digest_of([_content(sample) for sample in piece.samples], resize)
    return ShardIndex.finished(out, name=piece.name, split=piece.split, made_of=made_of) or write_tar(
        (_members(sample, resize) for sample in piece.samples), out, name=piece.name, split=piece.split, made_of=made_of
    )


def write_tar(
    samples: Iterable[Mapping[str, str | bytes]], out: str, *, name: str, split: str, made_of: str
) -> ShardEntry:
    """Write a shard of samples, each its `__key__` and its members by ending, then its index, and describe it."""
    from webdataset.writer import TarWriter  # it imports torch, which takes a second

    entries: list[SampleEntry] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        with path.open("w+b") as file:
            # Fixed owner and time: the same samples give the same bytes.
            with TarWriter(file, user="", group="", mtime=0, encoder=False, format="PAX_FORMAT") as tar:
                for sample in samples:
                    start = tar.tarstream.offset
                    tar.write(sample)
                    entries.append(SampleEntry(str(sample["__key__"]), start, tar.tarstream.offset - start, 0))
            entries = [_with_crc(entry, file) for entry in entries]
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        index = ShardIndex(made_of=made_of, num_bytes=path.stat().st_size, sha256=sha256, samples=tuple(entries))
        if storage.exists(index_uri := storage.join(out, index_name(name))):
            storage.delete(index_uri)  # an index never speaks of another shard than is there
        storage.upload_file(path, storage.join(out, name))
    return index.save(out, name=name, split=split)


def digest_of(*parts: Any) -> str:
    """SHA-256 of what can be written as JSON."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# --- checking ---


def _check_all(
    inputs: Sequence[Record],
    settings: Settings,
    apply: Map,
    on_progress: OnProgress,
) -> tuple[list[Checked], list[dict[str, str]]]:
    """The good samples, and for each bad one its source id, the kind of its fault, and the whole reason."""
    results = list(_checks(inputs, apply, on_progress))
    keys = _keys([result for result in results if isinstance(result, Checked)])
    checked: list[Checked] = []
    quarantine: list[dict[str, str]] = []
    taken: set[str] = set()
    for record, result in zip(inputs, results, strict=True):
        if isinstance(result, Checked):
            key = keys.pop(_identity(result), None)
            if key is not None and key not in taken:
                taken.add(key)
                checked.append(replace(result, key=key))
                continue
            result = BadInputError(f"duplicate key: another image is '{key or result.key}' already")
        reason = str(result)
        quarantine.append({"source_id": record.source_id, "kind": reason.partition(":")[0], "reason": reason})
    if checked and len(quarantine) > settings.max_quarantined * len(inputs):
        raise UserError(
            f"{len(quarantine)} of {len(inputs)} inputs are bad, more than --max-quarantined "
            f"{settings.max_quarantined:g} allows: {_first(quarantine)}"
        )
    return checked, quarantine


def _first(quarantine: Sequence[Mapping[str, str]]) -> str:
    return "; ".join(f"{q['source_id'] or '(no name)'}: {q['reason']}" for q in quarantine[:3])


def _checks(inputs: Sequence[Record], apply: Map, on_progress: OnProgress) -> Iterator[Checked | BadInputError]:
    for done, (record, result) in enumerate(zip(inputs, apply(_check, inputs, CHECKED_AT_ONCE), strict=True), start=1):
        if isinstance(result, BadInputError) and str(result).partition(":")[0] == NOT_FOUND:
            _check_missing(record)
        yield result
        on_progress("checking images", done, len(inputs))


def _keys(checked: Sequence[Checked]) -> dict[tuple[str, str, int], str]:
    """The key of each sample by its identity, whatever the order of the table. Names that would have one key, as they
    differ in an ending or stand in several splits, get a digest each; of those with the same bytes one gets a key."""
    alike: dict[str, list[tuple[str, str, int]]] = {}
    for sample in checked:
        alike.setdefault(sample.key, []).append(_identity(sample))
    keys: dict[tuple[str, str, int], str] = {}
    for key, identities in alike.items():
        distinct: dict[int, tuple[str, str, int]] = {}
        for identity in sorted(identities, key=lambda one: (len(one[0]), one)):
            distinct.setdefault(identity[-1], identity)
        for source_id, split, crc32 in distinct.values():
            keys[source_id, split, crc32] = names.distinct_key(key, source_id, split) if len(distinct) > 1 else key
    return keys


def _identity(sample: Checked) -> tuple[str, str, int]:
    return sample.record.source_id, sample.record.split or "", sample.crc32


def _normal(record: Record) -> Record:
    """The same record for whatever way its folder and its file are named."""
    folder = storage.absolute(record.folder)
    if record.part is not None or record.fault:
        return replace(record, folder=folder)
    return replace(record, folder=folder, source_id=names.normal(record.source_id, folder))


def _check_splits(inputs: Sequence[Record], settings: Settings) -> None:
    """Raise UserError for a split that cannot name files."""
    splits = {record.split for record in inputs if record.split and not _fault_of_text(record)}
    for split in sorted(splits):
        names.check_split(split)
    names.check_set(settings.name, sorted(splits))


def _check(record: Record) -> Checked | BadInputError:
    try:
        if record.fault:
            raise BadInputError(record.fault)
        if not record.captions:
            raise BadInputError("empty caption")
        if fault := _fault_of_text(record):
            raise BadInputError(fault)
        uri = _locate(record)
        data = storage.read_bytes(uri, *(record.part or ()))
        image = read_image(data)
    except (BadInputError, ImageError) as problem:
        return BadInputError(str(problem))
    except storage.StorageError as problem:
        if storage.is_remote(record.folder):
            raise  # a fault of the server or the credentials, not of this image
        return BadInputError(f"unreadable: {problem}")
    perceptual = perceptual_hash(Image.fromarray(image.pixels))
    return Checked(names.key_of(record.source_id), record, uri, zlib.crc32(data), image.conversion, perceptual)


def _fault_of_text(record: Record) -> str | None:
    """JSON may escape half of a character (\\ud800), of which no UTF-8 can be written, and the end of C's strings."""
    texts = [("caption", caption) for caption in record.captions]
    texts += [("file name", record.source_id), ("group", record.group or "")]
    texts += [("licence", record.licence or ""), ("split", record.split or "")]
    for what, text in texts:
        if "\0" in text:
            return f"unreadable text: its {what} holds a NUL character"
        try:
            text.encode()
        except UnicodeEncodeError:
            return f"unreadable text: its {what} holds half of a character"
    return None


def _locate(record: Record) -> str:
    """The URI of the image's file, which never leaves the record's folder."""
    if not record.source_id:
        raise BadInputError("no file name")
    if record.part is not None:
        return record.folder
    try:
        uri = names.find(record.folder, record.source_id)
    except names.NameProblemError as problem:
        raise BadInputError(str(problem)) from None
    if not storage.is_remote(uri):
        folder = storage.local_path(record.folder).resolve()
        if not storage.local_path(uri).resolve().is_relative_to(folder):
            raise BadInputError("path leaves the image folder: it is a link")
    return uri


def _check_missing(record: Record) -> None:
    """Raise UserError if the whole folder is missing, or the file only on machines of the cluster other than this."""
    if not any(names.listing(record.folder)):
        raise UserError(f"there is no folder of images at {record.folder}, or nothing in it: name theirs with --images")
    if names_cluster() and not storage.is_remote(record.folder):
        with suppress(BadInputError):
            raise UserError(f"{_locate(record)} {NOT_SHARED}")


def _check_shared(uri: str) -> None:
    """Raise UserError for a shard that another machine of the cluster wrote to a disk of its own."""
    if names_cluster() and not storage.exists(uri):
        raise UserError(f"{uri} {NOT_SHARED}")


# --- splitting ---


def _group(sample: Checked) -> str:
    return sample.record.group or f"image {sample.key}"


def _split(checked: Sequence[Checked], settings: Settings) -> dict[str, list[Checked]]:
    """Each split's samples, shuffled. A group is drawn into one split by its own hash, whatever else there is."""
    parts: dict[str, list[Checked]] = {split: [] for split in settings.splits}
    stated: dict[str, str] = {}
    for sample in checked:
        if split := sample.record.split:
            other = stated.setdefault(_group(sample), split)
            if other != split:
                raise UserError(
                    f"group '{_group(sample)}' stands in the splits {' and '.join(sorted((split, other)))}, so one "
                    "would leak into the other: mend the table, or draw the split without --split-column"
                )
    for sample in checked:
        split = stated.get(_group(sample)) or _drawn_split(sample, settings)
        parts.setdefault(split, []).append(sample)
    is_drawn = any(not sample.record.split for sample in checked)
    for split, part in parts.items():
        if not part and is_drawn and settings.splits[split] > 0:
            counts = ", ".join(f"{name} {len(samples)}" for name, samples in parts.items())
            raise UserError(
                f"split '{split}' is empty ({counts} samples): give it a larger share with --split, "
                "or more groups of images"
            )
        part.sort(key=lambda sample: derive_seed("order", settings.seed, sample.key))
    return {split: part for split, part in parts.items() if part}


def _drawn_split(sample: Checked, settings: Settings) -> str:
    group = sample.record.group or f"image {names.drawn_name(sample.record.source_id)}"
    if not settings.splits:
        raise UserError(f"{group} states no split: fill the split column, or give shares with --split")
    total = sum(settings.splits.values())
    draw = derive_seed("split", settings.seed, group) / 2**63 * total
    for split, share in settings.splits.items():
        draw -= share
        if draw < 0:
            return split
    return list(settings.splits)[-1]


def _duplicates(parts: Mapping[str, Sequence[Checked]]) -> list[Duplicate]:
    """What would leak from one split to another, though no group does."""
    samples = [(split, sample) for split, part in parts.items() for sample in part]
    return find_duplicates(
        [sample.key for _, sample in samples],
        [split for split, _ in samples],
        [sample.perceptual_hash for _, sample in samples],
    )


def _split_rule(parts: Mapping[str, Sequence[Checked]], settings: Settings) -> str:
    samples = [sample for part in parts.values() for sample in part]
    if all(sample.record.split for sample in samples):
        return "as stated by the data set"
    shares = ", ".join(f"{split} {share:g}" for split, share in settings.splits.items())
    groups = "groups" if any(sample.record.group for sample in samples) else NO_GROUPS
    return f"by hash of the group, seed {settings.seed}: {shares} ({groups})"


# --- writing ---


def _pieces(parts: Mapping[str, Sequence[Checked]], settings: Settings) -> Iterator[Piece]:
    for split, part in parts.items():
        for number, start in enumerate(range(0, len(part), settings.samples_per_shard)):
            name = f"{settings.name}-{split}-{number:06d}.tar"
            yield Piece(name, split, part[start : start + settings.samples_per_shard])


def _members(sample: Checked, resize: int | None) -> dict[str, str | bytes]:
    record = sample.record
    data = storage.read_bytes(sample.uri, *(record.part or ()))
    if zlib.crc32(data) != sample.crc32:
        raise UserError(f"{sample.uri} changed while shards were written; start again")
    about = {
        "captions": record.captions,
        "source_id": record.source_id,
        "group": _group(sample),
        "licence": record.licence,
    }
    ending, encoded = _encode(data, sample, resize)
    return {
        "__key__": sample.key,
        ending: encoded,
        "json": json.dumps(about, ensure_ascii=False, sort_keys=True).encode(),
    }


def _encode(data: bytes, sample: Checked, resize: int | None) -> tuple[str, bytes]:
    """The image as it came if it is a plain JPEG or PNG of the wanted size, else as a lossless 8-bit RGB PNG."""
    if sample.conversion is None:
        kind = Image.open(io.BytesIO(data), formats=FORMATS)
        if resize is None or min(kind.size) <= resize:
            return PASSED_THROUGH[str(kind.format), kind.mode], data
    image = open_image(data)
    if resize is not None and min(image.size) > resize:
        scale = resize / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
    png = io.BytesIO()
    image.save(png, "PNG")
    return "png", png.getvalue()


def _write_lines(uri: str, documents: Iterable[Mapping[str, Any]]) -> None:
    storage.write_bytes(uri, "".join(json.dumps(document) + "\n" for document in documents).encode())


def _tidy(out: str, settings: Settings) -> None:
    """Remove files that a killed process was about to give their names."""
    lists = "|".join(re.escape(name) for name in (QUARANTINE, DUPLICATES, MANIFEST, ".writable"))
    half_written = re.compile(rf"\.({re.escape(settings.name)}-[^/]+-\d{{6}}\.[^/]+|{lists})\.\w{{8}}")
    for name in storage.list_files(out):
        if half_written.fullmatch(name):
            storage.delete(storage.join(out, name))


def _with_crc(entry: SampleEntry, file: io.BufferedRandom) -> SampleEntry:
    file.seek(entry.offset)
    return entry._replace(crc32=zlib.crc32(file.read(entry.length)))


def _fingerprint(parts: Mapping[str, Sequence[Checked]], settings: Settings) -> str:
    """Equal for equal samples and settings: what decides whether there is anything to write."""
    content = [[split, _content(sample)] for split, part in parts.items() for sample in part]
    how = [settings.name, settings.samples_per_shard, settings.seed, settings.resize, dict(settings.splits)]
    return digest_of(content, how)


def _content(sample: Checked) -> list[Any]:
    """What a sample's members follow from."""
    record = sample.record
    return [sample.key, sample.crc32, record.captions, record.source_id, record.group, record.licence]


def _finished(out: str, fingerprint: str, overwrite: bool) -> Manifest | None:
    if not storage.exists(storage.join(out, MANIFEST)):
        return None
    existing = Manifest.load(out)
    if existing.source.get("fingerprint") == fingerprint:
        return existing
    if not overwrite:
        raise UserError(
            f"{out} holds shards made of other input or with other settings: choose another --out, "
            "or replace them with --overwrite"
        )
    shards = [name for shard in existing.shards for name in (shard.name, shard.index_name)]
    for name in [MANIFEST, *shards]:
        if storage.exists(storage.join(out, name)):
            storage.delete(storage.join(out, name))
    return None
