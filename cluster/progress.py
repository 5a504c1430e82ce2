"""Progress of long work: bars on a terminal, a few lines in a log."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # whoever only tells of progress, as each process of Ray's, draws none
    from rich.console import Console

OnProgress = Callable[[str, int, int], None]
"""(what is done, how many are done, of how many)."""

PLAIN_LINES = 4  # of each kind of work, where there is no terminal


class PlainLines:
    """Which news of long work are worth a line in a log: the first to come past each quarter."""

    def __init__(self) -> None:
        self._told: dict[str, int] = {}

    def is_due(self, what: str, done: int, total: int) -> bool:
        reached = done * PLAIN_LINES // max(total, 1)
        is_due = reached > self._told.get(what, 0)
        if is_due:
            self._told[what] = reached % PLAIN_LINES  # all of it done, the same work may begin anew
        return is_due


@contextmanager
def progress_lines(console: "Console") -> Iterator[OnProgress]:
    """A function (what, done, total) to call as often as there is news."""
    from rich.progress import Progress

    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks = {}
        lines = PlainLines()

        def show(what: str, done: int, total: int) -> None:
            if not console.is_terminal:
                if lines.is_due(what, done, total):
                    console.print(f"{what}: {done}/{total}")
                return
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield show
