"""One owner of a folder: who comes second is refused while the first lives, and takes over when it is gone."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import storage
from trainers import lease
from trainers.lease import HeldError, LostError, held

ROOT = Path(__file__).parents[2]
HOLDS = """
import sys, time
from trainers import lease
lease.BEAT_SECONDS = 0.1
with lease.held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease, "STALE_SECONDS", 30.0)  # more than a busy machine takes for a beat
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.05)


@pytest.fixture
def soon_stale(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.8)
    return 0.8


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "run")
    return f"{request.getfixturevalue('bucket')}/run"


@contextmanager
def other_process(folder: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDS, folder]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def of_another_machine(folder: str) -> None:
    """Let the newest lease be one that no process list of this machine tells anything about."""
    number, content = lease._newest(folder)
    storage.write_bytes(lease._path(folder, number), json.dumps(json.loads(content) | {"machine": "m"}).encode())


def check_for_seconds(held: lease.Lease) -> None:
    for _ in range(200):
        held.check()
        time.sleep(0.05)


def test_while_one_lives_another_is_told_who_it_is_and_changes_nothing(folder: str) -> None:
    with other_process(folder) as process:
        before = storage.list_files(folder)
        with pytest.raises(HeldError, match=rf"in use by .+@.+ \(process {process.pid}, -c .*\) since \d{{4}}-.* UTC"):
            held(folder).__enter__()
        assert storage.list_files(folder) == before


def test_after_kill_9_a_process_of_the_same_machine_takes_over_at_once(folder: str) -> None:
    with other_process(folder) as process:
        process.kill()
        process.wait()
        began = time.monotonic()
        with held(folder):
            assert time.monotonic() - began < lease.STALE_SECONDS / 2


def test_a_lease_of_another_machine_is_stale_when_it_was_silent_long_enough(folder: str, soon_stale: float) -> None:
    with other_process(folder) as process:
        process.kill()
        process.wait()
    of_another_machine(folder)
    told: list[tuple[float, float]] = []
    began = time.monotonic()
    with held(folder, lambda *silence: told.append(silence)):
        assert time.monotonic() - began >= soon_stale
    assert told == sorted(told)
    assert {limit for _, limit in told} == {soon_stale}


def test_a_released_lease_is_free(folder: str) -> None:
    for _ in range(2):  # the second after a release
        began = time.monotonic()
        with held(folder):
            assert time.monotonic() - began < lease.STALE_SECONDS / 2


def test_a_damaged_lease_is_stale(folder: str, soon_stale: float) -> None:
    with held(folder):
        pass
    for damage in (b"", b"\x00[]", b'{"pid": "1"}'):
        number, _ = lease._newest(folder)
        storage.write_bytes(lease._path(folder, number), damage)
        began = time.monotonic()
        with held(folder):
            assert time.monotonic() - began >= soon_stale


def test_of_several_that_wait_one_takes_over(folder: str) -> None:
    with other_process(folder) as process:
        process.kill()
        process.wait()
    outcomes: list[str] = []
    all_came = threading.Event()

    def come_second() -> None:
        try:
            with held(folder):
                outcomes.append("held")
                all_came.wait(20)
        except HeldError:
            outcomes.append("refused")
            if len(outcomes) == 4:
                all_came.set()

    threads = [threading.Thread(target=come_second) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held", "refused", "refused", "refused"]


def test_an_owner_that_was_taken_over_from_learns_it_and_leaves_the_other_alone(folder: str, soon_stale: float) -> None:
    with held(folder) as first:
        first.check()
        with pytest.MonkeyPatch.context() as suspended:
            suspended.setattr(lease.Lease, "_write", lambda self, owner: None)
            second = lease._acquire(folder, lambda *_: None)
        with pytest.raises(LostError, match=r"was taken over by .+@"):
            check_for_seconds(first)
        second.check()
    owner = lease.Owner.parse(lease._newest(folder)[1])
    assert owner is not None
    assert not owner.is_released, "the first one's end is not the second one's"
    second.release()


def test_a_process_that_took_a_dead_ones_number_is_not_its_owner(tmp_path: Path) -> None:
    """Pids are used again; what the clock says does not matter."""
    owner = lease.Owner.this_process()
    assert not owner.has_ended()
    assert replace(owner, start_ticks=owner.start_ticks - 1).has_ended()
    assert not replace(owner, start_ticks=1, machine="another").has_ended()
