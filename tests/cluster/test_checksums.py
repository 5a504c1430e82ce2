"""The digests of a folder: any change of any file is noticed and named."""

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.checksums import check_folder, checksums
from cluster.errors import UserError

FILES = st.dictionaries(st.sampled_from(["a", "b.json", "c/a", "c/d e.txt"]), st.binary(max_size=3))


def written(folder: Path, files: dict[str, bytes]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@given(FILES, FILES)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_only_the_same_files_pass(tmp_path: Path, before: dict[str, bytes], now: dict[str, bytes]) -> None:
    sums = checksums([written(tmp_path / "model", before)])
    folder = written(tmp_path / "model", now)
    if before == now:
        check_folder(folder, sums, "m")
        return
    with pytest.raises(UserError, match=r"^m is not what it was: ") as error:
        check_folder(folder, sums, "m")
    changed = [name for name in before.keys() | now.keys() if before.get(name) != now.get(name)]
    assert f"was: {min(changed)} " in str(error.value)


def test_files_to_be_ignored_and_what_python_leaves(tmp_path: Path) -> None:
    folder = written(tmp_path / "m", {"a": b"1"})
    sums = checksums([folder])
    (folder / "code" / "__pycache__").mkdir(parents=True)
    (folder / "code" / "__pycache__" / "x.pyc").write_bytes(b"2")
    (folder / "meta").write_bytes(b"3")
    check_folder(folder, sums, "m", ignoring=["meta"])
    with pytest.raises(UserError, match="meta was not there"):
        check_folder(folder, sums, "m")


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
def test_sha256sum_reads_the_lines(tmp_path: Path) -> None:
    folders = [written(tmp_path / "one", {"b": b"1", "c/a": b"2"}), written(tmp_path / "two", {"a": b"3"})]
    sums = checksums(folders)
    assert [line[66:] for line in sums.splitlines()] == ["a", "b", "c/a"]
    shutil.copytree(folders[1], folders[0], dirs_exist_ok=True)
    done = subprocess.run(["sha256sum", "--check", "--strict"], cwd=folders[0], input=sums, text=True, check=False)
    assert done.returncode == 0
