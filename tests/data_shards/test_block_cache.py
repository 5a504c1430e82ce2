"""The cache: bytes of shards from disk, within its limit, never half a block, shared by processes."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster import counters, storage
from cluster.errors import UserError
from data_shards.block_cache import BlockCache
from data_shards.manifest import ShardEntry
from tests.data_shards.test_stream import assert_same, global_batches

BLOCK = 1000


@pytest.fixture
def shard(tmp_path: Path) -> ShardEntry:
    return write_shard(tmp_path / "s.tar", 10_500)


def write_shard(path: Path, num_bytes: int, seed: int = 0) -> ShardEntry:
    data = random.Random(seed).randbytes(num_bytes)
    path.write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    return ShardEntry(
        name=path.name, split="train", num_samples=1, num_bytes=num_bytes, sha256=sha256, index_sha256="0"
    )


def cache_in(folder: Path, max_bytes: int = 10**6) -> BlockCache:
    return BlockCache(folder / "cache", max_bytes, block_bytes=BLOCK)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "cache").iterdir())


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int | None]]:
    """(start, length) of each read from storage."""
    found: list[tuple[int, int | None]] = []
    read_bytes = storage.read_bytes

    def noted(uri: str, start: int = 0, length: int | None = None) -> bytes:
        found.append((start, length))
        return read_bytes(uri, start, length)

    monkeypatch.setattr(storage, "read_bytes", noted)
    return found


@pytest.mark.parametrize(
    ("start", "length"), [(0, 1), (0, 10_500), (999, 2), (1000, 1000), (10_000, 500), (10_499, 1), (3, 5000)]
)
def test_bytes_are_those_of_the_shard(tmp_path: Path, shard: ShardEntry, start: int, length: int) -> None:
    uri = str(tmp_path / shard.name)
    expected = storage.read_bytes(uri, start, length)
    cache = cache_in(tmp_path)
    assert cache.read(uri, shard, start, length) == expected
    Path(uri).unlink()
    assert cache.read(uri, shard, start, length) == expected
    assert cache_in(tmp_path).read(uri, shard, start, length) == expected


def test_blocks_are_for_whom_the_umask_leaves_them(tmp_path: Path, shard: ShardEntry) -> None:
    before = os.umask(0o027)
    try:
        cache_in(tmp_path).read(str(tmp_path / shard.name), shard, 0, 10)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "cache").iterdir() if path.name != ".lock"} == {0o640}


def test_blocks_are_fetched_once_and_neighbours_together(
    tmp_path: Path, shard: ShardEntry, reads: list[tuple[int, int | None]]
) -> None:
    cache, uri = cache_in(tmp_path), str(tmp_path / shard.name)
    before = counters.counted()
    cache.read(uri, shard, 2500, 100)
    cache.read(uri, shard, 500, 9000)
    cache.read(uri, shard, 0, 10_500)
    assert reads == [(2000, 1000), (0, 2000), (3000, 7000), (10_000, 500)]
    assert counters.counted() - before == {"cache_misses": 1 + 9 + 1, "cache_hits": 1 + 10}


def test_threads_that_ask_for_a_block_fetch_it_once(
    tmp_path: Path, shard: ShardEntry, reads: list[tuple[int, int | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, uri, read_bytes = cache_in(tmp_path), str(tmp_path / shard.name), storage.read_bytes

    def slow(uri: str, start: int = 0, length: int | None = None) -> bytes:
        time.sleep(0.2)
        return read_bytes(uri, start, length)

    monkeypatch.setattr(storage, "read_bytes", slow)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda start: cache.read(uri, shard, start, 100), range(3000, 3900, 100)))
    assert b"".join(found) == Path(uri).read_bytes()[3000:3900]
    assert reads == [(3000, 1000)]


def test_the_blocks_used_last_stay(tmp_path: Path, shard: ShardEntry, reads: list[tuple[int, int | None]]) -> None:
    cache, uri = cache_in(tmp_path, 5 * BLOCK), str(tmp_path / shard.name)
    for number in (0, 1, 2, 0, 3, 0, 4, 0, 5, 6, 0, 7):
        cache.read(uri, shard, number * BLOCK, 1)
        assert size_of(tmp_path) <= 5 * BLOCK
        time.sleep(0.01)  # so that file times differ
    reads.clear()
    cache = cache_in(tmp_path, 5 * BLOCK)
    for number in (0, 7, 6):
        cache.read(uri, shard, number * BLOCK, 1)
    assert reads == []
    cache.read(uri, shard, BLOCK, 1)
    assert reads == [(BLOCK, BLOCK)]
    cache_in(tmp_path, 2 * BLOCK)
    assert size_of(tmp_path) <= 2 * BLOCK, "a lower limit holds at once"


def test_shards_written_anew_are_not_answered_from_old_blocks(tmp_path: Path, shard: ShardEntry) -> None:
    cache, uri = cache_in(tmp_path), str(tmp_path / shard.name)
    cache.read(uri, shard, 0, 10)
    other = write_shard(tmp_path / shard.name, 10_500, seed=1)
    assert cache.read(uri, other, 0, 10) == Path(uri).read_bytes()[:10]


@pytest.mark.parametrize("left", [b"", b"half a block"])
def test_half_a_block_is_fetched_again(tmp_path: Path, shard: ShardEntry, left: bytes) -> None:
    """As a power failure may leave it."""
    cache, uri = cache_in(tmp_path), str(tmp_path / shard.name)
    expected = cache.read(uri, shard, 0, 3000)
    for path in (tmp_path / "cache").glob(f"{shard.sha256}*"):
        path.write_bytes(left)
    assert cache.read(uri, shard, 0, 3000) == expected


def test_a_damaged_block_is_given_up_and_read_from_the_shard(shards: str, tmp_path: Path) -> None:
    straight = global_batches(shards, 4, 1)
    cached: dict[str, Any] = {"cache": cache_in(tmp_path)}
    assert_same(global_batches(shards, 4, 1, **cached), straight)
    for path in (tmp_path / "cache").glob("*-*"):
        path.write_bytes(bytes(path.stat().st_size))
    assert_same(global_batches(shards, 4, 1, **cached), global_batches(shards, 4, 1))


def test_a_full_disk_makes_it_slow_not_wrong(
    tmp_path: Path, shard: ShardEntry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache, uri = cache_in(tmp_path), str(tmp_path / shard.name)

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert cache.read(uri, shard, 0, 10) == Path(uri).read_bytes()[:10]
    assert "No space left on device" in caplog.text


def test_what_cannot_be_a_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match="cannot be made: File exists"):
        cache_in(tmp_path)
    with pytest.raises(UserError, match="holds no block of 1000"):
        BlockCache(tmp_path, 999, block_bytes=BLOCK)


READER = """
import random, sys
from pathlib import Path
from typing import Any
from data_shards.block_cache import BlockCache
from data_shards.manifest import ShardEntry
shard, uri = ShardEntry.model_validate_json(sys.argv[1]), sys.argv[2]
data = Path(uri).read_bytes()
cache = BlockCache(Path(sys.argv[3]), 8000, block_bytes=1000)
draws = random.Random()
print("begins", flush=True)
for number in range(int(sys.argv[4])):
    start = draws.randrange(len(data) - 1)
    length = draws.randrange(1, min(3000, len(data) - start) + 1)
    assert cache.read(uri, shard, start, length) == data[start:start + length]
"""


def test_processes_share_it_and_may_be_killed_at_any_moment(tmp_path: Path, shard: ShardEntry) -> None:
    """Every read is compared with the shard's own bytes, while blocks come and go and readers are killed."""

    def start(reads: int) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", READER, shard.model_dump_json(), str(tmp_path / shard.name)]
        command += [str(tmp_path / "cache"), str(reads)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    killed = [start(10**9) for _ in range(2)]
    lasting = start(3000)
    for process in [*killed, lasting]:
        assert process.stdout is not None
        process.stdout.readline()
    for process in killed:
        time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
    assert lasting.wait(60) == 0
    assert size_of(tmp_path) <= 8000
    for process in killed:
        assert process.wait() == -signal.SIGKILL, "it had not come upon a wrong byte"
    cache = BlockCache(tmp_path / "cache", 8000, block_bytes=BLOCK)
    uri = str(tmp_path / shard.name)
    assert cache.read(uri, shard, 0, 10_500) == Path(uri).read_bytes()
    assert size_of(tmp_path) <= 8000
