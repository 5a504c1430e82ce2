"""Which checkpoint a stage goes on from, whatever happened to the others, or to Ray Train's index of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import UserError
from trainers.checkpoint_folders import INDEX, checkpoint_folder, fault_of, resume_point, seal

RAY = "2.60.0"


def write_checkpoint(stage: Path, step: int, ranks: int = 2) -> Path:
    folder = stage / checkpoint_folder(step, ranks)
    folder.mkdir(parents=True)
    for rank in range(ranks):
        part = stage / f"part-{rank}"
        part.mkdir()
        (part / f"rank-{rank:05d}-of-{ranks:05d}.safetensors").write_bytes(bytes([step, rank]) * 1000)
        seal(part, rank)
        for path in part.iterdir():
            path.rename(folder / path.name)
        part.rmdir()
    return folder


def write_index(stage: Path, *steps: int) -> None:
    results = [{"checkpoint_dir_name": checkpoint_folder(step, 2), "metrics": {"step": step}} for step in steps]
    document = {
        "ray_version": RAY,
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(results))),
        "latest_checkpoint_result": results[-1],
    }
    (stage / INDEX).write_text(json.dumps(document))


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """Checkpoints of steps 2, 4 and 6, the last of which was uploaded and never reported."""
    for step in (2, 4, 6):
        write_checkpoint(tmp_path / "stage", step)
    write_index(tmp_path / "stage", 2, 4)
    return tmp_path / "stage"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def rank_file(stage: Path, step: int) -> Path:
    return stage / checkpoint_folder(step, 2) / "rank-00001-of-00002.safetensors"


def skips_nothing(name: str, reason: str) -> None:
    pytest.fail(f"{name}: {reason}")


def test_an_index_that_is_right_is_followed(stage: Path) -> None:
    assert resume_point(str(stage), RAY, skips_nothing) is None
    assert (stage / INDEX).exists()


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_a_damaged_checkpoint_is_passed_over(stage: Path, damage: Callable[[Path], None]) -> None:
    shutil.rmtree(stage / checkpoint_folder(6, 2))
    damage(rank_file(stage, 4))
    skipped: dict[str, str] = {}
    assert resume_point(str(stage), RAY, skipped.__setitem__) == f"{stage}/step-000002-of-2"
    assert list(skipped) == ["step-000004-of-2"]
    assert not (stage / INDEX).exists(), "Ray would not start with it"


def test_a_checkpoint_that_is_gone_is_passed_over(stage: Path) -> None:
    shutil.rmtree(stage / checkpoint_folder(4, 2))
    damaged = rank_file(stage, 6)
    flip_a_bit(damaged)
    skipped: dict[str, str] = {}
    assert resume_point(str(stage), RAY, skipped.__setitem__) == f"{stage}/step-000002-of-2"
    assert skipped == {
        "step-000006-of-2": f"{damaged.name} is not what was written",
        "step-000004-of-2": "it is not there, or not all of it",
    }


@pytest.mark.parametrize("document", [b"", b'{"ray_vers', b"[]", b'{"ray_version": "1.0"}', b"\xff\x00"])
def test_a_damaged_index_does_not_matter(stage: Path, document: bytes) -> None:
    (stage / INDEX).write_bytes(document)
    skipped: dict[str, str] = {}
    assert resume_point(str(stage), RAY, skipped.__setitem__) == f"{stage}/step-000006-of-2"
    assert list(skipped) == [INDEX]


def test_without_an_index_the_newest_whole_one_counts(stage: Path) -> None:
    (stage / INDEX).unlink()
    assert resume_point(str(stage), RAY, skips_nothing) == f"{stage}/step-000006-of-2"


def test_a_stage_that_has_not_saved_yet_begins_at_its_beginning(tmp_path: Path) -> None:
    assert resume_point(str(tmp_path / "stage"), RAY, skips_nothing) is None
    truncate(rank_file(write_checkpoint(tmp_path / "stage", 2).parent, 2))  # as when it is killed in its first upload
    skipped: dict[str, str] = {}
    assert resume_point(str(tmp_path / "stage"), RAY, skipped.__setitem__) is None
    assert list(skipped) == ["step-000002-of-2"]


def test_where_none_is_whole_a_line_says_why_and_what_to_do(stage: Path) -> None:
    for step in (2, 4, 6):
        truncate(rank_file(stage, step))
    with pytest.raises(UserError, match=r"^no checkpoint of .*stage is whole \(.*step-000002-of-2: .*\): restore one"):
        resume_point(str(stage), RAY, lambda *_: None)
    for step in (2, 4, 6):
        shutil.rmtree(stage / checkpoint_folder(step, 2))
    with pytest.raises(UserError, match=r"step-000004-of-2: it is not there.*or choose another --run name"):
        resume_point(str(stage), RAY, lambda *_: None)
    (stage / INDEX).write_text("")
    with pytest.raises(UserError, match=r"is whole \(checkpoint_manager_snapshot.json: .* is damaged"):
        resume_point(str(stage), RAY, lambda *_: None)


def test_files_that_nobody_sealed_make_no_whole_checkpoint(stage: Path) -> None:
    folder = stage / checkpoint_folder(2, 2)
    (folder / "SHA256SUMS-00001").unlink()
    assert fault_of(str(folder)) == "rank-00001-of-00002.safetensors has no checksum"
    assert fault_of(f"{stage}/nowhere") == "it is empty"
