"""Whether a candidate becomes the champion: gates and figures in, a decision out. No MLflow, no files."""

import math
from collections.abc import Mapping
from typing import Literal, Protocol, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.errors import UserError

QUALITY_METRICS = ("kid", "cmmd", "fid")
"""In this order, where gates name no measure: first those that are unbiased, whatever the number of images."""
EXTRACTORS = ("dinov2", "rad_dino", "biomedclip", "inception", "clip")
"""In this order: DINOv2's features follow human judgement best (Stein et al. 2023, arXiv 2306.04675), and those trained
on natural images follow radiologists better than RadImageNet's (Woodland et al. 2023, arXiv 2311.13717)."""
RANDOM_EXTRACTOR = "random_vgg"  # last: of random weights
ALIGNMENT_METRICS = ("clip_score", "caption_alignment")
"""In this order: the second is known of any extractor, the first only of those that read prompts."""
COPY_METRIC = "copy_rate"
P_VALUE = "nearer_to_training_p_value"
"""Has no interval, for it says itself how sure it is."""
CHANCE = 0.01
"""The share of an honest model's pictures that count as copies, where the evaluation does not say."""
ERROR, POWER = 0.025, 0.95
"""Of either end of a 95 % interval; and of honest models that the advised number of pictures lets pass."""
MOST_PICTURES = 20_000


class Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Gate(Block):
    """What would hold nothing, such as an infinite limit, is refused."""

    model_config = ConfigDict(allow_inf_nan=False)


class QualityGate(Gate):
    """Better than the champion by more than chance explains."""

    measure: str | None = None
    """A name of the evaluation, such as kid_dinov2; none: the best that was measured, in the order above."""
    margin: float = Field(default=0.0, ge=0)
    """In the measure's unit: the paired interval of candidate - champion must lie beyond it."""
    limit: float | None = None
    """Not even the worse end of the 95 % interval may lie beyond it, the first candidate's included. Needs `measure`,
    whose unit it is in."""

    @model_validator(mode="after")
    def _limit_has_a_unit(self) -> Self:
        if self.limit is not None and self.measure is None:
            raise ValueError("quality.limit is in the unit of a measure: name it as quality.measure")
        return self


class AlignmentGate(Gate):
    """Not worse than the champion at showing what the prompt asks for.

    It fails a loss that is beyond chance, the whole paired interval of candidate - champion being on the worse side,
    and larger than tolerated; and also where so few pictures were compared that a large loss cannot be ruled out.
    """

    measure: str | None = None
    """None: the best that was measured, in the order above."""
    required: bool = True
    """Whether the gate fails where nothing measured it for both models."""
    tolerance: float = Field(default=0.01, ge=0)
    """The part of the champion's value that may be lost, chance or not."""
    largest_loss: float = Field(default=0.1, gt=0)
    """The worse end of the paired interval may not lose more: a part of the champion's value; for caption_alignment,
    which is 0 by chance, in its own unit, in which 1 is all."""


class MemorizationGate(Gate):
    """Does not repeat training images."""

    measure: str | None = None
    """None: the rate of copies by each extractor must hold."""
    required: bool = True
    """Whether the gate fails where copies were not looked for."""
    limit: float = Field(default=0.05, gt=0, le=1)
    """Copies among the generated images, as a share: the upper end of its 95 % interval may not lie above.

    Images that copy nothing have a small share too, by chance: 1 in 100, or 1 / (H + 1) where H < 99 images were held
    out. So a model that copies nothing needs some 250 pictures to show that it stays below 0.05.
    """


class ApprovalGate(Gate):
    """A person has looked."""

    required: bool = False
    tag: str = Field(default="approved_by", min_length=1)
    """Tag of the model version that names who did."""


class Gates(Block):
    """What a candidate must pass. Every key may be left out; these are sane defaults."""

    quality: QualityGate = QualityGate()
    alignment: AlignmentGate = AlignmentGate()
    memorization: MemorizationGate = MemorizationGate()
    approval: ApprovalGate = ApprovalGate()


class Figure(Protocol):
    """A figure of an evaluation."""

    @property
    def value(self) -> float: ...
    @property
    def better(self) -> Literal["lower", "higher"] | None: ...
    @property
    def extractor(self) -> str | None: ...
    @property
    def interval(self) -> tuple[float, float] | None: ...
    @property
    def chance(self) -> float | None:
        """The value of a model that is as it should be, where it is neither 0 nor 1."""

    @property
    def num_generated(self) -> int: ...


