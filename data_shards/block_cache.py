"""Files on a local disk, block by block; of what does not fit, the blocks not used for longest are given up."""

import fcntl
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Protocol

from cluster import counters, storage
from cluster.errors import UserError

logger = logging.getLogger(__name__)

BLOCK_BYTES = 2**23
KEPT = 0.9  # share of the limit to which each look brings down what is there
LOOKED_AFTER = 0.01  # share of the limit that a process writes between two looks at what is there
TURNS = 64  # far more than threads that read, so that few wait for another block than theirs
HALF_WRITTEN = "half-"


class Cacheable(Protocol):
    """A file that never changes under its SHA-256: a shard, or a file of prompt embeddings."""

    @property
    def sha256(self) -> str: ...

    @property
    def num_bytes(self) -> int: ...


class BlockCache:
    """Blocks of files in `folder`, at most `max_bytes` of them, shared by all processes that name it.

    A block is known by its file's SHA-256: shards written anew are never answered from blocks of the old. It takes
    its name when it is whole. Ten processes writing at once stay within the limit, or where it is less than a hundred
    blocks, may go over it by a block each.
    """

    def __init__(self, folder: Path, max_bytes: int, *, block_bytes: int = BLOCK_BYTES) -> None:
        if max_bytes < block_bytes:
            raise UserError(f"a cache of {max_bytes} bytes holds no block of {block_bytes}: give it more")
        self._folder = folder
        self._max_bytes = max_bytes
        self._block_bytes = block_bytes
        self._written = 0  # since the last look
        self._turns = [Lock() for _ in range(TURNS)]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._give_up_oldest()  # the limit may have been higher
        except OSError as error:
            raise UserError(f"the cache {folder} cannot be made: {error.strerror}; name another folder") from None

    def read(self, uri: str, source: Cacheable, start: int, length: int) -> bytes:
        """Bytes [start, start + length) of a file. Blocks that are not here are fetched, neighbours together, and by
        one thread of those that begin in the same block."""
        with self._turns[hash((source.sha256, start // self._block_bytes)) % len(self._turns)]:
            return self._read(uri, source, start, length)

    def _read(self, uri: str, source: Cacheable, start: int, length: int) -> bytes:
        size, stop = self._block_bytes, start + length
        parts = {
            number: slice(max(start - number * size, 0), min(stop - number * size, size))
            for number in range(start // size, (stop - 1) // size + 1)
        }
        found = {number: self._kept(source, number, part) for number, part in parts.items()}
        missing = [number for number, data in found.items() if data is None]
        counters.count("cache_hits", len(found) - len(missing))
        counters.count("cache_misses", len(missing))
        for begin, end in _runs(missing):
            data = storage.read_bytes(uri, begin * size, min(end * size, source.num_bytes) - begin * size)
            for number in range(begin, end):
                block = data[(number - begin) * size : (number - begin + 1) * size]
                self._keep(source, number, block)
                found[number] = block[parts[number]]
        return b"".join(data or b"" for data in found.values())

    def forget(self, source: Cacheable, start: int, length: int) -> None:
        """Give up the blocks under these bytes of a file, which turned out not to be its own."""
        for number in range(start // self._block_bytes, (start + length - 1) // self._block_bytes + 1):
            self._path(source, number).unlink(missing_ok=True)

    def _path(self, source: Cacheable, number: int) -> Path:
        return self._folder / f"{source.sha256}-{number:06d}"

    def _kept(self, source: Cacheable, number: int, part: slice) -> bytes | None:
        """Part of a block, if all of it is here."""
        try:
            with self._path(source, number).open("rb") as file:
                os.utime(file.fileno())  # it is the last used now
                # After a power failure a file may have its name before its bytes.
                expected = min(self._block_bytes, source.num_bytes - number * self._block_bytes)
                if os.fstat(file.fileno()).st_size != expected:
                    return None
                file.seek(part.start)
                return file.read(part.stop - part.start)
        except FileNotFoundError:  # never fetched, or given up by another process this very moment
            return None

    def _keep(self, source: Cacheable, number: int, block: bytes) -> None:
        """A cache that cannot be written, as on a full disk, is a slow one, no fault of the training."""
        try:
            half_written = storage.new_file(self._folder, HALF_WRITTEN)
            half_written.write_bytes(block)
            half_written.replace(self._path(source, number))
        except OSError as error:
            logger.warning("a block is not kept in the cache %s: %s", self._folder, error.strerror)
            return
        self._written += len(block)
        if self._written >= LOOKED_AFTER * self._max_bytes:
            self._written = 0
            self._give_up_oldest()

    def _give_up_oldest(self) -> None:
        """One process at a time, each after it has written: whoever writes last leaves all within the limit."""
        with (self._folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = []  # what killed processes left half written too, which will be the oldest one day
            for entry in os.scandir(self._folder):
                if not entry.name.startswith("."):
                    with suppress(FileNotFoundError):
                        found.append((entry.stat().st_mtime, entry.stat().st_size, Path(entry.path)))
            over = sum(size for _, size, _ in found) - KEPT * self._max_bytes
            for _, size, path in sorted(found):
                if over <= 0:
                    return
                path.unlink(missing_ok=True)
                over -= size


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges [begin, end) of the consecutive ones among sorted numbers."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number + 1 for number in numbers if number + 1 not in numbers]
    return zip(starts, ends, strict=True)
