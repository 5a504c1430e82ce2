"""A rank that hangs is ended, and its stacks say where it stood; one that is merely slow is not."""

import subprocess
import sys
import time
from pathlib import Path

from trainers.watchdog import EXIT_CODE, watchdog

HANGS = """
import sys, threading
from pathlib import Path
from trainers.watchdog import watchdog

def waits_for_ever():
    threading.Event().wait()

with watchdog(0.3, Path(sys.argv[1]).write_text) as is_alive:
    for _ in range(5):
        is_alive()
    waits_for_ever()
"""


def test_a_process_that_hangs_is_ended_with_its_stacks(tmp_path: Path) -> None:
    stacks = tmp_path / "stacks.txt"
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", HANGS, str(stacks)]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == EXIT_CODE
    for told in (stacks.read_text(), ended.stderr):
        assert "in waits_for_ever" in told
        assert "No step was finished in 0.3 seconds" in told


HOLDS_PYTHONS_LOCK = """
import ctypes
from trainers import watchdog

watchdog.BACKSTOP_SECONDS = 0.5

def waits_in_native_code():
    ctypes.PyDLL(None).sleep(100)

with watchdog.watchdog(0.3, print) as is_alive:
    is_alive()
    waits_in_native_code()
"""


def test_a_process_that_hangs_with_pythons_lock_is_ended_with_its_stacks() -> None:
    """No thread of Python runs then, and so no watchdog of Python's."""
    root = Path(__file__).parents[2]
    began = time.monotonic()
    command = [sys.executable, "-c", HOLDS_PYTHONS_LOCK]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "in waits_in_native_code" in ended.stderr
    assert time.monotonic() - began < 50


def test_signs_of_life_keep_it_alive_and_the_end_of_the_block_ends_the_watch() -> None:
    with watchdog(1.0, lambda stacks: None) as is_alive:
        for _ in range(6):
            time.sleep(0.3)
            is_alive()
    time.sleep(1.5)  # or this process would have ended