class Interval(Protocol):
    """A difference, candidate - champion, over the same prompts and seeds."""

    @property
    def value(self) -> float: ...
    @property
    def interval(self) -> tuple[float, float]: ...


class Check(Block):
    """One gate, with the figures it saw and the setting it holds them against."""

    gate: str
    passed: bool
    reason: str
    measure: str | None = None
    numbers: dict[str, float] = {}
    setting: dict[str, float | str | bool | None] = {}


class PromotionDecision(Block):
    accepted: bool
    is_first: bool
    """There was no champion to compare with."""
    checks: tuple[Check, ...]

    @property
    def reason(self) -> str:
        """What it failed on, or that it passed, in one line."""
        deciding = [check for check in self.checks if not check.passed] or list(self.checks)
        return "; ".join(f"{check.gate}: {check.reason}" for check in deciding)


Figures = Mapping[str, Figure]


def decide(
    gates: Gates,
    candidate: Figures,
    champion: Figures | None,
    *,
    difference: Interval | None,
    alignment: Interval | None,
    approved_by: str | None,
) -> PromotionDecision:
    """Hold a candidate's figures against the gates, and against the champion's if there is one.

    `difference` is that of `quality_measure(...)`, and None for the first candidate, which only absolute limits bind;
    `alignment` is that of `alignment_measure(...)`, and None where there is none. A figure that is missing or no number
    fails its gate. Raises UserError if there is nothing to compare quality by, or a measure that gates name is missing.
    """
    checks = []
    if champion is not None:
        assert difference is not None
        name = quality_measure(gates, candidate, champion)
        checks += [_better(gates.quality, name, candidate[name], champion[name], difference)]
        aligned = alignment_measure(gates, candidate, champion)
        checks += [_not_worse(gates.alignment, aligned, candidate, champion, alignment)]
    if gates.quality.limit is not None:
        checks += [_within_limit(gates.quality, candidate)]
    checks += _memorization(gates.memorization, candidate)
    if gates.approval.required:
        checks += [_approval(gates.approval, approved_by)]
    accepted = all(check.passed for check in checks)
    return PromotionDecision(accepted=accepted, is_first=champion is None, checks=tuple(checks))


def check_named(gates: Gates, figures: Figures) -> None:
    """Raise UserError if gates compare by a measure that is not there: before more is evaluated in vain."""
    comparable = {name: figure for name, figure in figures.items() if figure.better is not None}
    for key, name in (("quality", gates.quality.measure), ("alignment", gates.alignment.measure)):
        if name is not None and name not in comparable:
            raise UserError(f"{key}.measure: '{name}' was not measured; there are {', '.join(comparable) or 'none'}")
    copies = figures.get(gates.memorization.measure or "")
    if copies is not None and copies.better == "higher":
        raise UserError(f"memorization.measure: '{gates.memorization.measure}' is no share of copies: more is better")


def quality_measure(gates: Gates, candidate: Figures, champion: Figures) -> str:
    """The measure by which quality is compared. Raises UserError if both were not measured by it."""
    both = {name: figure for name, figure in candidate.items() if name in champion and figure.better is not None}
    check_named(gates, both)
    if gates.quality.measure is not None:
        return gates.quality.measure
    found = _best(both, QUALITY_METRICS)
    if found is None:
        raise UserError(
            f"none of {', '.join(QUALITY_METRICS)} was measured for both models: give an extractor that features for "
            f"them come from, or name quality.measure; there are {', '.join(both) or 'none'}"
        )
    return found


def alignment_measure(gates: Gates, candidate: Figures, champion: Figures) -> str | None:
    """The measure by which alignment is compared; None if there is none and gates name none.

    Raises UserError if both were not measured by the one that gates name.
    """
    both = {name: figure for name, figure in candidate.items() if name in champion}
    check_named(gates, both)
    return gates.alignment.measure or _best(both, ALIGNMENT_METRICS)


def _better(gate: QualityGate, name: str, candidate: Figure, champion: Figure, difference: Interval) -> Check:
    low, high = difference.interval
    wanted, sign = ("fall", -1) if candidate.better == "lower" else ("rise", 1)
    gains = (sign * low, sign * high)
    passed = math.isfinite(low) and math.isfinite(high) and min(gains) > gate.margin
    beyond = f"by more than {gate.margin:g}" if gate.margin else "beyond chance"
    return Check(
        gate="quality",
        passed=passed,
        measure=name,
        numbers={
            "candidate": candidate.value,
            "champion": champion.value,
            "difference": difference.value,
            "low": low,
            "high": high,
        },
        setting={"quality.measure": gate.measure, "quality.margin": gate.margin},
        reason=f"{name} {champion.value:.4g} → {candidate.value:.4g}, paired 95 % interval {low:+.3g} to {high:+.3g}; "
        f"it {'did' if passed else 'must'} {wanted} {beyond}",
    )


