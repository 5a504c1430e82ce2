"""How figures are named, grouped and written, the same in reports and in comparisons."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from trainers.fidelity.evaluation import STANDARD_EXTRACTORS, Measure

GROUPS = {
    "Fidelity": "how near the generated images come to real ones",
    "Alignment": "whether images show what their prompts ask for",
    "Diversity": "how much of the real images' variety is there",
    "Memorisation": "whether training images were copied",
    "Other": "",
}
MISSING = "–"
MOST_DECIMALS = 6


@dataclass(frozen=True)
class Metric:
    label: str
    group: str
    is_share: bool = False
    """Whether it lies between 0 and 1, so that such figures can be drawn on one scale."""


METRICS = {
    "fid": Metric("FID", "Fidelity"),
    "fid_infinity": Metric("FID∞", "Fidelity"),
    "kid": Metric("KID", "Fidelity"),
    "cmmd": Metric("CMMD × 1000", "Fidelity"),
    "inception_score": Metric("Inception score", "Fidelity"),
    "precision": Metric("Precision", "Fidelity", is_share=True),
    "f1": Metric("F1 of precision and recall", "Fidelity", is_share=True),
    "density": Metric("Density", "Fidelity"),
    "clip_score": Metric("CLIP score", "Alignment"),
    "caption_alignment": Metric("Caption alignment", "Alignment", is_share=True),
    "recall": Metric("Recall", "Diversity", is_share=True),
    "coverage": Metric("Coverage", "Diversity", is_share=True),
    "ms_ssim": Metric("MS-SSIM within a prompt", "Diversity", is_share=True),
    "copy_rate": Metric("Copy rate", "Memorisation", is_share=True),
    "nearer_to_training": Metric("Nearer to training images", "Memorisation", is_share=True),
    "nearer_to_training_p_value": Metric("Nearer to training images, p-value", "Memorisation"),
}
_ORDER = list(METRICS)


def metric_of(name: str, measure: Measure) -> Metric:
    """The metric behind a measure's name, which may end in the extractor's label: `fid_random_vgg`."""
    bare = _bare_name(name, measure)
    return METRICS.get(bare) or Metric(bare.replace("_", " ").capitalize(), "Other")


def label_of(name: str, measure: Measure) -> str:
    """For people: `FID` with the extractor it was published with, else `FID (random_vgg)`."""
    label = metric_of(name, measure).label
    is_plain = measure.extractor is None or STANDARD_EXTRACTORS.get(_bare_name(name, measure)) == measure.extractor
    return label if is_plain else f"{label} ({measure.extractor})"


def by_group(measures: Iterable[tuple[str, Measure]]) -> dict[str, list[tuple[str, Measure]]]:
    """Named measures by group, groups and measures in the order people read them; no group is empty."""
    groups: dict[str, list[tuple[str, Measure]]] = {group: [] for group in GROUPS}
    for name, measure in sorted(measures, key=lambda item: _position(*item)):
        groups[metric_of(name, measure).group].append((name, measure))
    return {group: found for group, found in groups.items() if found}


def decimals(values: Iterable[float], intervals: Iterable[tuple[float, float] | None] = ()) -> int:
    """Decimals to write figures of one kind with: two digits of the narrowest interval, else three of the smallest."""
    widths = [high - low for low, high in filter(None, intervals) if high > low]
    if widths:
        digits = 1 - _exponent(min(widths))
    else:
        digits = 2 - min((_exponent(abs(value)) for value in values if value), default=2)
    return min(max(digits, 0), MOST_DECIMALS)


def write(value: float, places: int) -> str:
    """1234.5 -> 1,234.50 with two places; never a negative zero."""
    return f"{round(value, places) + 0.0:,.{places}f}".replace("-", "−")


def what_is_best(measure: Measure) -> str:
    """An arrow; the best value itself, where neither lower nor higher is better; or nothing."""
    if measure.better is None:
        return "" if measure.chance is None else f"{measure.chance:g} is best"
    return "↓" if measure.better == "lower" else "↑"


def overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]


def _bare_name(name: str, measure: Measure) -> str:
    return name.removesuffix(f"_{measure.extractor}") if measure.extractor else name


def _position(name: str, measure: Measure) -> tuple[bool, str, int, str]:
    """First figures on the features that papers use, last those on pixels; those on the same features together."""
    bare, features = _bare_name(name, measure), measure.extractor or "~"
    return (
        features not in STANDARD_EXTRACTORS.values(),
        features,
        _ORDER.index(bare) if bare in METRICS else len(_ORDER),
        name,
    )


def _exponent(value: float) -> int:
    return math.floor(math.log10(value))
