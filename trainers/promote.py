"""Promotion: evaluate a candidate beside the champion on the same ground, decide, and move the alias.

Nothing moves before everything is known, and the alias that people load by moves last, but for the word that it has:
what is cut off before may be repeated.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from cluster import storage
from cluster.errors import UserError
from cluster.evaluations import KIND
from cluster.promotion import (
    Gates,
    Interval,
    PromotionDecision,
    alignment_measure,
    check_named,
    decide,
    metric_of,
    quality_measure,
)
from cluster.registry import RegisteredModel, Version, now, whoami
from cluster.tracking import Tracker, explained, find_run
from data_shards import Manifest
from trainers.fidelity.bootstrap import paired_mean_difference
from trainers.fidelity.evaluation import EVALUATION, REPORT, SCORES, Evaluation, features_uri

CHAMPION, PREVIOUS = "champion", "previous"
EXPERIMENT = "promotions"
PROMOTION = {KIND: "promotion"}
MOVING = "accepted, moving"

Features = NDArray[np.float32]
Evaluate = Callable[[str, str], Evaluation]
"""(model URI, folder for the evaluation) -> what was found. Prompts, seeds and reference are the same at each call."""
RealFeatures = Callable[[Evaluation, str], Features]
"""(evaluation, label of an extractor) -> features [M, D] of the real images that it compared with."""


class PairedDifference(Protocol):
    """As trainers.fidelity.bootstrap.paired_difference; raises ValueError for a metric that has none."""

    def __call__(
        self, metric: str, real: Features, candidate: Features, champion: Features, *, seed: int
    ) -> Interval: ...


@dataclass(frozen=True)
class PromotionOutcome:
    """What was decided, and done."""

    name: str
    candidate: int
    champion: int | None
    """The version that was champion until now."""
    decision: PromotionDecision
    moved: bool
    """Whether the alias names the candidate now; never in a dry run."""
    audit_run: str | None
    """The MLflow run that records it; none in a dry run."""


@dataclass(frozen=True)
class _Judged:
    """A version with its evaluation and the folder that lies in."""

    version: int
    evaluation: Evaluation
    folder: str


def promote(
    candidate_uri: str,
    shards: str,
    out: str,
    *,
    gates: Gates,
    evaluate: Evaluate,
    real_features: RealFeatures,
    paired_difference: PairedDifference,
    seed: int,
    dry_run: bool,
) -> PromotionOutcome:
    """Make a registered version the champion if it passes the gates; evaluations lie in `out`/NAME-VERSION.

    Decision, figures and reason become tags of the version and, with both evaluations, artifacts of an MLflow run of
    their own, also on refusal. In a dry run nothing but `out` is written. `seed` is that of the bootstrap.

    Raises UserError when the candidate is not registered, is the champion already, or was trained on other data than
    `shards`; when an evaluation lacks what the decision needs; and when the champion changed meanwhile.
    """
    model, candidate = RegisteredModel.of(candidate_uri)
    champion = model.aliases().get(CHAMPION)
    if candidate.number == champion:
        raise UserError(f"version {champion} of '{model.name}' is the champion already")
    _check_data(model.name, candidate, shards)
    judged = _judge(model.name, candidate.number, out, evaluate)
    check_named(gates, judged.evaluation.measures)
    if champion is not None:
        _check_resolution(judged, champion, _trained_resolution(model.version(champion)))
    rival = None if champion is None else _judge(model.name, champion, out, evaluate)

    difference = alignment = None
    if rival is not None:
        _check_same_ground(judged, rival)
        both = judged.evaluation.measures, rival.evaluation.measures
        difference = _difference(quality_measure(gates, *both), judged, rival, real_features, paired_difference, seed)
        if aligned := alignment_measure(gates, *both):
            alignment = _alignment_difference(aligned, judged, rival, seed)
    decision = decide(
        gates,
        judged.evaluation.measures,
        None if rival is None else rival.evaluation.measures,
        difference=difference,
        alignment=alignment,
        # Read now: whoever approves may have waited for the evaluation.
        approved_by=model.version(candidate.number).tags.get(gates.approval.tag),
    )
    if dry_run:
        return PromotionOutcome(model.name, candidate.number, champion, decision, moved=False, audit_run=None)
    with explained(model.tracking_uri, f"promotion of {model.name} {candidate.number}"):
        audit_run = _record_and_act(model, judged, rival, gates, decision)
    return PromotionOutcome(model.name, candidate.number, champion, decision, decision.accepted, audit_run)


def rollback(uri: str) -> tuple[int, int]:
    """Let `champion` and `previous` of a registered model change places; (the champion that was, the one that is).

    Raises UserError if there is no other previous champion.
    """
    model, _ = RegisteredModel.of(uri)
    with model.lock() as check_still_locked:
        aliases = model.aliases()
        champion, previous = aliases.get(CHAMPION), aliases.get(PREVIOUS)
        if champion is None or previous is None or champion == previous:
            raise UserError(f"'{model.name}' has no previous champion to go back to: aliases are {aliases or 'none'}")
        # Here the champion moves first: it is the one that someone wants to be rid of.
        check_still_locked()
        model.point(CHAMPION, previous)
        model.point(PREVIOUS, champion)
    document = {"action": "rollback", "name": model.name, "from": champion, "to": previous, "by": whoami(), "at": now()}
    model.tag(champion, {"promotion.rolled_back": f"{document['at']} by {document['by']}"})
    tags = PROMOTION | {"promotion.decision": "rollback", "promotion.model": model.name, "promotion.moved": "true"}
    audit = Tracker.start(experiment=EXPERIMENT, run_name=f"{model.name} back to {previous}", tags=tags)
    audit.log_text(json.dumps(document, indent=1), "decision.json")
    audit.finish("FINISHED")
    return champion, previous


def _check_data(name: str, candidate: Version, shards: str) -> None:
    """Copies are looked for among the training images, so these must be the ones it was trained on."""
    digest, trained_on = Manifest.load(shards).digest, candidate.tags.get("manifest_digest", "")
    if trained_on != digest:
        raise UserError(
            f"version {candidate.number} of '{name}' was trained on data {trained_on[:12] or 'that no tag names'}, but "
            f"{shards} is {digest[:12]}: give the shards it was trained on"
        )


def _judge(name: str, version: int, out: str, evaluate: Evaluate) -> _Judged:
    folder = storage.join(out, f"{name}-{version}")
    return _Judged(version, evaluate(f"models:/{name}/{version}", folder), folder)


def _trained_resolution(version: Version) -> int | None:
    """What its run says; None if it has none, or that is not at hand: then the evaluation will tell."""
    run = find_run(version.run_id) if version.run_id else None
    resolution = run.params().get("data.resolution", "") if run else ""
    return int(resolution) if resolution.isdecimal() else None


def _check_resolution(candidate: _Judged, champion: int, theirs: int | None) -> None:
    ours = candidate.evaluation.generation and candidate.evaluation.generation.resolution
    if theirs is not None and ours != theirs:
        raise UserError(
            f"version {candidate.version} draws at {ours} pixels, the champion, version {champion}, at {theirs}: "
            "models of other resolutions cannot be compared; register this one under a name of its own"
        )


def _check_same_ground(candidate: _Judged, champion: _Judged) -> None:
    ours, theirs = candidate.evaluation, champion.evaluation
    _check_resolution(candidate, champion.version, theirs.generation.resolution if theirs.generation else None)
    for what, one, other in (
        (
            "real images",
            (ours.reference.digest, ours.reference.splits),
            (theirs.reference.digest, theirs.reference.splits),
        ),
        ("prompts", ours.samples, theirs.samples),
        ("seeds", ours.generation and ours.generation.seed, theirs.generation and theirs.generation.seed),
        (
            "extractors",
            {label: record.digest for label, record in ours.extractors.items()},
            {label: record.digest for label, record in theirs.extractors.items()},
        ),
    ):
        if one != other:
            raise UserError(
                f"{candidate.folder} and {champion.folder} were made with other {what}: remove one, run again"
            )


def _difference(
    name: str,
    candidate: _Judged,
    champion: _Judged,
    real_features: RealFeatures,
    paired_difference: PairedDifference,
    seed: int,
) -> Interval:
    measure = candidate.evaluation.measures[name]
    label = measure.extractor
    if label is None:
        raise UserError(f"quality.measure: '{name}' comes from no extractor, so has no paired difference")
    try:
        return paired_difference(
            metric_of(name, measure),
            real_features(candidate.evaluation, label),
            _features(candidate, label),
            _features(champion, label),
            seed=seed,
        )
    except ValueError as error:
        raise UserError(f"quality.measure: {name}: {error}") from None


def _features(judged: _Judged, label: str) -> Features:
    uri = features_uri(judged.folder, label)
    try:
        features: Features = safetensors.numpy.load(storage.read_bytes(uri))["features"]
    except storage.NotFoundError:
        raise UserError(f"{judged.folder} has no features by {label}: remove it, and run this again") from None
    if len(features) != len(judged.evaluation.samples):
        raise UserError(f"{uri} holds {len(features)} rows for {len(judged.evaluation.samples)} samples")
    return features


def _alignment_difference(name: str, candidate: _Judged, champion: _Judged, seed: int) -> Interval:
    try:
        return paired_mean_difference(_scores(candidate, name), _scores(champion, name), seed=seed)
    except ValueError as error:
        raise UserError(f"alignment: {name}: {error}") from None


def _scores(judged: _Judged, name: str) -> NDArray[np.float64]:
    uri = storage.join(judged.folder, SCORES)
    try:
        scores: dict[str, NDArray[np.float64]] = safetensors.numpy.load(storage.read_bytes(uri))
    except storage.NotFoundError:
        raise UserError(f"{judged.folder} has no {SCORES}: remove it, and run this again") from None
    if name not in scores:
        there = ", ".join(sorted(scores)) or "none"
        raise UserError(f"alignment.measure: {uri} has no score of each image by '{name}'; there are {there}")
    if len(scores[name]) != len(judged.evaluation.samples):
        raise UserError(f"{uri} holds {len(scores[name])} scores for {len(judged.evaluation.samples)} samples")
    return scores[name]


def _record_and_act(
    model: RegisteredModel, candidate: _Judged, champion: _Judged | None, gates: Gates, decision: PromotionDecision
) -> str:
    """Write the record, and move the aliases if the decision says so; returns the record's run."""
    document = {
        "action": "promotion",
        "name": model.name,
        "candidate": candidate.version,
        "champion": champion.version if champion else None,
        "decision": decision.model_dump(mode="json"),
        "reason": decision.reason,
        "gates": gates.model_dump(mode="json"),
        "by": whoami(),
        "at": now(),
    }
    audit = Tracker.start(
        experiment=EXPERIMENT,
        run_name=f"{model.name} {candidate.version}",
        tags=PROMOTION
        | {
            "promotion.model": model.name,
            "promotion.candidate": str(candidate.version),
            "promotion.champion": str(champion.version) if champion else "",
            "promotion.decision": MOVING if decision.accepted else "refused",
            "promotion.moved": "false",
            "git_commit": candidate.evaluation.git_commit,
            # Not as the run's data set: MLflow fails where two runs log the same one at once.
            "manifest_digest": candidate.evaluation.reference.digest,
        },
    )
    try:
        _log(audit, document, candidate, champion)
        tags = {
            "promotion.decision": MOVING if decision.accepted else "refused",
            "promotion.reason": decision.reason,
            "promotion.figures": json.dumps(
                {f"{check.gate} {check.measure}": check.numbers for check in decision.checks if check.measure}
            ),
            "promotion.compared_with": str(champion.version) if champion else "",
            "promotion.run_id": audit.run_id,
            "promotion.at": str(document["at"]),
        }
        if decision.accepted:
            _move(model, audit, candidate.version, champion.version if champion else None, tags)
        else:
            model.tag(candidate.version, tags)
        audit.finish("FINISHED")
    except BaseException:
        with suppress(Exception):  # what led here is what the user must see
            audit.finish("FAILED")
        raise
    return audit.run_id