def _within_limit(gate: QualityGate, candidate: Figures) -> Check:
    assert gate.measure is not None
    assert gate.limit is not None
    setting: dict[str, float | str | bool | None] = {"quality.measure": gate.measure, "quality.limit": gate.limit}
    figure = candidate.get(gate.measure)
    interval = None if figure is None else _interval(gate.measure, figure)
    if figure is None or interval is None:
        reason = f"{gate.measure} was not measured" if figure is None else f"{gate.measure} has no interval"
        return Check(gate="quality limit", passed=False, measure=gate.measure, setting=setting, reason=reason)
    low, high = interval
    is_inside = high <= gate.limit if figure.better == "lower" else low >= gate.limit
    passed = is_inside and all(map(math.isfinite, (figure.value, low, high)))
    return Check(
        gate="quality limit",
        passed=passed,
        measure=gate.measure,
        numbers={"candidate": figure.value, "low": low, "high": high},
        setting=setting,
        reason=f"{gate.measure} {figure.value:.4g}, 95 % interval {low:.4g} to {high:.4g}, "
        f"{'is' if passed else 'is not surely'} within the limit of {gate.limit:g}",
    )


def _not_worse(
    gate: AlignmentGate, name: str | None, candidate: Figures, champion: Figures, difference: Interval | None
) -> Check:
    setting: dict[str, float | str | bool | None] = {
        "alignment.measure": gate.measure,
        "alignment.required": gate.required,
        "alignment.tolerance": gate.tolerance,
        "alignment.largest_loss": gate.largest_loss,
    }
    if name is None:
        reason = "nothing measured it for both models, so a loss cannot be ruled out"
        return Check(gate="alignment", passed=not gate.required, setting=setting, reason=_unless(gate.required, reason))
    assert difference is not None
    low, high = difference.interval
    before, after = champion[name].value, candidate[name].value
    sign = -1 if candidate[name].better == "lower" else 1
    loss, (least, most) = -sign * difference.value, sorted((-sign * low, -sign * high))
    unit = 1.0 if metric_of(name, candidate[name]) == "caption_alignment" else abs(before)
    is_number = all(map(math.isfinite, (before, after, difference.value, low, high)))
    is_worse = not is_number or (least > 0 and loss > gate.tolerance * abs(before))
    is_unsure = not is_worse and most > gate.largest_loss * unit
    if is_unsure:
        drawn = max(figure.num_generated for figure in candidate.values())
        needed = _pictures_to_rule_out(gate.largest_loss * unit, loss, most - loss, drawn)
        said = f"not enough pictures to rule out a loss of {gate.largest_loss * unit:.3g}: draw {needed:,}"
    else:
        said = f"{'worse' if is_worse else 'no worse'} than chance or the tolerance of {gate.tolerance:.1%} allows"
    return Check(
        gate="alignment",
        passed=not is_worse and not is_unsure,
        measure=name,
        numbers={"candidate": after, "champion": before, "difference": difference.value, "low": low, "high": high},
        setting=setting,
        reason=f"{name} {before:.4g} → {after:.4g}, paired 95 % interval {low:+.3g} to {high:+.3g}: {said}",
    )


def _memorization(gate: MemorizationGate, candidate: Figures) -> list[Check]:
    setting: dict[str, float | str | bool | None] = {
        "memorization.measure": gate.measure,
        "memorization.required": gate.required,
        "memorization.limit": gate.limit,
    }
    names = [
        name
        for name, figure in candidate.items()
        if (name == gate.measure if gate.measure else metric_of(name, figure) == COPY_METRIC)
    ]
    if not names:
        reason = _unless(
            gate.required, f"{gate.measure or COPY_METRIC} was not measured, so copies cannot be ruled out"
        )
        return [
            Check(gate="memorization", passed=not gate.required, measure=gate.measure, setting=setting, reason=reason)
        ]
    return [_within_copies(name, candidate[name], gate.limit, setting) for name in names]


def _unless(required: bool, reason: str) -> str:
    return reason if required else f"{reason}; these gates do not require it"


