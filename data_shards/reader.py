"""Samples out of shards: by ranged reads, checked against the manifest, and from tar members to fields."""

import io
import logging
import struct
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TypeVar

from isal.isal_zlib import crc32
from pydantic_core import from_json

from cluster import counters, storage
from cluster.documents import parsing
from cluster.errors import UserError
from data_shards.block_cache import BlockCache, Cacheable
from data_shards.decode import ImageError
from data_shards.manifest import Manifest, SampleEntry, ShardEntry, read_index
from data_shards.sample import ABOUT_MEMBER, IMAGE_MEMBERS

D = TypeVar("D")
logger = logging.getLogger(__name__)

BLOCK = tarfile.BLOCKSIZE
HEADER = struct.Struct("100s 24x 11s 21x c 100x 5s 83x B 166x")  # name, size, kind, magic, prefix's first byte
COPIED = 2**15  # bytes, up to which a copy costs less than keeping track of a part
INDEXES_KEPT = 16


@dataclass(frozen=True, slots=True)
class Encoded:
    """A sample as it is in its shard."""

    index: int
    key: str
    members: Mapping[str, bytes | memoryview]
    """By ending, as in `data_shards.sample`."""
    captions: list[str]


class ShardReader:
    """Reads the shards at `shards_uri`, through `cache` if there is one. Keeps the indexes of some shards."""

    def __init__(self, shards_uri: str, *, cache: BlockCache | None = None, indexes_kept: int = INDEXES_KEPT) -> None:
        self._uri = shards_uri
        self._cache = cache
        self.index = lru_cache(indexes_kept)(partial(read_index, shards_uri))
        """Where a shard's samples are."""

    def read(
        self, shard: ShardEntry, start: int = 0, stop: int | None = None, *, first_index: int = 0
    ) -> list[Encoded]:
        """Samples [start, stop) of a shard, by one ranged read; the first gets the index `first_index`.

        Raises UserError naming the shard and the sample if the bytes are not those of the manifest.
        """
        uri = storage.join(self._uri, shard.name)
        entries = self.index(shard)[start:stop]
        data = self._checked(uri, shard, entries)
        with parsing(f"{uri}, though its bytes are those of the manifest,"):
            samples = [_encoded(first_index + i, *sample) for i, sample in enumerate(samples_in(data))]
        if [sample.key for sample in samples] != [entry.key for entry in entries]:
            raise UserError(f"{uri} holds other samples than the manifest says: write the shards again")
        return samples

    def _checked(self, uri: str, shard: ShardEntry, entries: Sequence[SampleEntry]) -> bytes:
        """The bytes of consecutive samples."""
        begin, length = entries[0].offset, entries[-1].offset + entries[-1].length - entries[0].offset
        data, bad = read_checked(uri, shard, begin, length, self._cache, lambda data: _damaged(data, entries))
        if bad:
            raise UserError(
                f"{uri} is damaged at sample '{bad.key}': the shard has SHA-256 {storage.sha256(uri)}, the "
                f"manifest says {shard.sha256}; write the shards again, or fetch them again"
            )
        return data


def read_checked(
    uri: str,
    file: Cacheable,
    begin: int,
    length: int,
    cache: BlockCache | None,
    damage_in: Callable[[bytes], D | None],
) -> tuple[bytes, D | None]:
    """Bytes of a file, and the damage found in them even when read again: what a network or a cache got wrong is not
    wrong then."""
    data = cache.read(uri, file, begin, length) if cache else storage.read_bytes(uri, begin, length)
    damage = damage_in(data)
    if damage:
        counters.count("storage_read_retries")
        logger.warning("reading %s again: its bytes are not those of its index", uri)
        if cache:
            cache.forget(file, begin, length)
        data = storage.read_bytes(uri, begin, length)
        damage = damage_in(data)
    return data, damage


def _damaged(data: bytes, entries: Sequence[SampleEntry]) -> SampleEntry | None:
    """The first sample whose bytes are not those of the index."""
    view, begin = memoryview(data), entries[0].offset
    for entry in entries:
        if crc32(view[entry.offset - begin : entry.offset - begin + entry.length]) != entry.crc32:
            return entry
    return None


