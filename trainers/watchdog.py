"""Ends a rank that hangs, so that its run goes on from the latest checkpoint, and says where each thread stood."""

import faulthandler
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h
WRITE_SECONDS = 30  # for what may hang for the same reason


@contextmanager
def watchdog(seconds: float, keep_stacks: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Yield a function to call at each sign of life; without one for `seconds`, this process is ended.

    Before that the stacks of all threads are printed to stderr and given to `keep_stacks`. The process is ended hard,
    as a rank that waits for others in native code does not listen to anything else.
    """
    alive, done = threading.Event(), threading.Event()

    def watch() -> None:
        while alive.wait(seconds):
            alive.clear()
        if done.is_set():
            return
        stacks = f"No step was finished in {seconds:g} seconds. Where each thread stood:\n\n{_stacks()}"
        print(stacks, file=sys.stderr, flush=True)
        writer = threading.Thread(target=keep_stacks, args=(stacks,), daemon=True)
        writer.start()
        writer.join(WRITE_SECONDS)
        os._exit(EXIT_CODE)

    threading.Thread(target=watch, daemon=True, name="watchdog").start()
    try:
        yield alive.set
    finally:
        done.set()


def _stacks() -> str:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read()