def _within_copies(name: str, figure: Figure, limit: float, setting: dict[str, float | str | bool | None]) -> Check:
    """Held against the interval's upper end: few pictures without a copy are no evidence that there are few copies."""
    low, high = figure.interval or (math.nan, math.nan)
    is_number = all(map(math.isfinite, (figure.value, low, high)))
    passed = is_number and high <= limit
    if passed:
        said = f"is within the limit of {limit:.2%}"
    elif is_number and low > limit:
        said = f"is over the limit of {limit:.2%}: it copies its training images"
    elif is_number:
        said = f"may be over the limit of {limit:.2%}: {_what_would_decide(figure, limit)}"
    else:
        said = "has no interval to hold against the limit"
    return Check(
        gate="memorization",
        passed=passed,
        measure=name,
        numbers={"candidate": figure.value, "low": low, "high": high},
        setting=setting,
        reason=f"{name} {figure.value:.2%}, 95 % interval {low:.2%} to {high:.2%}, {said}",
    )


def _what_would_decide(figure: Figure, limit: float) -> str:
    chance = CHANCE if figure.chance is None else figure.chance
    needed = pictures_to_decide(figure.value, figure.num_generated, limit=limit, chance=chance)
    if needed is not None:
        return f"not enough pictures, draw {needed:,}"
    if chance >= limit:
        return f"by so few held-out images, {chance:.2%} of honest pictures count as copies: hold out 99 or more"
    return "no number of pictures in reach would decide it"


def pictures_to_decide(rate: float, count: int, *, limit: float, chance: float = CHANCE) -> int | None:
    """How many pictures decide whether a share lies below `limit`; `rate` was found among `count` pictures.

    So many that of models at the rate `chance`, as honest ones are, 95 % would pass, and that the exact interval
    (Clopper & Pearson 1934) of the rate that was found would lie on one side of the limit. A rate over the limit that
    was found among fewer than honest models need is not taken for the model's. None if that takes more than
    MOST_PICTURES, or if honest models are over the limit.
    """
    from scipy.stats import binom

    counts = np.arange(1, MOST_PICTURES + 1)
    # The upper end for k of n lies below the limit where P(at most k of n, each with chance `limit`) is at most ERROR.
    most_copies = binom.ppf(ERROR, counts, limit) - 1
    too_weak = np.flatnonzero(binom.cdf(most_copies, counts, chance) < POWER)
    for_honest = int(too_weak[-1]) + 2 if len(too_weak) else 1
    if for_honest > MOST_PICTURES:
        return None
    if count < for_honest and rate >= limit:
        return for_honest
    found = np.round(rate * counts)
    is_decided = (found <= most_copies) | (binom.sf(found - 1, counts, limit) <= ERROR)
    decided = counts[is_decided & (counts > count)]
    return max(for_honest, int(decided[0])) if len(decided) else None


def _pictures_to_rule_out(largest: float, loss: float, margin: float, drawn: int) -> int:
    """At the difference that was found, the interval of so many pictures would lie on one side of the largest loss, or
    of 0 where the loss itself is that large; its half-width `margin` falls with the root of their number."""
    room = largest - loss if loss < largest else loss
    return max(drawn + 1, math.ceil(drawn * (margin / room) ** 2))


def _approval(gate: ApprovalGate, approved_by: str | None) -> Check:
    return Check(
        gate="approval",
        passed=bool(approved_by),
        setting={"approval.required": gate.required, "approval.tag": gate.tag},
        reason=f"approved by {approved_by}"
        if approved_by
        else f"no one has approved it: set the version's tag '{gate.tag}' to who did",
    )


def _interval(name: str, figure: Figure) -> tuple[float, float] | None:
    return (figure.value, figure.value) if metric_of(name, figure) == P_VALUE else figure.interval


def metric_of(name: str, figure: Figure) -> str:
    """A measure's name without its extractor's label: kid_dinov2 -> kid."""
    return name.removesuffix(f"_{figure.extractor}")


def _best(figures: Figures, metrics: tuple[str, ...]) -> str | None:
    """The first of `figures` by extractor, then by metric; names settle what is left."""

    def rank(name: str) -> tuple[int, int, str]:
        extractor = figures[name].extractor or ""
        known = EXTRACTORS.index(extractor) if extractor in EXTRACTORS else len(EXTRACTORS)
        by_extractor = len(EXTRACTORS) + 1 if extractor.startswith(RANDOM_EXTRACTOR) else known
        return by_extractor, metrics.index(metric_of(name, figures[name])), name

    found = [name for name, figure in figures.items() if metric_of(name, figure) in metrics]
    return min(found, key=rank, default=None)
