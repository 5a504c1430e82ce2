"""Each gate from both sides, on figures alone."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
from pydantic import ValidationError
from scipy.stats import binom, binomtest

from cluster.errors import UserError
from cluster.promotion import (
    Check,
    Gates,
    PromotionDecision,
    alignment_measure,
    check_named,
    decide,
    pictures_to_decide,
    quality_measure,
)


@dataclass(frozen=True)
class Measured:
    value: float
    better: Literal["lower", "higher"] | None = "lower"
    extractor: str | None = "dinov2"
    interval: tuple[float, float] | None = None
    chance: float | None = None
    num_generated: int = 300


def copies(count: int, of: int, **known: Any) -> Measured:
    """A rate of copies with its exact interval."""
    interval = binomtest(count, of).proportion_ci()
    return Measured(count / of, interval=(interval.low, interval.high), num_generated=of, **known)


@dataclass(frozen=True)
class Difference:
    value: float
    interval: tuple[float, float]


BETTER = Difference(-0.1, (-0.15, -0.05))
CHAMPION = {"kid_dinov2": Measured(0.3), "copy_rate_dinov2": Measured(0.9)}
CLIP = {"clip_score": Measured(30.0, "higher", "clip")}
CHAMPION |= CLIP
GOOD = {"kid_dinov2": Measured(0.2), "copy_rate_dinov2": copies(3, 300)} | CLIP
SAME = Difference(0.0, (-0.5, 0.5))


def judge(
    candidate: dict[str, Measured],
    champion: dict[str, Measured] | None = CHAMPION,
    difference: Difference | None = BETTER,
    approved_by: str | None = None,
    alignment: Difference | None = SAME,
    **gates: Any,
) -> PromotionDecision:
    difference = difference if champion is not None else None
    gates = {key.removesuffix("_"): value for key, value in gates.items()}
    return decide(
        Gates.model_validate(gates),
        candidate,
        champion,
        difference=difference,
        alignment=alignment if champion is not None else None,
        approved_by=approved_by,
    )


def check(decision: PromotionDecision, gate: str) -> Check:
    (found,) = [check for check in decision.checks if check.gate == gate]
    return found


def test_a_better_candidate_passes_and_the_record_has_every_number() -> None:
    decision = judge(GOOD)
    assert decision.accepted
    assert not decision.is_first
    quality = check(decision, "quality")
    assert quality.measure == "kid_dinov2"
    assert quality.numbers == {"candidate": 0.2, "champion": 0.3, "difference": -0.1, "low": -0.15, "high": -0.05}
    assert quality.setting == {"quality.measure": None, "quality.margin": 0.0}
    assert "0.3 → 0.2" in decision.reason
    assert "copy_rate_dinov2 1.00%, 95 % interval 0.21% to 2.89%, is within the limit of 5.00%" in decision.reason


@pytest.mark.parametrize(
    ("better", "interval", "margin", "accepted"),
    [
        ("lower", (-0.15, -0.05), 0.0, True),
        ("lower", (-0.15, 0.0), 0.0, False),  # as good is not better
        ("lower", (-0.15, 0.01), 0.0, False),
        ("lower", (0.05, 0.15), 0.0, False),
        ("lower", (-0.15, -0.05), 0.04, True),
        ("lower", (-0.15, -0.05), 0.06, False),
        ("higher", (0.05, 0.15), 0.0, True),
        ("higher", (-0.01, 0.15), 0.0, False),
        ("higher", (-0.15, -0.05), 0.0, False),
        ("higher", (0.05, 0.15), 0.06, False),
        ("lower", (math.nan, math.nan), 0.0, False),
        ("lower", (-math.inf, -0.05), 0.0, False),
    ],
)
def test_quality_must_be_better_beyond_the_paired_interval(
    better: Literal["lower", "higher"], interval: tuple[float, float], margin: float, accepted: bool
) -> None:
    candidate, champion = (figures | {"f1_dinov2": Measured(0.5, better)} for figures in (GOOD, CHAMPION))
    quality = {"measure": "f1_dinov2", "margin": margin}
    decision = judge(candidate, champion, Difference(sum(interval) / 2, interval), quality=quality)
    assert decision.accepted is accepted
    assert check(decision, "quality").passed is accepted
    assert check(decision, "quality").setting["quality.margin"] == margin


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ({"fid": "inception", "kid_random_vgg_64": "random_vgg_64"}, "fid"),
        ({"kid": "inception", "fid": "inception", "cmmd_inception": "inception"}, "kid"),
        ({"kid": "inception", "cmmd_dinov2": "dinov2"}, "cmmd_dinov2"),
        ({"kid_radimagenet": "radimagenet", "cmmd": "clip"}, "cmmd"),
        ({"kid_radimagenet": "radimagenet", "kid_random_vgg": "random_vgg"}, "kid_radimagenet"),
        ({"kid_random_vgg": "random_vgg", "precision_dinov2": "dinov2"}, "kid_random_vgg"),
    ],
)
def test_the_best_measure_is_taken_where_none_is_named(names: dict[str, str], chosen: str) -> None:
    figures = {name: Measured(1.0, extractor=extractor) for name, extractor in names.items()}
    assert quality_measure(Gates(), figures, figures) == chosen
    with pytest.raises(UserError, match="none of kid, cmmd, fid was measured for both"):
        quality_measure(Gates(), figures, {})


def test_a_measure_that_is_named_must_be_there() -> None:
    gates = Gates.model_validate({"quality": {"measure": "kid_biomedclip"}})
    with pytest.raises(UserError, match="'kid_biomedclip' was not measured; there are kid_dinov2"):
        quality_measure(gates, GOOD, CHAMPION)


@pytest.mark.parametrize(
    ("better", "before", "after", "interval", "accepted"),
    [
        ("higher", 30.0, 31.0, (0.8, 1.2), True),
        ("higher", 30.0, 29.8, (-0.3, -0.1), True),  # sure, but within the tolerance of 0.3
        ("higher", 30.0, 29.0, (-2.1, 0.1), True),  # a large loss, but it may be chance
        ("higher", 30.0, 29.0, (-3.1, 1.1), False),  # so few images that even 10 % may be lost
        ("higher", 30.0, 31.0, (-9.0, 11.0), False),
        ("lower", 30.0, 30.0, (-3.1, 3.1), False),
        ("higher", 30.0, 29.6, (-0.5, -0.3), False),
        ("higher", 30.0, 29.0, (-2.0, -0.1), False),
        ("lower", 30.0, 29.0, (-2.0, -0.1), True),
        ("lower", 30.0, 30.2, (0.1, 0.3), True),
        ("lower", 30.0, 30.4, (0.3, 0.5), False),
        ("higher", -0.2, -0.3, (-0.15, -0.05), False),
        ("higher", 30.0, math.nan, (-0.3, 0.1), False),
        ("higher", 30.0, 30.0, (math.nan, math.nan), False),
    ],
)
def test_alignment_fails_a_loss_that_is_neither_chance_nor_tolerated(
    better: Literal["lower", "higher"], before: float, after: float, interval: tuple[float, float], accepted: bool
) -> None:
    def aligned(value: float) -> dict[str, Measured]:
        # Each alone may be anywhere: prompts differ far more than models do on one prompt.
        return {"clip_score_biomedclip": Measured(value, better, "biomedclip", (value - 9, value + 9))}

    difference = Difference(after - before, interval)
    decision = judge(GOOD | aligned(after), CHAMPION | aligned(before), alignment=difference)
    assert decision.accepted is accepted
    found = check(decision, "alignment")
    assert found.measure == "clip_score_biomedclip"
    assert (found.numbers["champion"], found.numbers["low"]) == pytest.approx((before, interval[0]), nan_ok=True)
    assert found.setting["alignment.tolerance"] == 0.01


@pytest.mark.parametrize(
    ("interval", "needed"),
    [((-6.0, 6.0), 64), ((-7.5, 4.5), 256), ((-10.0, 2.0), 36)],
)
def test_too_few_images_to_rule_out_a_loss_of_alignment_say_how_many_would_do(
    interval: tuple[float, float], needed: int
) -> None:
    """The largest loss is 3 (a tenth of 30): the half-width of 6 must fall to what is left of it, by the root of n."""
    few = {name: replace(figure, num_generated=16) for name, figure in GOOD.items()}
    found = check(judge(few, alignment=Difference(sum(interval) / 2, interval)), "alignment")
    assert not found.passed
    assert found.reason.endswith(f"not enough pictures to rule out a loss of 3: draw {needed}")


def test_alignment_by_captions_is_held_in_its_own_unit() -> None:
    """It is 0 by chance: a part of that would be nothing."""
    captions = {"caption_alignment_dinov2": Measured(0.0, "higher")}
    first, second = ({**figures, **captions} for figures in (GOOD, CHAMPION))
    del first["clip_score"]
    assert judge(first, second, alignment=Difference(0.0, (-0.09, 0.09))).accepted
    assert not judge(first, second, alignment=Difference(0.0, (-0.11, 0.11))).accepted
    assert judge(first, second, alignment=Difference(0.0, (-0.11, 0.11)), alignment_={"largest_loss": 0.2}).accepted


def test_alignment_that_nothing_measured_passes_only_where_gates_say_so() -> None:
    unmeasured = {name: figure for name, figure in GOOD.items() if name != "clip_score"}
    found = check(judge(unmeasured, alignment=None), "alignment")
    assert (found.passed, found.measure) == (False, None)
    assert found.reason == "nothing measured it for both models, so a loss cannot be ruled out"
    found = check(judge(unmeasured, alignment=None, alignment_={"required": False}), "alignment")
    assert found.passed
    assert found.reason.endswith("; these gates do not require it")


def test_alignment_by_what_was_measured() -> None:
    named = Gates.model_validate({"alignment": {"measure": "clip_score"}})
    both = {"clip_score": Measured(30, "higher", "clip"), "clip_score_bad": Measured(30, "higher", "bad")}
    assert alignment_measure(named, both, both) == "clip_score"
    with pytest.raises(UserError, match=r"alignment.measure: 'clip_score' was not measured; there are kid_dinov2"):
        alignment_measure(named, GOOD | both, {"kid_dinov2": Measured(0.3)})

    captions = {"caption_alignment_random_vgg": Measured(0.5, "higher", "random_vgg")}
    assert alignment_measure(Gates(), captions, captions) == "caption_alignment_random_vgg"
    assert alignment_measure(Gates(), captions | both, captions | both) == "clip_score"
    assert alignment_measure(Gates(), captions | both, captions) == "caption_alignment_random_vgg"
    assert alignment_measure(Gates(), captions | both, {"kid_dinov2": Measured(0.3)}) is None


@pytest.mark.parametrize("gate", ["quality", "alignment"])
def test_what_gates_name_must_be_measured(gate: str) -> None:
    gates = Gates.model_validate({gate: {"measure": "kid_biomedclip"}})
    with pytest.raises(UserError, match=f"{gate}.measure: 'kid_biomedclip' was not measured; there are kid_dinov2"):
        check_named(gates, GOOD)
    check_named(gates, {"kid_biomedclip": Measured(1.0)})
    check_named(Gates(), GOOD)


@pytest.mark.parametrize(
    ("count", "of", "accepted"), [(0, 300, True), (7, 300, True), (8, 300, False), (30, 300, False), (0, 71, False)]
)
@pytest.mark.parametrize("champion", [CHAMPION, None])
def test_the_upper_end_of_the_rate_of_copies_must_be_within_the_limit(
    champion: dict[str, Measured] | None, count: int, of: int, accepted: bool
) -> None:
    decision = judge(GOOD | {"copy_rate_dinov2": copies(count, of)}, champion)
    assert decision.accepted is accepted
    found = check(decision, "memorization")
    interval = binomtest(count, of).proportion_ci()
    assert found.numbers == pytest.approx({"candidate": count / of, "low": interval.low, "high": interval.high})


def test_a_model_that_copies_its_training_images_is_refused_for_that_reason() -> None:
    decision = judge(GOOD | {"copy_rate_dinov2": copies(30, 300)}, None)
    assert decision.reason == (
        "memorization: copy_rate_dinov2 10.00%, 95 % interval 6.85% to 13.97%, is over the limit of 5.00%: it copies "
        "its training images"
    )


@pytest.mark.parametrize(
    ("figure", "advice"),
    [
        (copies(0, 16), "not enough pictures, draw 230"),
        (copies(1, 16), "not enough pictures, draw 230"),  # one of few pictures says little
        (copies(3, 96), "not enough pictures, draw 490"),
        (copies(8, 300), "not enough pictures, draw 312"),
        (copies(25, 400), "not enough pictures, draw 1,"),
        (copies(15, 300), "no number of pictures in reach would decide it"),
        (copies(0, 40, chance=1 / 17), "by so few held-out images, 5.88% of honest pictures count as copies"),
    ],
)
def test_too_few_pictures_are_no_evidence_and_say_how_many_would_be(figure: Measured, advice: str) -> None:
    decision = judge(GOOD | {"copy_rate_dinov2": figure}, None)
    assert not decision.accepted
    assert f"may be over the limit of 5.00%: {advice}" in decision.reason


@pytest.mark.parametrize("limit", [0.02, 0.05, 0.2])
def test_as_many_pictures_as_advised_let_an_honest_model_pass(limit: float) -> None:
    """Held against exact intervals by another way: 95 % of honest models pass with so many, and fewer with less."""

    def passing(count: int) -> float:
        ends = [binomtest(found, count).proportion_ci().high <= limit for found in range(20 * count // 100 + 1)]
        return float(binom.cdf(sum(ends) - 1, count, 0.01))

    advised = pictures_to_decide(0.0, 16, limit=limit)
    assert advised is not None
    assert passing(advised) >= 0.95
    assert passing(advised - 1) < 0.95


@pytest.mark.parametrize("figure", [Measured(0.01), Measured(math.nan, interval=(0.0, 0.01))])
def test_a_rate_of_copies_without_an_interval_is_no_evidence(figure: Measured) -> None:
    decision = judge(GOOD | {"copy_rate_dinov2": figure}, None)
    assert not decision.accepted
    assert "has no interval to hold against the limit" in decision.reason


def test_every_extractor_may_find_copies_unless_one_is_named() -> None:
    figures = GOOD | {"copy_rate_inception": copies(45, 300, extractor="inception")}
    assert not judge(figures).accepted
    assert judge(figures, memorization={"measure": "copy_rate_dinov2"}).accepted
    assert judge(figures, memorization={"limit": 0.2}).accepted


def test_copies_that_were_not_looked_for_cannot_be_ruled_out() -> None:
    figures = {"kid_dinov2": Measured(0.2)} | CLIP
    decision = judge(figures)
    assert not decision.accepted
    assert decision.reason == "memorization: copy_rate was not measured, so copies cannot be ruled out"
    assert judge(figures, memorization={"required": False}).accepted


def test_the_first_candidate_is_bound_by_absolute_limits_alone() -> None:
    decision = judge({"kid_dinov2": Measured(99.0), "copy_rate_dinov2": copies(0, 300)}, champion=None)
    assert decision.accepted
    assert decision.is_first
    assert [check.gate for check in decision.checks] == ["memorization"]


@pytest.mark.parametrize(
    ("better", "limit", "accepted"),
    [("lower", 0.25, True), ("lower", 0.24, False), ("higher", 0.15, True), ("higher", 0.16, False)],
)
@pytest.mark.parametrize("champion", [CHAMPION, None])
def test_an_absolute_limit_binds_all(
    champion: dict[str, Measured] | None, better: Literal["lower", "higher"], limit: float, accepted: bool
) -> None:
    interval = (-0.15, -0.05) if better == "lower" else (0.05, 0.15)
    figures = GOOD | {"kid_dinov2": Measured(0.2, better, interval=(0.15, 0.25))}  # the worse end counts
    quality = {"measure": "kid_dinov2", "limit": limit}
    decision = judge(figures, champion, Difference(0.1, interval), quality=quality)
    assert decision.accepted is accepted
    assert check(decision, "quality limit").passed is accepted


def test_a_limit_on_what_was_not_measured_is_not_passed() -> None:
    decision = judge(GOOD, champion=None, quality={"measure": "kid", "limit": 0.2})
    assert decision.reason == "quality limit: kid was not measured"
    decision = judge(GOOD, champion=None, quality={"measure": "kid_dinov2", "limit": 0.2})
    assert decision.reason == "quality limit: kid_dinov2 has no interval"
    with pytest.raises(ValidationError, match="in the unit of a measure"):
        judge(GOOD, quality={"limit": 0.2})


@pytest.mark.parametrize(("who", "accepted"), [("Dr A", True), (None, False), ("", False)])
@pytest.mark.parametrize("champion", [CHAMPION, None])
def test_approval(champion: dict[str, Measured] | None, who: str | None, accepted: bool) -> None:
    approval = {"required": True, "tag": "signed_by"}
    decision = judge(GOOD, champion, approved_by=who, approval=approval)
    assert decision.accepted is accepted
    reason = check(decision, "approval").reason
    assert reason == (
        "approved by Dr A" if accepted else "no one has approved it: set the version's tag 'signed_by' to who did"
    )
    assert judge(GOOD, champion, approved_by=who).accepted, "nothing is asked where no approval is required"


def test_every_failed_gate_is_named() -> None:
    decision = judge(
        GOOD | {"copy_rate_dinov2": copies(150, 300)},
        difference=Difference(0.1, (0.05, 0.15)),
        approval={"required": True},
    )
    assert [check.gate for check in decision.checks if not check.passed] == ["quality", "memorization", "approval"]
    assert decision.reason.count("; ") >= 2
    assert PromotionDecision.model_validate_json(decision.model_dump_json()) == decision


@pytest.mark.parametrize(
    ("gate", "key", "value"),
    [
        ("memorization", "limit", math.inf),
        ("memorization", "limit", math.nan),
        ("memorization", "limit", 5),  # percent, where a share is asked for
        ("memorization", "limit", 0),  # no number of pictures shows that
        ("alignment", "tolerance", math.inf),
        ("alignment", "largest_loss", math.inf),
        ("quality", "margin", math.nan),
        ("quality", "margin", -1),
    ],
)
def test_limits_that_would_hold_nothing_are_errors(gate: str, key: str, value: float) -> None:
    with pytest.raises(ValidationError, match=f"{gate}.{key}"):
        Gates.model_validate({gate: {key: value}})


def test_copies_are_not_held_by_what_should_be_high() -> None:
    with pytest.raises(UserError, match="'clip_score' is no share of copies: more is better"):
        check_named(Gates.model_validate({"memorization": {"measure": "clip_score"}}), GOOD)


def test_unknown_keys_are_errors() -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        Gates.model_validate({"quality": {"margn": 0.1}})
