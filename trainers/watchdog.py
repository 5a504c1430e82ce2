"""Ends a rank that hangs, so that its run goes on from the latest checkpoint, and says where each thread stood."""

import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h; the backstop's is 1
WRITE_SECONDS = 30.0  # for what may hang for the same reason
BACKSTOP_SECONDS = 5.0  # how much later than the watchdog its backstop ends the process


@contextmanager
def watchdog(seconds: float, keep_stacks: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Yield a function to call at each sign of life; without one for `seconds`, this process is ended.

    Before that the stacks of all threads are printed to stderr and given to `keep_stacks`. The process is ended hard,
    as a rank that waits for others in native code does not listen to anything else. Where that code holds Python's
    lock, no thread of Python runs: the backstop is one of C (faulthandler), which prints the stacks to stderr alone.
    """
    alive, done = threading.Event(), threading.Event()
    backstop_set = 0.0

    def set_backstop(limit: float) -> None:
        nonlocal backstop_set
        backstop_set = time.monotonic()
        faulthandler.dump_traceback_later(limit, exit=True, file=2)

    def give_sign() -> None:
        alive.set()
        if time.monotonic() - backstop_set > 1:  # it begins a thread each time: not at each of many short steps
            set_backstop(seconds + BACKSTOP_SECONDS)

    def watch() -> None:
        while alive.wait(seconds):
            alive.clear()
        if done.is_set():
            return
        set_backstop(2 * WRITE_SECONDS)
        stacks = f"No step was finished in {seconds:g} seconds. Where each thread stood:\n\n{_stacks()}"
        print(stacks, file=sys.stderr, flush=True)
        writer = threading.Thread(target=keep_stacks, args=(stacks,), daemon=True)
        writer.start()
        writer.join(WRITE_SECONDS)
        os._exit(EXIT_CODE)

    threading.Thread(target=watch, daemon=True, name="watchdog").start()
    set_backstop(seconds + BACKSTOP_SECONDS)
    try:
        yield give_sign
    finally:
        done.set()
        faulthandler.cancel_dump_traceback_later()


def _stacks() -> str:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read()
