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


def test_signs_of_life_keep_it_alive_and_the_end_of_the_block_ends_the_watch() -> None:
    with watchdog(1.0, lambda stacks: None) as is_alive:
        for _ in range(6):
            time.sleep(0.3)
            is_alive()
    time.sleep(1.5)  # or this process would have ended
