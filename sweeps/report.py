"""The pictures of a sweep over recipes: PNG files by matplotlib, and Optuna's own interactive ones in one page.

The page needs nothing beside it and asks for nothing from anywhere: plotly's script is in it.
"""

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import optuna
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState
from plotly.colors import sample_colorscale
from plotly.io import to_html

from sweeps.pareto import pareto_front
from sweeps.spec import SweepSpec, Trial

PAGE = "sweep.html"
STATES = {"finished": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}
BEST, POINT, STOPPED = "#c0392b", "#2c5f8a", "#9aa7b1"
MISSING = "–"  # where a trial has no such key
HISTORY, PARETO = "Optimisation history", "Pareto front"
VISIBLE = [[0, "#8fb8de"], [1, "#08306b"]]  # colours of the page's figures: Optuna's begin with white
VISIBLE_BEST = [[0, "#f0907f"], [1, "#8e1408"]]
WHITE = 247.0  # red in the palest of Optuna's blues; the darkest has next to none
MOST_TICKS = 10
SPREAD = 50  # values further apart than this, as a ratio, are shown on a logarithmic scale


def write_sweep_report(trials: Sequence[Trial], spec: SweepSpec, out: Path) -> list[Path]:
    """Write what the trials so far show to the folder `out`; the files written, pictures first.

    history.png, slice.png, parallel-coordinates.png, pareto.png, importances.png and sweep.html. Trials that run or
    have no value are left out of what needs one; with none that has, nothing is written, and importances only where
    two keys or more explain the difference of finished trials: of one key alone it is always 1.
    """
    out.mkdir(parents=True, exist_ok=True)
    judged = [trial for trial in trials if trial.value is not None and math.isfinite(trial.value)]
    if not judged:
        return []
    study = study_of(trials, spec)
    importances = importances_of(study)
    importances = importances if len(importances) > 1 else {}
    figures: dict[str, Figure] = {
        "history": _history(judged, trials, spec),
        "slice": _slices(judged, spec),
        "parallel-coordinates": _parallel_coordinates(judged, spec),
        "pareto": _pareto(judged, spec),
    }
    if importances:
        figures["importances"] = _importances(importances, spec)
    written = []
    for name, figure in figures.items():
        written.append(out / f"{name}.png")
        figure.savefig(written[-1], dpi=120, metadata={"Software": "medsynth"})
    written.append(out / PAGE)
    written[-1].write_text(_page(study, judged, spec, has_importances=bool(importances)))
    return written