def read_images(shards_uri: str, keys: Iterable[str]) -> dict[str, bytes]:
    """The encoded images of some samples, by key; one read for each, so for a few. Raises UserError for a lost one."""
    wanted, found = set(keys), {}
    reader = ShardReader(shards_uri)
    for shard in Manifest.load(shards_uri).shards:
        for number, entry in enumerate(reader.index(shard)):
            if entry.key in wanted:
                [sample] = reader.read(shard, number, number + 1)
                found[entry.key] = encoded_image(sample)
    if missing := sorted(wanted - found.keys()):
        raise UserError(f"{shards_uri} has no sample '{missing[0]}'")
    return found


def encoded_image(sample: Encoded) -> bytes:
    """Raises ImageError if the sample has none."""
    for name in IMAGE_MEMBERS:
        if name in sample.members:
            return bytes(sample.members[name])
    raise ImageError(f"the sample has no {' or '.join(IMAGE_MEMBERS)}")


def _encoded(index: int, key: str, members: Mapping[str, bytes | memoryview]) -> Encoded:
    """Raises ValueError, KeyError or TypeError if it has no captions."""
    captions = from_json(bytes(members[ABOUT_MEMBER]))["captions"]
    if not captions or not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"sample '{key}' has no captions")
    return Encoded(index, key, members, captions)


# --- tar ---


def samples_in(data: bytes) -> list[tuple[str, dict[str, bytes | memoryview]]]:
    """Key and members by ending of each sample in a part of a tar, as WebDataset names them: a key ends at the first
    dot of a name, and the files of a sample follow each other. Raises ValueError for a file without an ending."""
    samples: list[tuple[str, dict[str, bytes | memoryview]]] = []
    for name, content in _files(data):
        folder, slash, last = name.rpartition("/")
        stem, dot, ending = last.partition(".")
        if not stem or not dot:
            raise ValueError(f"'{name}' is no name of a sample's file")
        key = f"{folder}{slash}{stem}"
        if not samples or samples[-1][0] != key:
            samples.append((key, {}))
        samples[-1][1][ending.lower()] = content
    return samples


def _files(data: bytes) -> Iterable[tuple[str, bytes | memoryview]]:
    """Name and content of each file in a part of a tar. Raises ValueError for what takes no space there."""
    return _plain_files(data) or _any_files(data)


def _plain_files(data: bytes) -> list[tuple[str, bytes | memoryview]] | None:
    """As `_any_files`, ten times as fast, for what our writer and most others make: short names, no extensions."""
    files: list[tuple[str, bytes | memoryview]] = []
    at, view = 0, memoryview(data)
    while at < len(data):
        if at + BLOCK > len(data):
            return None
        padded, size, kind, magic, prefix = HEADER.unpack_from(data, at)
        name = padded.rstrip(b"\0")
        is_plain = kind == b"0" and magic == b"ustar" and not prefix
        if not (is_plain and name.isascii() and len(name) < 100 and size.isdigit()):
            return None
        start = at + BLOCK
        end = start + int(size, 8)
        if end > len(data):
            return None
        files.append((name.decode(), view[start:end] if end - start > COPIED else data[start:end]))
        at = start + -(-(end - start) // BLOCK) * BLOCK
    return files


def _any_files(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Raises ValueError for what takes no space there.

    Links lead elsewhere, a sparse file may claim terabytes of zeros in a few bytes, and a size below zero leads
    tarfile back to where it was, for ever. WebDataset's own reader takes all of these, and compressed tars.
    """
    end = 0
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            if not member.isreg() or member.issparse():
                raise ValueError(f"'{member.name}' is no plain file")
            if member.size < 0 or member.offset_data < end or member.offset_data + member.size > len(data):
                raise ValueError(f"'{member.name}' claims {member.size} bytes, which are not there")
            end = member.offset_data + member.size
            yield member.name, data[member.offset_data : end]
