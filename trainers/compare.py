"""The study's table: several evaluations side by side, by quality and by cost.

Figures are set against each other only where they can be: taken with the same real images, extractor, resolution and
numbers of images, or on the same device. What cannot be is shown, marked, with the reason below the table.
"""

import io
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from typing import Any, Literal

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from cluster.errors import UserError, did_you_mean
from cluster.evaluations import evaluation_document
from cluster.terminal import visible
from trainers.fidelity.evaluation import Evaluation, Measure
from trainers.fidelity.figures import MISSING, by_group, decimals, label_of, overlap, write

Better = Literal["lower", "higher"]
Mark = Literal["best", "as good", "not comparable"]
Interval = tuple[float, float]
ARROWS = {"lower": "↓", "higher": "↑"}
LEGEND = "Bold: the best of a row. Italic: its 95 % interval overlaps that of the best."


@dataclass(frozen=True)
class Cell:
    text: str
    interval: str = ""
    mark: Mark | None = None
    note: str = ""
    """Letter of the note that says why it cannot be compared."""


@dataclass(frozen=True)
class Row:
    label: str
    better: Better | None
    cells: tuple[Cell, ...]

    @property
    def heading(self) -> str:
        return f"{self.label} {ARROWS[self.better]}" if self.better else self.label


@dataclass(frozen=True)
class Table:
    """Runs as columns, figures as rows."""

    runs: tuple[str, ...]
    groups: dict[str, list[Row]]
    notes: tuple[str, ...]
    """Lettered from a."""


def open_evaluation(name: str) -> Evaluation:
    """The evaluation in a folder or s3:// prefix; or the latest of an MLflow run (its id, or runs:/ID) or of models:/…

    Raises UserError if there is none.
    """
    if re.fullmatch(r"[0-9a-f]{32}|(runs|models):/.+", name):
        return Evaluation.parse(evaluation_document(name), name)
    return Evaluation.load(name)


def compare(evaluations: Sequence[Evaluation], *, price_per_gpu_hour: float | None) -> Table:
    """Set evaluations side by side. Raises UserError with fewer than two, or if two are the same document."""
    _check(evaluations)
    notes = _Notes(_names(evaluations))
    groups: dict[str, list[Row]] = {}
    for group, measures in by_group(_all_measures(evaluations)).items():
        groups[group] = [_measure_row(name, measure, evaluations, notes) for name, measure in measures]
    groups["Cost"] = list(_cost_rows(evaluations, price_per_gpu_hour, notes))
    groups["Drawn with"] = _setting_rows(evaluations)
    groups = {group: rows for group, rows in groups.items() if rows}
    return Table(notes.runs, groups, tuple(notes.texts))


# --- what can be compared ---


@dataclass(frozen=True)
class _Entry:
    """A figure of one run, with what must be equal for it to be compared."""

    value: float
    interval: Interval | None = None
    conditions: tuple[tuple[str, Any], ...] = ()
    """(what, its value) such as ("number of images", 1000)."""