def study_of(trials: Sequence[Trial], spec: SweepSpec) -> optuna.Study:
    """The trials as Optuna knows them: stopped ones are pruned, diverged ones failed, running ones left out."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it tells that it made a study
    study = optuna.create_study(
        study_name=spec.name, direction="minimize" if spec.objective.mode == "min" else "maximize"
    )
    distributions = {key: _distribution(key, trials, spec) for key in spec.space}
    for trial in trials:
        if trial.state not in STATES:
            continue
        is_judged = trial.value is not None and math.isfinite(trial.value)
        state = STATES[trial.state] if is_judged else TrialState.FAIL
        params = {key: _plain(value) for key, value in trial.params.items() if key in distributions}
        study.add_trial(
            optuna.create_trial(
                state=state,
                value=trial.value if state == TrialState.COMPLETE else None,
                params=params,
                distributions={key: distributions[key] for key in params},
                user_attrs={"trial": trial.number, "steps": trial.steps, "seconds": trial.seconds},
                intermediate_values={s: v for s, v in trial.intermediate.items() if math.isfinite(v)},
            )
        )
    return study


def importances_of(study: optuna.Study) -> dict[str, float]:
    """How much of the objective's variance over the finished trials each key explains, largest first; together 1.

    By functional ANOVA on a random forest (Hutter et al. 2014, "An Efficient Approach for Assessing Hyperparameter
    Importance"); of keys that every finished trial has. Empty where fewer than two trials differ.
    """
    finished = study.get_trials(states=[TrialState.COMPLETE])
    shared = set.intersection(*(set(trial.params) for trial in finished)) if finished else set()
    varied = sorted(key for key in shared if len({trial.params[key] for trial in finished}) > 1)
    if not varied or len({trial.value for trial in finished}) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return optuna.importance.get_param_importances(study, evaluator=evaluator, params=varied)


# --- pictures ---


def _history(judged: Sequence[Trial], trials: Sequence[Trial], spec: SweepSpec) -> Figure:
    figure, axes = _axes()
    _scatter(axes, judged, lambda trial: trial.number)
    best: list[float] = []
    better = min if spec.objective.mode == "min" else max
    finished = [trial for trial in judged if trial.state == "finished"]
    for trial in finished:
        best.append(better([_value(trial), *best[-1:]]))
    axes.plot(
        [trial.number for trial in finished],
        best,
        color=BEST,
        linewidth=1.5,
        drawstyle="steps-post",
        label="best so far",
    )
    for number, trial in enumerate(trial for trial in trials if trial.state == "failed"):
        axes.axvline(trial.number, color="black", linestyle=":", linewidth=1, label=None if number else "failed")
    _value_axis(axes, judged, spec)
    axes.set_xlabel("trial")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(_title(spec, judged), size=10, loc="left")
    axes.legend(fontsize=8)
    return figure


def _slices(judged: Sequence[Trial], spec: SweepSpec) -> Figure:
    """The objective over each key of the space."""
    keys = list(spec.space)
    columns = min(len(keys), 3)
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(max(4 * columns, 6), 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for panel in panels.flat[len(keys) :]:
        panel.remove()
    for key, axes in zip(keys, panels.flat, strict=False):
        scale = _Scale.of(key, judged, spec)
        have = [trial for trial in judged if key in trial.params]
        _scatter(axes, have, partial(_place_of, key, scale))
        axes.set_xticks(scale.ticks, scale.labels, size=8)
        axes.set_xlim(-0.08, 1.08)
        axes.set_xlabel(key, size=9)
        axes.grid(alpha=0.2)
        _log_if_spread(axes, judged)
    for row in panels:
        row[0].set_ylabel(_objective(spec))
    panels[0][0].legend(fontsize=8)
    figure.suptitle(_title(spec, judged), size=10, x=0.01, ha="left")
    return figure


def _parallel_coordinates(judged: Sequence[Trial], spec: SweepSpec) -> Figure:
    """A line a trial over all keys and the objective, from poor (pale) to good; the best one is red."""
    ordered = sorted(judged, key=_value, reverse=spec.objective.mode == "min")  # the best is drawn last
    values = [_value(trial) for trial in judged]
    scales = [_Scale.of(key, judged, spec) for key in spec.space] + [_Scale.of_numbers(values, _is_spread(values))]
    names = [*spec.space, _objective(spec)]
    figure = Figure(figsize=(max(2.4 * len(names), 7), 5), layout="constrained")
    axes = figure.add_subplot()
    blues = colormaps["Blues"]
    best = max((trial for trial in ordered if trial.state == "finished"), key=ordered.index, default=ordered[-1])
    for rank, trial in enumerate([*(trial for trial in ordered if trial is not best), best], start=1):
        places = [scale.place(trial.params.get(key)) for key, scale in zip(spec.space, scales, strict=False)]
        is_best = trial is best
        axes.plot(
            range(len(names)),
            [*places, scales[-1].place(trial.value)],
            color=BEST if is_best else blues(0.25 + 0.75 * rank / len(ordered)),
            linewidth=2.2 if is_best else 1.1,
            linestyle="--" if trial.state == "stopped" else "-",
            zorder=rank,
        )
    for position, scale in enumerate(scales):
        axes.axvline(position, color="black", linewidth=0.8, zorder=len(ordered) + 2)
        for tick, label in zip(scale.ticks, scale.labels, strict=True):
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
            axes.text(position + 0.03, tick, label, size=8, va="center", bbox=box, zorder=len(ordered) + 3)
    axes.set_xlim(-0.15, len(names) - 0.55)
    axes.set_xticks(range(len(names)), [name.replace(".", ".\n").replace("/", "/\n") for name in names], size=8)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_title(f"{_title(spec, judged)}; red: the best, trial {best.number}; dashed: stopped", size=10, loc="left")
    return figure


def _pareto(judged: Sequence[Trial], spec: SweepSpec) -> Figure:
    """The objective over the steps that it took, and the trials that none beats in both."""
    figure, axes = _axes()
    _scatter(axes, judged, lambda trial: trial.steps)
    sign = 1 if spec.objective.mode == "min" else -1
    front = [judged[i] for i in pareto_front([(float(trial.steps), sign * _value(trial)) for trial in judged])]
    axes.plot(
        [trial.steps for trial in front],
        [_value(trial) for trial in front],
        color=BEST,
        linewidth=1.5,
        drawstyle="steps-post",
        label="Pareto front",
    )
    for trial in front:
        axes.annotate(
            f"trial {trial.number}", (trial.steps, _value(trial)), xytext=(5, 6), textcoords="offset points", size=7
        )
    _value_axis(axes, judged, spec)
    axes.set_xlabel("optimization steps")
    axes.margins(x=0.09)  # room for the names
    axes.set_title(_title(spec, judged), size=10, loc="left")
    axes.legend(fontsize=8)
    return figure


def _importances(importances: dict[str, float], spec: SweepSpec) -> Figure:
    figure = Figure(figsize=(8, 1.4 + 0.45 * len(importances)), layout="constrained")
    axes = figure.add_subplot()
    names = list(importances)[::-1]
    bars = axes.barh(names, [importances[name] for name in names], color=POINT, height=0.6)
    axes.bar_label(bars, fmt="%.2f", padding=3, size=8)
    axes.set_xlim(0, 1.08)
    axes.set_xlabel(f"importance for {spec.objective.metric} (fANOVA; all together 1)", size=9)
    axes.set_title(spec.name, size=10, loc="left")
    return figure


# --- the page ---


def _page(study: optuna.Study, judged: Sequence[Trial], spec: SweepSpec, *, has_importances: bool) -> str:
    """Optuna's interactive figures, one below the other."""
    target = spec.objective.metric
    plots = optuna.visualization
    figures: dict[str, Any] = {
        HISTORY: plots.plot_optimization_history(study, target_name=target),
        "Parallel coordinates": plots.plot_parallel_coordinate(study, target_name=target),
        "Slices": plots.plot_slice(study, target_name=target),
        PARETO: plots.plot_pareto_front(_with_costs(judged, spec), target_names=["steps", target]),
        "Learning curves": plots.plot_intermediate_values(study),
    }
    if has_importances:
        figures["Importances"] = plots.plot_param_importances(
            study,
            evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0),
            params=list(importances_of(study)),
            target_name=target,
        )
    sections: list[str] = []
    last = max(trial.number for trial in judged)
    figures[HISTORY].update_xaxes(range=[-0.5, last + 0.5], tickformat="d", dtick=_whole_step(last))
    _make_lines_readable(figures["Parallel coordinates"], study, spec)
    steps = [trial.steps for trial in judged]
    room = 0.05 * max(steps)
    figures[PARETO].update_xaxes(range=[min(steps) - room, max(steps) + room], tickformat=",d")
    if len(set(steps)) <= MOST_TICKS:
        figures[PARETO].update_xaxes(tickvals=sorted(set(steps)))
    for name, figure in figures.items():
        figure.update_layout(title=None, margin={"t": 30})
        _make_readable(figure, study, spec)
        html = to_html(
            figure,
            full_html=False,
            include_plotlyjs=not sections,
            div_id=name.replace(" ", "-"),
            config={"displaylogo": False},
        )
        sections.append(f"<h2>{escape(name)}</h2>\n{html}")
    allowed = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{allowed}">
