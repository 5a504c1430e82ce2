"""Each gate from both sides, on figures alone."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from pydantic import ValidationError

from cluster.errors import UserError
from cluster.promotion import (
    Check,
    Gates,
    PromotionDecision,
    alignment_measure,
    check_named,
    decide,
    quality_measure,
)


@dataclass(frozen=True)
class Measured:
    value: float
    better: Literal["lower", "higher"] | None = "lower"
    extractor: str | None = "dinov2"
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Difference:
    value: float
    interval: tuple[float, float]


BETTER = Difference(-0.1, (-0.15, -0.05))
CHAMPION = {"kid_dinov2": Measured(0.3), "copy_rate_dinov2": Measured(0.9)}
GOOD = {"kid_dinov2": Measured(0.2), "copy_rate_dinov2": Measured(0.01)}


def judge(
    candidate: dict[str, Measured],
    champion: dict[str, Measured] | None = CHAMPION,
    difference: Difference | None = BETTER,
    approved_by: str | None = None,
    alignment: Difference | None = None,
    **gates: Any,
) -> PromotionDecision:
    difference = difference if champion is not None else None
    return decide(
        Gates.model_validate(gates),
        candidate,
        champion,
        difference=difference,
        alignment=alignment,
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
    assert "copy_rate_dinov2 1.00% is within the limit of 5.00%" in decision.reason


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


def test_alignment_by_what_was_measured() -> None:
    found = check(judge(GOOD), "alignment")
    assert (found.passed, found.measure, found.reason) == (True, None, "nothing measured it")
    named = Gates.model_validate({"alignment": {"measure": "clip_score"}})
    both = {"clip_score": Measured(30, "higher", "clip"), "clip_score_bad": Measured(30, "higher", "bad")}
    assert alignment_measure(named, both, both) == "clip_score"
    with pytest.raises(UserError, match=r"alignment.measure: 'clip_score' was not measured; there are kid_dinov2"):
        alignment_measure(named, GOOD | both, CHAMPION)

    captions = {"caption_alignment_random_vgg": Measured(0.5, "higher", "random_vgg")}
    assert alignment_measure(Gates(), captions, captions) == "caption_alignment_random_vgg"
    assert alignment_measure(Gates(), captions | both, captions | both) == "clip_score"
    assert alignment_measure(Gates(), captions | both, captions) == "caption_alignment_random_vgg"
    assert alignment_measure(Gates(), captions | both, GOOD) is None


@pytest.mark.parametrize("gate", ["quality", "alignment"])
def test_what_gates_name_must_be_measured(gate: str) -> None:
    gates = Gates.model_validate({gate: {"measure": "kid_biomedclip"}})
    with pytest.raises(UserError, match=f"{gate}.measure: 'kid_biomedclip' was not measured; there are kid_dinov2"):
        check_named(gates, GOOD)
    check_named(gates, {"kid_biomedclip": Measured(1.0)})
    check_named(Gates(), GOOD)


@pytest.mark.parametrize(("rate", "accepted"), [(0.0, True), (0.05, True), (0.06, False), (math.nan, False)])
@pytest.mark.parametrize("champion", [CHAMPION, None])
def test_a_model_that_copies_its_training_images_is_refused_for_that_reason(
    champion: dict[str, Measured] | None, rate: float, accepted: bool
) -> None:
    decision = judge(GOOD | {"copy_rate_dinov2": Measured(rate)}, champion)
    assert decision.accepted is accepted
    if rate == 0.06:
        assert decision.reason == (
            "memorization: copy_rate_dinov2 6.00% is over the limit of 5.00%: it copies its training images"
        )


def test_only_a_rate_of_copies_that_is_surely_over_the_limit_is_refused() -> None:
    """By 16 held-out images, one in 17 honest images counts as a copy: 5.9 %."""
    by_chance = GOOD | {"copy_rate_dinov2": Measured(15 / 256, interval=(0.033, 0.095))}
    decision = judge(by_chance)
    assert decision.accepted
    found = check(decision, "memorization")
    assert found.numbers == {"candidate": 15 / 256, "low": 0.033}
    assert found.reason == "copy_rate_dinov2 5.86%, surely at least 3.30%, is within the limit of 5.00%"
    copies = judge(GOOD | {"copy_rate_dinov2": Measured(0.1, interval=(0.051, 0.15))})
    assert copies.reason == (
        "memorization: copy_rate_dinov2 10.00%, surely at least 5.10%, is over the limit of 5.00%: it copies its "
        "training images"
    )
    assert not judge(GOOD | {"copy_rate_dinov2": Measured(math.nan, interval=(0.0, 1.0))}).accepted
    assert not judge(GOOD | {"copy_rate_dinov2": Measured(0.1, interval=(math.nan, 1.0))}).accepted


def test_every_extractor_may_find_copies_unless_one_is_named() -> None:
    figures = GOOD | {"copy_rate_inception": Measured(0.2, extractor="inception")}
    assert not judge(figures).accepted
    assert judge(figures, memorization={"measure": "copy_rate_dinov2"}).accepted
    assert judge(figures, memorization={"limit": 0.2}).accepted


def test_copies_that_were_not_looked_for_cannot_be_ruled_out() -> None:
    decision = judge({"kid_dinov2": Measured(0.2)})
    assert not decision.accepted
    assert decision.reason == "memorization: copy_rate was not measured, so copies cannot be ruled out"


def test_the_first_candidate_is_bound_by_absolute_limits_alone() -> None:
    decision = judge({"kid_dinov2": Measured(99.0), "copy_rate_dinov2": Measured(0.0)}, champion=None)
    assert decision.accepted
    assert decision.is_first
    assert [check.gate for check in decision.checks] == ["memorization"]


@pytest.mark.parametrize(
    ("better", "limit", "accepted"),
    [("lower", 0.2, True), ("lower", 0.19, False), ("higher", 0.2, True), ("higher", 0.21, False)],
)
@pytest.mark.parametrize("champion", [CHAMPION, None])
def test_an_absolute_limit_binds_all(
    champion: dict[str, Measured] | None, better: Literal["lower", "higher"], limit: float, accepted: bool
) -> None:
    interval = (-0.15, -0.05) if better == "lower" else (0.05, 0.15)
    figures = GOOD | {"kid_dinov2": Measured(0.2, better)}
    quality = {"measure": "kid_dinov2", "limit": limit}
    decision = judge(figures, champion, Difference(0.1, interval), quality=quality)
    assert decision.accepted is accepted
    assert check(decision, "quality limit").passed is accepted


def test_a_limit_on_what_was_not_measured_is_not_passed() -> None:
    decision = judge(GOOD, champion=None, quality={"measure": "kid", "limit": 0.2})
    assert decision.reason == "quality limit: kid was not measured"
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
        GOOD | {"copy_rate_dinov2": Measured(0.5)},
        difference=Difference(0.1, (0.05, 0.15)),
        approval={"required": True},
    )
    assert [check.gate for check in decision.checks if not check.passed] == ["quality", "memorization", "approval"]
    assert decision.reason.count("; ") >= 2
    assert PromotionDecision.model_validate_json(decision.model_dump_json()) == decision


def test_unknown_keys_are_errors() -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        Gates.model_validate({"quality": {"margn": 0.1}})