class _Notes:
    """Reasons why figures cannot be compared; each is written once."""

    def __init__(self, runs: tuple[str, ...]) -> None:
        self.runs = runs
        self.texts: list[str] = []

    def letter(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return _letter(self.texts.index(text))


def _letter(number: int) -> str:
    """a to z, then aa: a raised digit would read as a power."""
    before, last = divmod(number, 26)
    return (_letter(before - 1) if before else "") + chr(ord("a") + last)


def _check(evaluations: Sequence[Evaluation]) -> None:
    if len(evaluations) < 2:
        raise UserError("a comparison needs two evaluations or more")
    for number, evaluation in enumerate(evaluations):
        if evaluation in evaluations[:number]:
            first = evaluations.index(evaluation) + 1
            raise UserError(
                f"evaluations {first} and {number + 1} are the same, of {evaluation.model.name}: name others"
            )


def _names(evaluations: Sequence[Evaluation]) -> tuple[str, ...]:
    """The models' names; a name that comes twice is numbered."""
    names = [evaluation.model.name for evaluation in evaluations]
    return tuple(
        f"{name} ({names[: number + 1].count(name)})" if names.count(name) > 1 else name
        for number, name in enumerate(names)
    )


def _all_measures(evaluations: Sequence[Evaluation]) -> list[tuple[str, Measure]]:
    """Every measure that any run has, once."""
    return list(dict(chain.from_iterable(evaluation.measures.items() for evaluation in reversed(evaluations))).items())


def _measure_row(name: str, measure: Measure, evaluations: Sequence[Evaluation], notes: _Notes) -> Row:
    entries = [
        _Entry(found.value, found.interval, _conditions(evaluation, found))
        if (found := evaluation.measures.get(name))
        else None
        for evaluation in evaluations
    ]
    return _row(label_of(name, measure), measure.better, entries, notes)


def _conditions(evaluation: Evaluation, measure: Measure) -> tuple[tuple[str, Any], ...]:
    """The real images count also where none enter the figure: the prompts are their captions.

    They are brought to the resolution of the generated ones before features are taken, so that of another resolution
    is another reference.
    """
    reference, drawn = evaluation.reference, evaluation.generation
    extractor = evaluation.extractors.get(measure.extractor or "")
    return (
        ("real images", (reference.digest, reference.splits)),
        ("feature extractor", extractor.digest if extractor else None),
        ("resolution", drawn.resolution if drawn else None),
        ("number of images", (measure.num_generated, measure.num_real)),
    )


def _cost_rows(evaluations: Sequence[Evaluation], price: float | None, notes: _Notes) -> list[Row]:
    def row(label: str, better: Better | None, entry: Callable[[Evaluation], _Entry | None]) -> Row:
        return _row(label, better, [entry(evaluation) for evaluation in evaluations], notes)

    rows = [
        row("Parameters", None, _parameters),
        row("GPU-hours", "lower", _gpu_hours),
        row("Energy, kWh", "lower", _energy_kwh),
        row("Seconds an image", "lower", _seconds_per_image),
    ]
    if price is not None:
        rows.append(row(f"Cost at {price:g} a GPU-hour", "lower", lambda evaluation: _cost(evaluation, price)))
    return rows


def _parameters(evaluation: Evaluation) -> _Entry | None:
    count = evaluation.model.num_parameters
    return None if count is None else _Entry(count)


def _gpu_hours(evaluation: Evaluation) -> _Entry | None:
    training = evaluation.training
    return None if training.gpu_hours is None else _Entry(training.gpu_hours, None, (("device", training.device),))


def _cost(evaluation: Evaluation, price: float) -> _Entry | None:
    hours = _gpu_hours(evaluation)
    return None if hours is None else replace(hours, value=hours.value * price)


def _energy_kwh(evaluation: Evaluation) -> _Entry | None:
    energy = evaluation.training.energy_kwh
    return None if energy is None else _Entry(energy)


def _seconds_per_image(evaluation: Evaluation) -> _Entry | None:
    drawn = evaluation.generation
    if drawn is None:
        return None
    conditions = (
        *(("device", drawn.device), ("resolution", drawn.resolution)),
        *(("batch size", drawn.batch_size), ("compilation", drawn.compiled)),
    )
    return _Entry(drawn.seconds_per_image, None, conditions)


def _setting_rows(evaluations: Sequence[Evaluation]) -> list[Row]:
    drawn: list[Mapping[str, Any]] = [
        {
            **run.generation.settings,
            "resolution": run.generation.resolution,
            "batch_size": run.generation.batch_size,
            "device": run.generation.device,
            **({"compiled": True} if run.generation.compiled else {}),
        }
        if run.generation
        else {}
        for run in evaluations
    ]
    return [
        Row(name, None, tuple(Cell(str(settings.get(name, MISSING))) for settings in drawn))
        for name in dict.fromkeys(chain.from_iterable(drawn))
    ]


def _row(label: str, better: Better | None, entries: Sequence[_Entry | None], notes: _Notes) -> Row:
    """Write a row. Entries whose conditions most others do not share stay out of the search for the best."""
    known = [entry for entry in entries if entry is not None]
    whole = all(entry.value == int(entry.value) and entry.interval is None for entry in known)
    places = 0 if whole else decimals([entry.value for entry in known], [entry.interval for entry in known])
    # Of conditions equally frequent, Counter names those of the earlier run.
    common = Counter(entry.conditions for entry in known).most_common(1)[0][0] if known else ()
    fair = [entry for entry in known if entry.conditions == common]
    best = _best(fair, better) if len(fair) > 1 else None
    base = next((run for run, entry in zip(notes.runs, entries, strict=True) if entry in fair), "")

    def cell(entry: _Entry | None) -> Cell:
        if entry is None:
            return Cell(MISSING)
        bounds = ", ".join(write(bound, places) for bound in entry.interval) if entry.interval else ""
        written = Cell(write(entry.value, places), f"[{bounds}]" if bounds else "")
        if entry.conditions != common:
            pairs = zip(entry.conditions, common, strict=True)
            other = " and ".join(what for (what, value), (_, usual) in pairs if value != usual)
            return replace(
                written, mark="not comparable", note=notes.letter(f"Not comparable with {base}: other {other}.")
            )
        return replace(written, mark=_mark(entry, best))

    return Row(label, better, tuple(map(cell, entries)))


def _best(entries: Sequence[_Entry], better: Better | None) -> _Entry | None:
    if better is None:
        return None
    return (min if better == "lower" else max)(entries, key=lambda entry: entry.value)


def _mark(entry: _Entry, best: _Entry | None) -> Mark | None:
    if best is None:
        return None
    if entry.value == best.value:
        return "best"
    if entry.interval and best.interval and overlap(entry.interval, best.interval):
        return "as good"
    return None


# --- how it is written ---


def to_markdown(table: Table) -> str:
    """GitHub's Markdown: a table, its legend and notes."""
    lines = [_markdown_line(["", *map(_markdown, table.runs)]), "|:--" + "|--:" * len(table.runs) + "|"]
    for group, rows in table.groups.items():
        lines.append(_markdown_line([f"**{group}**", *[""] * len(table.runs)]))
        lines += [_markdown_line([_markdown(row.heading), *map(_markdown_cell, row.cells)]) for row in rows]
    notes = [f"<sup>{letter}</sup> {_markdown(note)}" for letter, note in _lettered(table)]
    return "\n".join([*lines, "", LEGEND, *[part for note in notes for part in ("", note)], ""])


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _markdown_cell(cell: Cell) -> str:
    wrap = {"best": "**", "as good": "*"}.get(cell.mark or "", "")
    note = f"<sup>{cell.note}</sup>" if cell.note else ""
    return " ".join(filter(None, [f"{wrap}{_markdown(cell.text)}{wrap}", cell.interval])) + note


def _markdown(text: str) -> str:
    escaped = re.sub(r"([\\`*_\[\]|~])", r"\\\1", " ".join(text.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def to_latex(table: Table) -> str:
    """A `table` environment in the manner of booktabs, to be \\input; needs \\usepackage{booktabs}."""
    columns = len(table.runs) + 1
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \begin{{tabular}}{{l{'r' * len(table.runs)}}}",
        r"    \toprule",
        "    " + _latex_line(["", *map(_latex, table.runs)]),
    ]
    for group, rows in table.groups.items():
        lines += [r"    \midrule", rf"    \multicolumn{{{columns}}}{{l}}{{\emph{{{_latex(group)}}}}} \\"]
        lines += ["    " + _latex_line([_latex(row.heading), *map(_latex_cell, row.cells)]) for row in rows]
    notes = "".join(rf" \textsuperscript{{{letter}}}\,{_latex(note)}" for letter, note in _lettered(table))
    lines += [r"    \bottomrule", r"  \end{tabular}", rf"  \caption{{{_latex(LEGEND)}{notes}}}", r"\end{table}", ""]
    return "\n".join(lines)


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _latex_cell(cell: Cell) -> str:
    command = {"best": r"\textbf", "as good": r"\textit"}.get(cell.mark or "")
    text = rf"{command}{{{_latex(cell.text)}}}" if command else _latex(cell.text)
    note = rf"\textsuperscript{{{cell.note}}}" if cell.note else ""
    return " ".join(filter(None, [text, rf"{{\footnotesize {_latex(cell.interval)}}}" if cell.interval else ""])) + note


_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "∞": r"$\infty$",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "−": "$-$",
    "–": "--",
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def render(table: Table, console: Console) -> None:
    """Print the table with its legend and notes."""
    shown = RichTable()
    shown.add_column("")
    for run in table.runs:
        shown.add_column(Text(visible(run)), justify="right", overflow="fold")
    for group, rows in table.groups.items():
        shown.add_section()
        shown.add_row(Text(group, "dim"))
        for row in rows:
            shown.add_row(Text(visible(row.heading)), *map(_terminal_cell, row.cells))
    console.print(shown)
    console.print(LEGEND, soft_wrap=True)
    for letter, note in _lettered(table):
        console.print(Text(f"({letter}) {visible(note)}"), soft_wrap=True)


def _terminal_cell(cell: Cell) -> Text:
    styles = {"best": "bold green", "as good": "italic green", "not comparable": "dim"}
    text = Text(visible(cell.text), styles.get(cell.mark or "", ""))
    if cell.interval:
        text.append(f" {cell.interval}", "dim")
    if cell.note:
        text.append(f" ({cell.note})", "dim")
    return text


def _lettered(table: Table) -> list[tuple[str, str]]:
    return [(_letter(number), note) for number, note in enumerate(table.notes)]


# --- quality against cost ---

COSTS = ("cost", "gpu-hours", "energy", "seconds")
INK, MUTED, AXIS, GRID, ACCENT = "#1b1f24", "#5d6773", "#c5cbd3", "#eceef1", "#0b6e66"
FONT_SIZE, LINE_HEIGHT, LABEL_WIDTH = 10, 13, 150  # points


def quality_cost_plot(
    evaluations: Sequence[Evaluation],
    *,
    price_per_gpu_hour: float | None,
    measure: str | None = None,
    against: str | None = None,
) -> bytes:
    """A PNG of one measure, with its interval, against what the runs cost; what cannot be compared is left out.

    `measure` is a name in the evaluations, by default the first that two runs have; `against` is one of COSTS, by
    default the first that two runs have. Raises UserError if fewer than two runs have both and can be compared.
    """
    costs = _costs(price_per_gpu_hour)
    known = [name for _, group in by_group(_all_measures(evaluations)).items() for name, _ in group]
    for what, chosen, choices in (("measure", measure, known), ("cost", against, [*costs])):
        if chosen is not None and chosen not in choices:
            hint = did_you_mean(chosen, choices)
            price = "; cost needs a price" if chosen == "cost" else ""
            raise UserError(f"no {what} '{chosen}' to plot: {hint}there are {', '.join(choices) or 'none'}{price}")

    runs = list(zip(_names(evaluations), evaluations, strict=True))
    for key, kind in product([measure] if measure else known, [against] if against else costs):
        cost_label, entry = costs[kind]
        points = _comparable(
            [
                _Point(run, cost, found, (*_conditions(evaluation, found), *cost.conditions))
                for run, evaluation in runs
                if (found := evaluation.measures.get(key)) and (cost := entry(evaluation))
            ]
        )
        if len(points) > 1:
            shown = {point.run for point in points}
            left_out = [run for run, _ in runs if run not in shown]
            return _plot(points, label_of(key, points[0].measure), cost_label, left_out)
    of = " and ".join(filter(None, [measure, against]))
    raise UserError(f"nothing to plot{f' of {of}' if of else ''}: fewer than two runs have figures that compare")


@dataclass(frozen=True)
class _Point:
    run: str
    cost: _Entry
    measure: Measure
    conditions: tuple[tuple[str, Any], ...]


def _costs(price: float | None) -> dict[str, tuple[str, Callable[[Evaluation], _Entry | None]]]:
    costs: dict[str, tuple[str, Callable[[Evaluation], _Entry | None]]] = {}
    if price is not None:
        costs["cost"] = (f"Cost of training, at {price:g} a GPU-hour", lambda evaluation: _cost(evaluation, price))
    costs["gpu-hours"] = ("GPU-hours of training", _gpu_hours)
    costs["energy"] = ("Energy of training, kWh", _energy_kwh)
    costs["seconds"] = ("Seconds to draw an image", _seconds_per_image)
    return costs


def _comparable(points: Sequence[_Point]) -> list[_Point]:
    """Those taken under the conditions that most share."""
    frequent = Counter(point.conditions for point in points).most_common(1)
    return [point for point in points if point.conditions == frequent[0][0]]


def _plot(points: Sequence[_Point], measure_label: str, cost_label: str, left_out: Sequence[str]) -> bytes:
    """Each run as a dot with its interval and its name beside it; costs on a log scale where they differ tenfold."""
    # matplotlib takes a second to import, and a table does without.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(7.2, 4.6), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for point in points:
        x, y = point.cost.value, point.measure.value
        if point.measure.interval:
            axes.plot([x, x], point.measure.interval, color=ACCENT, alpha=0.4, linewidth=3, solid_capstyle="round")
        axes.plot(x, y, "o", color=ACCENT, markersize=7, markeredgecolor="white")

    axes.margins(x=0.3, y=0.15)
    costs = [point.cost.value for point in points]
    if min(costs) > 0 and max(costs) >= 10 * min(costs):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda cost, _: f"{cost:,g}")
    better = points[0].measure.better
    axes.set_xlabel(f"{cost_label} (lower is better)", color=MUTED)
    # Names are text, not formulas: a dollar sign in one would be read as mathematics.
    axes.set_ylabel(f"{measure_label} ({better} is better)" if better else measure_label, color=MUTED, parse_math=False)
    if left_out:
        said = f"Left out, for want of figures to compare: {', '.join(left_out)}"
        axes.set_title(said, loc="left", color=MUTED, fontsize=8, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(AXIS)
    axes.tick_params(color=AXIS, labelcolor=MUTED)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)

    figure.canvas.draw()  # where points come to lie is known only now
    places = axes.transData.transform([(point.cost.value, point.measure.value) for point in points]) * 72 / figure.dpi
    for point, rise in zip(points, _rises(places.tolist()), strict=True):
        axes.annotate(
            point.run,
            (point.cost.value, point.measure.value),
            (9, rise),
            textcoords="offset points",
            va="center",
            color=INK,
            fontsize=FONT_SIZE,
            parse_math=False,
        )
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()


def _rises(places: Sequence[Sequence[float]]) -> list[float]:
    """How far above its point each label goes, so that it lies on no other; all in points."""
    heights: dict[int, float] = {}
    for number in sorted(range(len(places)), key=lambda number: places[number][1]):
        x, y = places[number]
        near = [height for other, height in heights.items() if abs(places[other][0] - x) < LABEL_WIDTH]
        # Lower points were placed before: the label goes onto the pile that they make, if it reaches up to here.
        heights[number] = max([y, *(height + LINE_HEIGHT for height in near)])
    return [heights[number] - place[1] for number, place in enumerate(places)]
