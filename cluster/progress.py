"""Progress of long work: bars on a terminal, a few lines in a log."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # whoever only tells of progress, as each process of Ray's, draws none
    from rich.console import Console

OnProgress = Callable[[str, int, int], None]
"""(what is done, how many are done, of how many)."""

PLAIN_LINES = 4  # of each kind of work, where there is no terminal


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:02:03."""
    whole = math.ceil(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


class TimeLeft:
    """How much of some stages of work is done, and how long the rest takes.

    A stage that has not begun is taken to go as fast as the one that runs, by the amounts of work said of both.
    """

    def __init__(self, work: Mapping[str, float]) -> None:
        """`work`: in any one unit, of each stage in their order."""
        self._work = dict(work)
        self._done = dict.fromkeys(work, 0.0)
        self._stage = ""
        self._began = (0.0, 0.0)  # when the stage was first heard of, and how much of it was done by then
        self._seconds_per_work: float | None = None

    def update(self, stage: str, share: float, now: float) -> None:
        """`share` of a stage is done at the time `now`, in seconds."""
        if stage not in self._work:
            return
        before = list(self._work)[: list(self._work).index(stage)]
        self._done |= {name: self._work[name] for name in before} | {stage: share * self._work[stage]}
        if stage != self._stage:
            self._stage, self._began = stage, (now, self._done[stage])
        seconds, work = now - self._began[0], self._done[stage] - self._began[1]
        if seconds > 0 and work > 0:  # else what is known of the stage before has to serve
            self._seconds_per_work = seconds / work

    @property
    def share(self) -> float:
        """Of all work, that is done."""
        return sum(self._done.values()) / sum(self._work.values())

    @property
    def seconds(self) -> float | None:
        """Until all is done; None while no speed is known."""
        if self._seconds_per_work is None:
            return None
        return self._seconds_per_work * (sum(self._work.values()) - sum(self._done.values()))

    def __str__(self) -> str:
        left = "" if self.seconds is None else f", {clock(self.seconds)} left"
        return f"{self.share:.0%} of all{left}"


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

    from cluster.terminal import plain

    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks = {}
        lines = PlainLines()

        def show(what: str, done: int, total: int) -> None:
            if not console.is_terminal:
                if lines.is_due(what, done, total):
                    console.print(f"{plain(what)}: {done}/{total}", soft_wrap=True)
                return
            if what not in tasks:
                tasks[what] = bars.add_task(plain(what), total=total)
            bars.update(tasks[what], completed=done)

        yield show
