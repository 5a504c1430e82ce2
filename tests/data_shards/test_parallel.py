"""Writing on a Ray cluster: the bytes that threads write, also when the driver is killed and starts again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from cluster import runtime
from cluster.errors import UserError
from data_shards import Manifest, Settings, write_shards, writer
from data_shards.parallel import mapping
from data_shards.precompute import precompute
from data_shards.sources import medvqa_records
from tests.conftest import PREVIEW_PROMPTS
from tests.data_shards.test_writer import files
from trainers.flux.encoders import FluxEncoders

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SETTINGS = Settings(name="set", splits={"train": 0.6, "validation": 0.2, "test": 0.2}, samples_per_shard=2)


@pytest.fixture(scope="module")
def machines() -> Iterator[str]:
    """The address of a head that does no work and two machines; all of them raylets here, to which this process stays
    connected, so that the workers start once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(ROOT))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            for _ in range(2):
                cluster.add_node(num_cpus=1)
            patch.setenv("RAY_ADDRESS", cluster.address)
            with runtime.connect(1):
                patch.delenv("RAY_ADDRESS")
                yield cluster.address
        finally:
            cluster.shutdown()


@pytest.fixture
def on_cluster(machines: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RAY_ADDRESS", machines)
    return machines


def write(source: Path, out: Path | str, **changes: Any) -> Manifest:
    return write_shards(medvqa_records(str(source)), str(out), replace(SETTINGS, **changes), source={"uri": "set"})


def half(number: int) -> float:
    if number < 0:
        raise UserError(f"{number} is below 0")
    return number / 2


def test_results_keep_their_order_and_mistakes_their_words(on_cluster: str) -> None:
    with mapping(1) as apply:
        assert list(apply(half, range(50), 7)) == [number / 2 for number in range(50)]
        assert list(apply(half, [])) == []
        with pytest.raises(UserError, match=r"^-3 is below 0$"):
            list(apply(half, [1, 2, -3, 4]))


def test_a_cluster_writes_what_threads_write(
    small_source: Path, on_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte, whatever the number of images a task, bad inputs too; and a second time nothing."""
    records = list(medvqa_records(str(small_source)))
    records[3] = replace(records[3], source_id="gone.jpg")
    records[5] = replace(records[5], captions=())

    def write_here(out: str) -> dict[str, bytes]:
        manifest = write_shards(records, out, replace(SETTINGS, resize=64), source={"uri": "set"})
        assert manifest.quarantined == {"file not found": 1, "empty caption": 1}
        return files(tmp_path / out)

    monkeypatch.setattr(writer, "CHECKED_AT_ONCE", 5)
    found = write_here("relative")  # to this process's folder, in which the workers are not
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "relative").iterdir()}
    write_here("relative")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "relative").iterdir()} == times
    monkeypatch.delenv("RAY_ADDRESS")
    assert write_here("threads") == found


def test_a_file_that_only_this_machine_has_is_no_bad_input(
    small_source: Path, on_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the others say is made up: here all machines share one disk."""
    monkeypatch.setattr(writer, "_check", lambda record: writer.BadInputError(writer.NOT_FOUND))
    with pytest.raises(UserError, match=r"images/.*jpg is not there on all machines of the cluster: keep images"):
        write(small_source, tmp_path / "out")


def test_encoders_on_a_cluster_make_the_set_that_one_process_makes(
    shards: str, precomputed: str, flux_folder: Path, on_cluster: str, tmp_path: Path
) -> None:
    """From paths that only this process's folder makes sense of, then from what is left of a run."""
    (tmp_path / "shards").symlink_to(shards)
    arguments: dict[str, Any] = {
        "encoders": FluxEncoders(str(flux_folder), max_tokens=16),
        "resolution": 32,
        "horizontal_flip": True,
    }
    arguments |= {"extra_prompts": PREVIEW_PROMPTS, "batch_size": 4}
    encoded: list[int] = []
    out = tmp_path / "out"
    for lost in ((), ("manifest.json", "small-train-000001.tar")):
        for name in lost:
            (out / name).unlink()
        manifest = precompute("shards", "out", **arguments, on_encoded=lambda images, seconds: encoded.append(images))
        assert manifest.source["uri"] == "shards"
        found, expected = files(out), files(precomputed)
        del found["manifest.json"], expected["manifest.json"]
        assert found == expected
    assert encoded == [24, next(s.num_samples for s in manifest.shards if s.name == "small-train-000001.tar")]


DRIVER = """
import sys
from data_shards import Settings, write_shards
from data_shards.precompute import precompute
from data_shards.sources import medvqa_records
settings = Settings("set", {"train": 0.6, "validation": 0.2, "test": 0.2}, samples_per_shard=2)
write_shards(medvqa_records(sys.argv[1]), sys.argv[2], settings, source={"uri": "set"},
             on_progress=lambda what, done, total: print(what, done, flush=True))
"""


def test_a_driver_killed_again_and_again_leaves_the_same_bytes(
    small_source: Path, on_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", DRIVER, str(small_source), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for killed_at in ("checking images 20", "writing shards 3"):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as driver:
            assert driver.stdout is not None
            assert any(line.strip() == killed_at for line in driver.stdout)
            driver.send_signal(signal.SIGKILL)
        assert driver.returncode == -signal.SIGKILL
        assert not (out / "manifest.json").exists()
    assert len([path for path in out.iterdir() if path.suffix == ".tar"]) >= 3
    (out / ".set-train-000000.tar.abcd_123").write_bytes(b"half")  # as a worker that is killed too may leave it
    write(small_source, out)
    settle(out)
    monkeypatch.delenv("RAY_ADDRESS")
    write(small_source, tmp_path / "threads")
    assert files(out) == files(tmp_path / "threads")


def settle(folder: Path) -> None:
    """Workers of the killed driver end within seconds; until then they may still write what is there already."""
    deadline = time.monotonic() + 20
    while any(path.name.startswith(".") for path in folder.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.1)
