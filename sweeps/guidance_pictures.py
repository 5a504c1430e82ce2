"""The pictures of a guidance sweep."""

import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from sweeps.guidance_document import GuidanceSweep, SettingResult
from trainers.fidelity.evaluation import Measure
from trainers.fidelity.figures import label_of

MARKERS = "osD^vP"
RECOMMENDED = "#c0392b"
NAMES = {
    "guidance_scale": "guidance scale",
    "true_cfg_scale": "true CFG scale",
    "num_inference_steps": "steps",
    "sampler": "sampler",
}
ARROWS = {"lower": "← better", "higher": "better →", None: ""}


def draw_front(sweep: GuidanceSweep) -> Figure:
    """Fidelity over alignment, a point a setting with its 95 % intervals, and the settings that none beats in both.

    Colour is the guidance scale (true CFG, where only that was swept), form the sampler, size the steps.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    scale = swept_scale(sweep)
    scales = [result.setting[scale] for result in sweep.settings]
    colours = ScalarMappable(Normalize(min(scales), max(scales)), "viridis")
    samplers = list(dict.fromkeys(result.setting["sampler"] for result in sweep.settings))
    most_steps = max(result.setting["num_inference_steps"] for result in sweep.settings)

    def place(result: SettingResult) -> tuple[Measure, Measure]:
        return result.measures[sweep.alignment], result.measures[sweep.fidelity]

    for result in sweep.settings:
        (x, y), setting = place(result), result.setting
        colour = colours.to_rgba(setting[scale])
        bars: dict[str, Any] = {"xerr": _beside(x), "yerr": _beside(y), "elinewidth": 0.7, "alpha": 0.35}
        axes.errorbar(x.value, y.value, **bars, fmt="none", ecolor=colour, zorder=1)
        axes.scatter(
            x.value,
            y.value,
            s=40 + 80 * setting["num_inference_steps"] / most_steps,
            marker=MARKERS[samplers.index(setting["sampler"]) % len(MARKERS)],
            color=[colour],
            edgecolors="black",
            linewidths=0.6,
            zorder=3,
        )
    front = [place(sweep.result(name)) for name in sweep.front]
    axes.plot([x.value for x, _ in front], [y.value for _, y in front], color="black", linewidth=1, zorder=2)
    for name, (x, y) in zip(sweep.front, front, strict=True):
        if name != sweep.recommended:
            axes.annotate(
                _short(sweep.result(name).setting),
                (x.value, y.value),
                xytext=(9, -12),
                textcoords="offset points",
                size=7,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
                zorder=5,
            )
    x, y = place(sweep.best)
    axes.scatter(x.value, y.value, s=330, facecolors="none", edgecolors=RECOMMENDED, linewidths=2, zorder=4)
    axes.annotate(
        f"recommended: {_short(sweep.best.setting)}",
        (x.value, y.value),
        xytext=(12, -16),
        textcoords="offset points",
        color=RECOMMENDED,
        weight="bold",
        size=8,
    )
    axes.set_xlabel(f"{label_of(sweep.alignment, x)}   {ARROWS[x.better]}")
    axes.set_ylabel(f"{label_of(sweep.fidelity, y)}   {ARROWS[y.better]}")
    axes.set_title(
        f"{_end(sweep.model.name)}: {len(sweep.settings)} settings, {len(sweep.samples)} images each beside "
        f"{sweep.reference.num_images} real ones",
        size=10,
        loc="left",
    )
    axes.grid(alpha=0.2)
    figure.colorbar(colours, ax=axes, label=NAMES[scale])
    handles: list[Any] = [
        Line2D([], [], marker=MARKERS[i % len(MARKERS)], color="grey", linestyle="", label=sampler)
        for i, sampler in enumerate(samplers)
    ]
    handles += [Line2D([], [], color="black", linewidth=1, label="Pareto front")]
    axes.legend(handles=handles, fontsize=8, title=f"size: steps, up to {most_steps}", title_fontsize=8)
    return figure


def draw_grid(
    sweep: GuidanceSweep,
    pictures: Sequence[Sequence[Image.Image]],
    columns: Sequence[SettingResult],
    rows: Sequence[str],
) -> Figure:
    """`pictures` by prompt (`rows`) and setting (`columns`), which differ in their scale alone."""
    axis = swept_scale(sweep)
    side = 1.35
    left, top = 1.9, 0.75
    figure = Figure(figsize=(left + side * max(len(columns), 3), top + side * len(rows)))
    size = figure.get_size_inches()
    grid = figure.subplots(
        len(rows),
        len(columns),
        squeeze=False,
        gridspec_kw={
            "left": left / size[0],
            "right": (left + side * len(columns)) / size[0],
            "top": 1 - top / size[1],
            "bottom": 0.01,
            "wspace": 0.04,
            "hspace": 0.04,
        },
    )
    for row, (prompt, images) in enumerate(zip(rows, pictures, strict=True)):
        for column, (result, image) in enumerate(zip(columns, images, strict=True)):
            axes = grid[row][column]
            axes.imshow(image)
            axes.set(xticks=[], yticks=[])
            is_recommended = result.name == sweep.recommended
            for spine in axes.spines.values():
                spine.set(visible=is_recommended, color=RECOMMENDED, linewidth=2)
            if row == 0:
                colour, weight = (RECOMMENDED, "bold") if is_recommended else ("black", "normal")
                axes.set_title(f"{result.setting[axis]:g}", size=9, color=colour, weight=weight)
            if column == 0:
                label = textwrap.fill(textwrap.shorten(prompt, 90, placeholder=" …"), 26)
                axes.set_ylabel(label, rotation=0, ha="right", va="center", size=7)
    others = ", ".join(
        value if name == "sampler" else f"{NAMES[name]} {value:g}"
        for name, value in sweep.best.setting.items()
        if name != axis
    )
    figure.text(0.01, 1 - 0.12 / size[1], f"{NAMES[axis]} → (red: recommended)", va="top", size=9, weight="bold")
    figure.text(0.01, 1 - 0.34 / size[1], f"{others}; each row the same noise", va="top", size=8)
    return figure


def swept_scale(sweep: GuidanceSweep) -> str:
    """The scale with more values: FLUX has two."""
    guidance, cfg = ({r.setting.get(name) for r in sweep.settings} for name in ("guidance_scale", "true_cfg_scale"))
    return "true_cfg_scale" if len(cfg) > len(guidance) else "guidance_scale"


def _short(setting: dict[str, Any]) -> str:
    """3.5 · 30 steps · ddim"""
    cfg = f" · CFG {setting['true_cfg_scale']:g}" if "true_cfg_scale" in setting else ""
    return f"{setting['guidance_scale']:g}{cfg} · {setting['num_inference_steps']} steps · {setting['sampler']}"


def _end(name: str, most: int = 40) -> str:
    """Where a name is long, as that of a folder, its end."""
    return name if len(name) <= most else f"…{name[-most:]}"


def _beside(measure: Measure) -> list[list[float]] | None:
    """The interval as matplotlib's distances below and above the value."""
    if measure.interval is None:
        return None
    low, high = measure.interval
    return [[max(measure.value - low, 0)], [max(high - measure.value, 0)]]