<title>{escape(spec.name)}</title>
<style>body {{ font-family: system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }}</style>
</head>
<body>
<h1>Sweep {escape(spec.name)}</h1>
<p>{len(study.trials)} trials; objective: {escape(_objective(spec))}. Only finished trials are in the figures, but for
the Pareto front and the learning curves, where stopped ones are too.</p>
{"".join(sections)}
</body>
</html>
"""


def _make_readable(figure: Any, study: optuna.Study, spec: SweepSpec) -> None:
    """No mark as pale as the paper, no fraction of a trial, and keys by names that fit."""
    names = _short_names(list(spec.space))
    last = max((trial.number for trial in study.trials), default=0)
    for trace in figure.data:
        if trace.type != "scatter" or not trace.marker.colorscale:
            continue
        title = trace.marker.colorbar.title.text
        trace.marker.colorscale = VISIBLE_BEST if title == "Best Trial" else VISIBLE
        if title in ("Trial", "Best Trial"):
            trace.marker.update(cmin=0, cmax=max(last, 1))
            trace.marker.colorbar.update(tickformat="d", dtick=_whole_step(last))
    figure.for_each_xaxis(lambda axis: axis.update(title_text=names.get(axis.title.text, axis.title.text)))


def _make_lines_readable(figure: Any, study: optuna.Study, spec: SweepSpec) -> None:
    """Parallel coordinates: Optuna draws the worst trial's line in white, and cuts the keys' names."""
    lines = [trace for trace in figure.data if trace.mode == "lines" and str(trace.line.color).startswith("rgb")]
    reds = [float(trace.line.color.removeprefix("rgb(").partition(",")[0]) for trace in lines]
    for trace, red in zip(lines, reds, strict=True):
        trace.line.color = sample_colorscale(VISIBLE, [(WHITE - red) / WHITE])[0]
        trace.opacity = 0.9
    names = _short_names(list(spec.space))
    keys = sorted({key for trial in study.trials for key in trial.params})
    figure.update_xaxes(ticktext=[spec.objective.metric, *(names[key] for key in keys)])


def _whole_step(last: int) -> int:
    """Between ticks of trials 0 to `last`."""
    return max(1, -(-last // MOST_TICKS))


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """The keys' last parts, where these tell them apart."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def _with_costs(judged: Sequence[Trial], spec: SweepSpec) -> optuna.Study:
    """A study of two objectives, the steps being the other one; stopped trials are in it too."""
    study = optuna.create_study(directions=["minimize", "minimize" if spec.objective.mode == "min" else "maximize"])
    for trial in judged:
        values = [float(trial.steps), _value(trial)]
        study.add_trial(optuna.create_trial(values=values, user_attrs={"trial": trial.number} | trial.params))
    return study


