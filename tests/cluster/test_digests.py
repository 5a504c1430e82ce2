"""Digests of large files: read once, read again after any change, and never wrong for what is beside them."""

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster import digests
from cluster.digests import file_digest

LARGE = digests.KEPT_FROM_BYTES + 1


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "SETTLED_SECONDS", 0.0)  # and not wait for it
    return tmp_path / "cache" / "medsynth" / "digests"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file whose content was read."""
    found: list[Path] = []
    read = digests._read

    def noting(path: Path) -> str:
        found.append(path)
        return read(path)

    monkeypatch.setattr(digests, "_read", noting)
    return found


def large(path: Path, byte: bytes = b"a") -> Path:
    path.write_bytes(byte * LARGE)
    return path


def true_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_large_file_is_read_once(tmp_path: Path, cache: Path, reads: list[Path]) -> None:
    path = large(tmp_path / "a")
    assert file_digest(path) == file_digest(path) == true_digest(path)
    assert reads == [path]
    assert len(list(cache.iterdir())) == 1
    other = large(tmp_path / "b", b"b")
    assert file_digest(other) == true_digest(other)


def test_a_small_file_is_not_noted(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a").write_bytes(b"small")
    assert file_digest(tmp_path / "a") == hashlib.sha256(b"small").hexdigest()
    assert not cache.exists()


@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_a_change_shows_even_where_size_and_time_do_not(tmp_path: Path, how: str) -> None:
    path = large(tmp_path / "a")
    before = path.stat()
    first = file_digest(path)
    time.sleep(0.05)  # file systems stamp by a clock that ticks every few milliseconds
    if how == "in place":
        large(path, b"b")
    else:
        large(tmp_path / "other", b"b").replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert first != file_digest(path) == true_digest(path)


def test_a_file_that_was_written_a_moment_ago_is_not_noted(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED_SECONDS", 60.0)
    file_digest(large(tmp_path / "a"))
    assert not cache.exists()


def test_a_file_that_changes_while_it_is_read_is_not_noted(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = large(tmp_path / "a"), digests._read

    def changing(path: Path) -> str:
        digest = read(path)
        large(path, b"b")
        return digest

    monkeypatch.setattr(digests, "_read", changing)
    file_digest(path)
    assert not cache.exists()


@pytest.mark.parametrize("damaged", [b"", b"{", b"[]", b'{"identity": {}}', b"\xff"])
def test_a_damaged_note_is_written_anew(tmp_path: Path, cache: Path, reads: list[Path], damaged: bytes) -> None:
    path = large(tmp_path / "a")
    file_digest(path)
    (note,) = cache.iterdir()
    note.write_bytes(damaged)
    assert file_digest(path) == file_digest(path) == true_digest(path)
    assert len(reads) == 2


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"a file where the folder would be")
    path = large(tmp_path / "a")
    assert file_digest(path) == true_digest(path)


def test_many_at_once_leave_one_whole_note(tmp_path: Path, cache: Path, reads: list[Path]) -> None:
    path = large(tmp_path / "a")
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(file_digest, [path] * 32)) == {true_digest(path)}
    assert [entry.suffix for entry in cache.iterdir()] == [".json"]
    reads.clear()
    file_digest(path)
    assert not reads