def _log(audit: Tracker, document: dict[str, object], candidate: _Judged, champion: _Judged | None) -> None:
    for role, judged in (("candidate", candidate), ("champion", champion)):
        if judged is None:
            continue
        audit.log_text(judged.evaluation.model_dump_json(indent=1), f"{role}/{EVALUATION}")
        report = storage.join(judged.folder, REPORT)
        if storage.exists(report):
            audit.log_text(storage.read_bytes(report).decode(), f"{role}/{REPORT}")
        audit.log_metrics({f"{role}/{name}": m.value for name, m in judged.evaluation.measures.items()}, 0)
    audit.log_text(json.dumps(document, indent=1), "decision.json")


def _move(model: RegisteredModel, audit: Tracker, candidate: int, champion: int | None, tags: dict[str, str]) -> None:
    """Move the aliases, if the champion is still the one that was compared; else raise UserError."""
    with model.lock() as check_still_locked:
        present = model.aliases().get(CHAMPION)
        if present != champion:
            raise UserError(
                f"the champion of '{model.name}' is now version {present}, no longer {champion or 'none'}, which "
                f"version {candidate} was compared with: run this again"
            )
        # The whole record comes before the alias, so that no champion is without one; but it says "moving" until the
        # alias has moved: cut off in between, it tells the reader to look at the alias, and claims nothing untrue.
        model.tag(candidate, tags)
        audit.client.set_tag(audit.run_id, "promotion.moved", "moving")
        if champion is not None:
            model.point(PREVIOUS, champion)
        check_still_locked()
        model.point(CHAMPION, candidate)
        model.tag(candidate, {"promotion.decision": "accepted"})
        for key, value in (("promotion.decision", "accepted"), ("promotion.moved", "true")):
            audit.client.set_tag(audit.run_id, key, value)
