"""Progress of long work: bars on a terminal, a few lines in a log."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

PLAIN_LINES = 4  # of each kind of work, where there is no terminal


def is_worth_a_line(done: int, total: int) -> bool:
    return done == total or done * PLAIN_LINES // total != (done - 1) * PLAIN_LINES // total


@contextmanager
def progress_lines(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A function (what, done, total) to call as often as there is news."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks = {}

        def show(what: str, done: int, total: int) -> None:
            if not console.is_terminal:
                if is_worth_a_line(done, total):
                    console.print(f"{what}: {done}/{total}")
                return
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield show