# --- what pictures have in common ---


class _Scale:
    """Places from 0 to 1 for the values of a key, with ticks."""

    def __init__(self, place: Callable[[Any], float], ticks: dict[float, str]) -> None:
        self.place = place
        self.ticks, self.labels = list(ticks), list(ticks.values())

    @classmethod
    def of(cls, key: str, trials: Sequence[Trial], spec: SweepSpec) -> "_Scale":
        axis = spec.space[key]
        found = [trial.params[key] for trial in trials if key in trial.params]
        is_everywhere = len(found) == len(trials)
        if axis.values:
            names = list(dict.fromkeys(str(_plain(value)) for value in (*axis.values, *found)))
            names += [] if is_everywhere else [MISSING]
            places = {name: (i + 0.5) / len(names) for i, name in enumerate(names)}
            return cls(
                lambda value: places[MISSING if value is None and MISSING in places else str(_plain(value))],
                {place: name for name, place in places.items()},
            )
        bounds = [*(axis.loguniform or axis.uniform or ()), *found]
        return cls.of_numbers(bounds, axis.loguniform is not None, has_missing=not is_everywhere)

    @classmethod
    def of_numbers(cls, values: Sequence[float], is_log: bool, *, has_missing: bool = False) -> "_Scale":
        turn: Callable[[float], float] = math.log10 if is_log else float
        low, high = turn(min(values)), turn(max(values))
        bottom = 0.12 if has_missing else 0.0  # below: where there is no value
        width = (high - low) or 1.0

        def place(value: float | None) -> float:
            return 0.0 if value is None else bottom + (1 - bottom) * (turn(value) - low) / width

        steps = [low + width * i / 4 for i in range(5)] if high > low else [low]
        ticks = {bottom + (1 - bottom) * (step - low) / width: f"{10**step if is_log else step:.3g}" for step in steps}
        return cls(place, ({0.0: MISSING} if has_missing else {}) | ticks)


def _place_of(key: str, scale: _Scale, trial: Trial) -> float:
    return scale.place(trial.params[key])


def _distribution(key: str, trials: Sequence[Trial], spec: SweepSpec) -> BaseDistribution:
    """Of the space, widened to what trials had: those that went on from another may have left it."""
    axis = spec.space[key]
    found = [trial.params[key] for trial in trials if key in trial.params]
    if axis.values:
        return CategoricalDistribution(list(dict.fromkeys(_plain(value) for value in (*axis.values, *found))))
    bounds = [*(axis.loguniform or axis.uniform or ()), *found]
    return FloatDistribution(min(bounds), max(bounds), log=axis.loguniform is not None)


def _plain(value: Any) -> Any:
    """Lists and blocks of a recipe as text, for Optuna knows only single values."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.2)
    return figure, axes


def _scatter(axes: Axes, trials: Sequence[Trial], place: Callable[[Trial], float]) -> None:
    kinds: tuple[tuple[str, list[Trial], dict[str, Any]], ...] = (
        ("finished", [t for t in trials if t.state == "finished"], {"color": POINT}),
        ("not finished", [t for t in trials if t.state != "finished"], {"facecolors": "none", "edgecolors": STOPPED}),
    )
    for label, chosen, style in kinds:
        if chosen:
            axes.scatter([place(t) for t in chosen], [_value(t) for t in chosen], s=34, label=label, zorder=3, **style)


def _value_axis(axes: Axes, trials: Sequence[Trial], spec: SweepSpec) -> None:
    axes.set_ylabel(_objective(spec))
    _log_if_spread(axes, trials)


def _log_if_spread(axes: Axes, trials: Sequence[Trial]) -> None:
    if _is_spread([_value(trial) for trial in trials]):
        axes.set_yscale("log")


def _is_spread(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) > SPREAD


def _value(trial: Trial) -> float:
    assert trial.value is not None
    return trial.value


def _objective(spec: SweepSpec) -> str:
    return f"{spec.objective.metric} ({'less' if spec.objective.mode == 'min' else 'more'} is better)"


def _title(spec: SweepSpec, judged: Sequence[Trial]) -> str:
    return f"{spec.name}: {len(judged)} trials"
