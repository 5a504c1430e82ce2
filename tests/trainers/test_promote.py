"""Promotions against a real registry: what moves, what is written, and what happens when something goes wrong.

Evaluations are made up here, so that each test says exactly what was found; tests of the whole way are elsewhere.
"""

import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from mlflow import MlflowClient, MlflowException
from mlflow.entities import Run
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

from cluster import storage
from cluster.errors import UserError
from cluster.promotion import Gates
from cluster.registry import RegisteredModel
from cluster.tracking import Tracker
from data_shards import Manifest
from data_shards.manifest import ShardEntry
from trainers.fidelity.evaluation import (
    Evaluation,
    ExtractorRecord,
    Generation,
    Measure,
    ModelRecord,
    Reference,
    SampleRecord,
)
from trainers.gates import load_gates
from trainers.promote import Features, PromotionOutcome, promote, rollback

NUM_SAMPLES, DIM, NUM_REAL = 6, 4, 9
NAME = "model"


@dataclass(frozen=True)
class Difference:
    value: float
    interval: tuple[float, float]


@dataclass
class World:
    """What evaluations will find, by version, and what was asked."""

    kid: dict[int, float] = field(default_factory=lambda: {1: 0.5, 2: 0.4, 3: 0.3})
    copy_rate: dict[int, float] = field(default_factory=dict)
    digest: str = "r" * 64
    scores: dict[int, list[float]] = field(default_factory=lambda: dict.fromkeys(range(1, 6), [30.0] * NUM_SAMPLES))
    """CLIP scores of each image; none: no extractor read prompts."""
    seeds: dict[int, int] = field(default_factory=dict)
    prompts: dict[int, str] = field(default_factory=dict)
    resolution: dict[int, int] = field(default_factory=dict)
    evaluated: list[int] = field(default_factory=list)
    writes_features: bool = True
    writes_scores: bool = True
    on_evaluate: Callable[[int], None] = lambda version: None

    def evaluate(self, model_uri: str, out: str) -> Evaluation:
        version = int(model_uri.rpartition("/")[2])
        self.evaluated.append(version)
        measures = {
            "kid_random_vgg": (self.kid[version], "random_vgg"),
            "copy_rate_random_vgg": (self.copy_rate.get(version, 0.0), "random_vgg"),
        }
        if version in self.scores:
            measures["clip_score"] = (float(np.nanmean(self.scores[version])), "clip")
        evaluation = Evaluation(
            created="2026-01-01T00:00:00Z",
            medsynth_version="0",
            git_commit="abc",
            model=ModelRecord(uri=model_uri, name=model_uri, digest="m" * 64),
            reference=Reference(
                shards="shards", name="set", digest=self.digest, splits=("test",), num_images=9, num_training_images=9
            ),
            generation=Generation(
                seed=self.seeds.get(version, 0),
                settings={},
                images_per_prompt=1,
                batch_size=2,
                resolution=self.resolution.get(version, 16),
                device="cpu",
                seconds_per_image=1.0,
            ),
            samples=(SampleRecord(prompt=self.prompts.get(version, "a polyp")),) * NUM_SAMPLES,
            measures={
                name: Measure(
                    value=value,
                    better="higher" if name == "clip_score" else "lower",
                    interval=(0, 100) if name == "clip_score" else (max(value - 0.01, 0.0), value + 0.01),
                    extractor=label,
                    num_generated=NUM_SAMPLES,
                    about="",
                )
                for name, (value, label) in measures.items()
            },
            extractors={"random_vgg": ExtractorRecord(uri="random-vgg", digest="d", dim=DIM, resize="")},
        )
        if self.writes_features:
            features = np.full((NUM_SAMPLES, DIM), self.kid[version], np.float32)
            packed = safetensors.numpy.save({"features": features})
            storage.write_bytes(storage.join(out, "features", "random_vgg.safetensors"), packed)
        if self.writes_scores:
            scores = {"clip_score": np.array(self.scores[version])} if version in self.scores else {}
            storage.write_bytes(storage.join(out, "scores.safetensors"), safetensors.numpy.save(scores))
        storage.write_bytes(storage.join(out, "report.html"), f"<p>of {version}".encode())
        evaluation.save(out)
        self.on_evaluate(version)
        return evaluation


def paired_difference(metric: str, real: Features, candidate: Features, champion: Features, *, seed: int) -> Difference:
    """The difference that the features were made with, as sure as can be."""
    if metric != "kid":
        raise ValueError(f"no paired difference of '{metric}'")
    assert real.shape == (NUM_REAL, DIM)
    assert candidate.shape == champion.shape == (NUM_SAMPLES, DIM)
    value = float((candidate - champion).mean())
    return Difference(value, (value - 0.01, value + 0.01))


def try_to_promote(
    uri: str, world: World, *, gates: Mapping[str, Any] | None = None, dry_run: bool = False
) -> PromotionOutcome:
    return promote(
        uri,
        "shards",
        "evaluations",
        gates=Gates.model_validate(gates or {}),
        evaluate=world.evaluate,
        real_features=lambda evaluation, label: np.zeros((NUM_REAL, DIM), np.float32),
        paired_difference=paired_difference,
        seed=0,
        dry_run=dry_run,
    )


def write_manifest(shards: str) -> Manifest:
    manifest = Manifest(
        name="set",
        source={},
        split_rule="by hand",
        groups={},
        captions={},
        licences={},
        quarantined={},
        conversions={},
        shards=(
            ShardEntry(
                name="set-train-000000.tar",
                split="train",
                num_samples=1,
                num_bytes=1,
                sha256="0" * 64,
                index_sha256="0" * 64,
            ),
        ),
    )
    manifest.save(shards)
    return manifest


def register_versions(name: str, count: int, digest: str) -> None:
    client = MlflowClient()
    client.create_registered_model(name)
    for _ in range(count):
        client.create_model_version(name, "s3://nowhere/model", tags={"manifest_digest": digest})


@pytest.fixture
def model(tracking_uri: str) -> RegisteredModel:
    """A registered model of three versions without a champion."""
    register_versions(NAME, 3, write_manifest("shards").digest)
    return RegisteredModel(tracking_uri, NAME)


@pytest.fixture
def world() -> World:
    return World()


def everything(model: RegisteredModel) -> tuple[Any, ...]:
    """All that a promotion may write."""
    client = model.client
    return (
        model.aliases(),
        [model.version(number).tags for number in (1, 2, 3)],
        sorted(run.info.run_id for run in audits(client)),
        sorted(found.name for found in client.search_registered_models()),
    )


def audits(client: MlflowClient) -> list[Run]:
    experiment = client.get_experiment_by_name("promotions")
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def artifact(audit_run: str | None, path: str) -> str:
    assert audit_run is not None
    return Tracker(MlflowClient().tracking_uri, audit_run).read_text(path)


def test_first_then_better_then_back(model: RegisteredModel, world: World) -> None:
    first = try_to_promote("models:/model/1", world)
    assert (first.moved, first.champion, first.decision.is_first) == (True, None, True)
    assert model.aliases() == {"champion": 1}

    second = try_to_promote("models:/model/2", world)
    assert (second.moved, second.champion) == (True, 1)
    assert model.aliases() == {"champion": 2, "previous": 1}
    assert world.evaluated == [1, 2, 1], "candidate and champion are both evaluated anew"

    assert try_to_promote("models:/model/latest", world).moved
    assert model.aliases() == {"champion": 3, "previous": 2}

    assert rollback("models:/model@champion") == (3, 2)
    assert model.aliases() == {"champion": 2, "previous": 3}
    assert "promotion.rolled_back" in model.version(3).tags
    assert rollback("models:/model@champion") == (2, 3)
    assert len(audits(model.client)) == 5


def test_what_was_decided_is_written_beside_the_version_and_in_a_run(model: RegisteredModel, world: World) -> None:
    model.point("champion", 1)
    outcome = try_to_promote("models:/model/2", world)
    tags = model.version(2).tags
    assert tags["promotion.decision"] == "accepted"
    assert "kid_random_vgg 0.5 → 0.4" in tags["promotion.reason"]
    assert tags["promotion.compared_with"] == "1"
    assert tags["promotion.run_id"] == outcome.audit_run
    figures = json.loads(tags["promotion.figures"])
    assert figures["quality kid_random_vgg"]["candidate"] == 0.4
    assert figures["quality kid_random_vgg"]["high"] == pytest.approx(-0.09)

    (run,) = audits(model.client)
    assert run.info.status == "FINISHED"
    assert run.data.tags["medsynth.kind"] == "promotion"
    assert run.data.tags["promotion.moved"] == "true"
    assert run.data.metrics["candidate/kid_random_vgg"] == 0.4
    assert run.data.metrics["champion/kid_random_vgg"] == 0.5
    document = json.loads(artifact(outcome.audit_run, "decision.json"))
    assert document["decision"] == outcome.decision.model_dump(mode="json")
    assert document["gates"]["memorization"]["limit"] == 0.05
    assert "@" in document["by"]
    for role, version in (("candidate", 2), ("champion", 1)):
        there = Evaluation.model_validate_json(artifact(outcome.audit_run, f"{role}/evaluation.json"))
        assert there == Evaluation.load(f"evaluations/model-{version}")
        assert artifact(outcome.audit_run, f"{role}/report.html") == f"<p>of {version}"


@pytest.mark.parametrize(
    ("found", "gates", "reason"),
    [
        ({"kid": {1: 0.4, 2: 0.395}}, {}, "quality: kid_random_vgg 0.4 → 0.395"),
        ({"kid": {1: 0.4, 2: 0.5}}, {}, "quality"),
        ({"copy_rate": {2: 0.5}}, {}, "it copies its training images"),
        ({}, {"approval": {"required": True}}, "no one has approved it: set the version's tag 'approved_by'"),
    ],
)
def test_a_refusal_moves_nothing_and_says_why(
    model: RegisteredModel, found: dict[str, Any], gates: dict[str, Any], reason: str
) -> None:
    model.point("champion", 1)
    outcome = try_to_promote("models:/model/2", World(**found), gates=gates)
    assert not outcome.moved
    assert reason in outcome.decision.reason
    assert model.aliases() == {"champion": 1}
    assert model.version(2).tags["promotion.decision"] == "refused"
    assert reason in model.version(2).tags["promotion.reason"]
    assert model.version(1).tags.keys() == {"manifest_digest"}
    (run,) = audits(model.client)
    assert (run.data.tags["promotion.decision"], run.data.tags["promotion.moved"]) == ("refused", "false")
    assert json.loads(artifact(outcome.audit_run, "decision.json"))["reason"] == outcome.decision.reason


CHAMPION_SCORES = [10.0, 20, 30, 40, 50, math.nan]


def test_alignment_is_compared_pair_by_pair(model: RegisteredModel) -> None:
    """Prompts differ by 40, so either mean may be anywhere; yet of every prompt the candidate shows a little less."""
    model.point("champion", 1)
    worse = [score - loss for score, loss in zip(CHAMPION_SCORES, (1.1, 0.9, 1.0, 1.2, 0.8, 1.0), strict=True)]
    refused = try_to_promote("models:/model/2", World(scores={1: CHAMPION_SCORES, 2: worse}))
    assert not refused.moved
    (check,) = [check for check in refused.decision.checks if not check.passed]
    assert (check.gate, check.measure) == ("alignment", "clip_score")
    assert check.numbers["difference"] == pytest.approx(-1)
    assert check.numbers["high"] < -0.8

    either_way = [score + gain for score, gain in zip(CHAMPION_SCORES, (9.0, -9, -9, -9, 9, 0), strict=True)]
    unsure = try_to_promote("models:/model/2", World(scores={1: CHAMPION_SCORES, 2: either_way}))
    assert not unsure.moved
    assert "not enough pictures to rule out a loss of 3: draw" in unsure.decision.reason
    gates = {"alignment": {"largest_loss": 0.5}}
    assert try_to_promote("models:/model/2", World(scores={1: CHAMPION_SCORES, 2: either_way}), gates=gates).moved


def test_alignment_that_was_not_measured_is_not_passed_unless_gates_say_so(model: RegisteredModel) -> None:
    model.point("champion", 1)
    refused = try_to_promote("models:/model/2", World(scores={}))
    assert not refused.moved
    assert "alignment: nothing measured it for both models" in refused.decision.reason
    assert try_to_promote("models:/model/2", World(scores={}), gates={"alignment": {"required": False}}).moved


@pytest.mark.parametrize(
    ("scores", "writes", "measure", "said"),
    [
        (CHAMPION_SCORES, False, None, "evaluations/model-2 has no scores.safetensors: remove it, and run this again"),
        (CHAMPION_SCORES[1:], True, None, "model-2/scores.safetensors holds 5 scores for 6 samples"),
        ([math.nan] * 5 + [10.0], True, None, "alignment: clip_score: no pair of images has both scores"),
        (CHAMPION_SCORES, True, "kid_random_vgg", "has no score of each image by 'kid_random_vgg'; there are clip_s"),
    ],
)
def test_alignment_without_scores(
    model: RegisteredModel, scores: list[float], writes: bool, measure: str | None, said: str
) -> None:
    model.point("champion", 1)
    world = World(scores={1: CHAMPION_SCORES, 2: scores}, writes_scores=writes)
    with pytest.raises(UserError, match=said):
        try_to_promote("models:/model/2", world, gates={"alignment": {"measure": measure}})


@pytest.mark.parametrize("gate", ["quality", "alignment"])
@pytest.mark.parametrize("champion", [1, None])
def test_a_measure_that_does_not_exist_is_told_of_before_the_champion_is_evaluated(
    model: RegisteredModel, world: World, gate: str, champion: int | None
) -> None:
    if champion:
        model.point("champion", champion)
    with pytest.raises(UserError, match=f"{gate}.measure: 'kid_dinov2' was not measured; there are kid_random_vgg"):
        try_to_promote("models:/model/2", world, gates={gate: {"measure": "kid_dinov2"}})
    assert world.evaluated == [2]


def test_approval_given_while_it_was_evaluated_counts(model: RegisteredModel, world: World) -> None:
    gates = {"approval": {"required": True, "tag": "signed_by"}}
    assert not try_to_promote("models:/model/1", world, gates=gates).moved
    world.on_evaluate = lambda version: model.tag(version, {"signed_by": "Dr A"})
    outcome = try_to_promote("models:/model/1", world, gates=gates)
    assert outcome.moved
    assert "approved by Dr A" in outcome.decision.reason


@pytest.mark.parametrize("copies", [0.0, 0.5])
def test_a_dry_run_decides_the_same_and_changes_nothing(model: RegisteredModel, world: World, copies: float) -> None:
    world.copy_rate = {2: copies}
    model.point("champion", 1)
    before = everything(model)
    dry = try_to_promote("models:/model/2", world, dry_run=True)
    assert everything(model) == before
    assert (dry.moved, dry.audit_run) == (False, None)
    assert dry.decision.accepted is (copies == 0)
    assert try_to_promote("models:/model/2", world).decision == dry.decision
    assert everything(model) != before


def _other_data(world: World, model: RegisteredModel) -> None:
    model.tag(2, {"manifest_digest": "f" * 64})


def _no_features(world: World, model: RegisteredModel) -> None:
    world.writes_features = False


def _other_reference(world: World, model: RegisteredModel) -> None:
    world.on_evaluate = lambda version: setattr(world, "digest", "other")


def _other_seed(world: World, model: RegisteredModel) -> None:
    world.seeds = {1: 1}


def _other_resolution(world: World, model: RegisteredModel) -> None:
    world.resolution = {1: 32}


def _other_prompts(world: World, model: RegisteredModel) -> None:
    world.prompts = {1: "no polyp"}


def _champion_already(world: World, model: RegisteredModel) -> None:
    model.point("champion", 2)


@pytest.mark.parametrize(
    ("uri", "prepare", "gates", "said"),
    [
        ("models:/modle/2", None, {}, "no model 'modle' is registered: did you mean 'model'"),
        ("models:/model/9", None, {}, "has no version 9: there are 1, 2, 3"),
        ("some/folder", None, {}, "write models:/NAME/VERSION"),
        ("models:/model/2", _champion_already, {}, "version 2 of 'model' is the champion already"),
        ("models:/model/2", _other_data, {}, "was trained on data ffffffffffff, but shards is"),
        ("models:/model/2", _no_features, {}, "evaluations/model-2 has no features by random_vgg"),
        ("models:/model/2", _other_reference, {}, "made with other real images"),
        ("models:/model/2", _other_seed, {}, "made with other seeds"),
        (
            "models:/model/2",
            _other_resolution,
            {},
            "version 2 draws at 16 pixels, the champion, version 1, at 32: models of other resolutions cannot",
        ),
        ("models:/model/2", _other_prompts, {}, "made with other prompts"),
        ("models:/model/2", None, {"measure": "kid_dinov2"}, "'kid_dinov2' was not measured"),
        ("models:/model/2", None, {"measure": "copy_rate_random_vgg"}, "no paired difference of 'copy_rate'"),
    ],
)
def test_mistakes_are_told_in_a_line_and_change_nothing(
    model: RegisteredModel,
    world: World,
    uri: str,
    prepare: Callable[[World, RegisteredModel], None] | None,
    gates: dict[str, Any],
    said: str,
) -> None:
    model.point("champion", 1)
    if prepare:
        prepare(world, model)
    before = everything(model)
    with pytest.raises(UserError, match=said):
        try_to_promote(uri, world, gates={"quality": gates})
    assert everything(model) == before


def test_a_champion_whose_run_tells_of_another_resolution_is_not_evaluated(
    model: RegisteredModel, world: World
) -> None:
    for resolution in (16, 32):
        run = Tracker.start(experiment="trained", run_name="champion", tags={})
        run.log_params({"data": {"resolution": resolution}})
        model.client.create_model_version(NAME, "s3://nowhere/model", run_id=run.run_id)
    world.kid |= {4: 0.5, 5: 0.5}
    model.point("champion", 5)
    with pytest.raises(UserError, match="version 2 draws at 16 pixels, the champion, version 5, at 32"):
        try_to_promote("models:/model/2", world)
    assert world.evaluated == [2]
    model.point("champion", 4)
    assert try_to_promote("models:/model/2", world, dry_run=True).decision.accepted


def test_nothing_to_roll_back_to(model: RegisteredModel, world: World) -> None:
    with pytest.raises(UserError, match="has no previous champion to go back to: aliases are none"):
        rollback("models:/model/1")
    try_to_promote("models:/model/1", world)
    with pytest.raises(UserError, match="has no previous champion to go back to"):
        rollback("models:/model@champion")
    assert model.aliases() == {"champion": 1}


WRITES = ("create_run", "log_text", "log_batch", "set_model_version_tag", "set_registered_model_alias")


def test_wherever_the_server_fails_the_champion_is_whole_and_another_try_completes(
    model: RegisteredModel, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first write fails, then the second, and so on, until none is left to fail."""
    model.point("champion", 1)
    written: list[str] = []
    failing = 0

    def fails_once(name: str) -> Callable[..., Any]:
        write = getattr(MlflowClient, name)

        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            written.append(name)
            if len(written) == failing + 1:
                raise MlflowException("API request failed: connection refused")
            return write(*arguments, **keywords)

        return wrapper

    for name in WRITES:
        monkeypatch.setattr(MlflowClient, name, fails_once(name))
    while True:
        written.clear()
        try:
            try_to_promote("models:/model/2", world)
            pytest.fail("no write after the alias failed")
        except UserError as error:
            told = str(error)
        assert "API request failed: connection refused" in told
        assert len(written) == failing + 1, "nothing is written after what failed"
        decided = model.version(2).tags.get("promotion.decision")
        if written[-2:] == ["set_registered_model_alias", "set_model_version_tag"]:
            # All but the last word was written, and that is no lie either.
            assert (model.aliases(), decided) == ({"champion": 2, "previous": 1}, "accepted, moving")
            assert not model.unlock(), "no lock is left"
            break
        assert model.aliases()["champion"] == 1
        assert model.aliases().get("previous", 1) == 1
        assert decided in (None, "accepted, moving"), "it is not accepted before the alias has moved"
        assert not model.unlock(), "no lock is left"
        failing += 1
    assert {*written} == {*WRITES}
    failing = -1
    model.point("champion", 1)
    assert try_to_promote("models:/model/2", world).moved
    assert model.aliases() == {"champion": 2, "previous": 1}
    assert model.version(2).tags["promotion.decision"] == "accepted"
    assert [run.data.tags["promotion.moved"] for run in audits(model.client) if run.info.status == "FINISHED"] == [
        "true"
    ]


@pytest.mark.parametrize(
    "refusal",
    [
        MlflowException("Permission denied", PERMISSION_DENIED),
        MlflowException("API request to endpoint /api/2.0/... failed with error code 403 != 200. Response body: ''"),
    ],
)
def test_whoever_has_no_right_is_told_so(
    model: RegisteredModel, world: World, refusal: MlflowException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise refusal

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", refuse)
    with pytest.raises(UserError, match=r"alias 'champion' of model at .*: access refused; set MLFLOW_TRACKING_USER"):
        try_to_promote("models:/model/1", world)
    assert model.aliases() == {}


def test_a_champion_that_moved_meanwhile_is_not_overtaken(model: RegisteredModel, world: World) -> None:
    model.point("champion", 1)
    world.on_evaluate = lambda version: model.point("champion", 2)
    with pytest.raises(
        UserError, match="is now version 2, no longer 1, which version 3 was compared with: run this again"
    ):
        try_to_promote("models:/model/3", world)
    assert model.aliases() == {"champion": 2}
    assert "promotion.decision" not in model.version(3).tags
    (run,) = audits(model.client)
    assert (run.info.status, run.data.tags["promotion.moved"]) == ("FAILED", "false")


@pytest.mark.parametrize("champion", [1, None])
def test_of_two_at_once_one_wins(model: RegisteredModel, champion: int | None) -> None:
    """Both have compared with the same champion before either moves."""
    if champion is not None:
        model.point("champion", champion)
    both_evaluated = threading.Barrier(2)
    ends: dict[int, bool | UserError] = {}

    def run(version: int) -> None:
        def meet(evaluated: int) -> None:
            if evaluated == (champion or version):
                both_evaluated.wait()

        world = World(on_evaluate=meet)
        try:
            ends[version] = try_to_promote(f"models:/model/{version}", world).moved
        except UserError as error:
            ends[version] = error

    threads = [threading.Thread(target=run, args=(version,)) for version in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check_one_won(model, champion, ends)


def check_one_won(model: RegisteredModel, champion: int | None, ends: Mapping[int, object]) -> None:
    winners = [version for version, end in ends.items() if end is True]
    assert len(winners) == 1, ends
    (loser,) = ends.keys() - set(winners)
    assert "is being promoted by" in str(ends[loser]) or "run this again" in str(ends[loser])
    previous = {} if champion is None else {"previous": champion}
    assert model.aliases() == {"champion": winners[0], **previous}
    assert "promotion.decision" not in model.version(loser).tags


RACER = """
import os, sys, time
from pathlib import Path
from tests.trainers.test_promote import World, try_to_promote
from cluster.errors import UserError

version, rounds, os.environ["MLFLOW_TRACKING_URI"] = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
for number in range(rounds):
    def meet(evaluated):
        if evaluated == 1:
            Path(f"{number}-{version}").touch()
            while not Path(f"{number}-{5 - version}").exists():
                time.sleep(0.001)
    try:
        end = try_to_promote(f"models:/race-{number}/{version}", World(on_evaluate=meet)).moved
    except UserError as error:
        end = str(error)
    Path(f"{number}-{version}-end").write_text(str(end))
"""


@pytest.mark.slow
def test_of_two_processes_at_once_one_wins_on_a_real_server(
    mlflow_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = 3
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    digest = write_manifest("shards").digest
    for number in range(rounds):
        register_versions(f"race-{number}", 3, digest)
        RegisteredModel(mlflow_server, f"race-{number}").point("champion", 1)
    racers = [
        subprocess.Popen([sys.executable, "-c", RACER, str(version), str(rounds), mlflow_server]) for version in (2, 3)
    ]
    try:
        assert [racer.wait(240) for racer in racers] == [0, 0]
    finally:
        for racer in racers:
            racer.kill()
    for number in range(rounds):
        ends = {version: Path(f"{number}-{version}-end").read_text() for version in (2, 3)}
        said = {version: True if end == "True" else end for version, end in ends.items()}
        check_one_won(RegisteredModel(mlflow_server, f"race-{number}"), 1, said)


def test_gates_from_a_file() -> None:
    default = Path(__file__).parents[2] / "recipes" / "gates" / "default.yaml"
    assert load_gates(str(default)) == Gates() == load_gates(None)
    Path("gates.yaml").write_text("memorization: {limit: 0.2}\n")
    assert load_gates("gates.yaml").memorization.limit == 0.2
    Path("empty.yaml").write_text("# all as it is\n")
    assert load_gates("empty.yaml") == Gates()
    for text, said in (
        ("memorisation: {limit: 0.2}", "gates.yaml: memorisation: Extra inputs"),
        ("memorization: {limit: -1}", "gates.yaml: memorization.limit: Input should be greater than 0"),
        ("memorization: {limit: .inf}", "gates.yaml: memorization.limit: Input should be"),
        ("quality: {limit: 0.1}", "gates.yaml: quality: .*in the unit of a measure"),
        ("a: [", "gates.yaml is not YAML"),
    ):
        Path("gates.yaml").write_text(text)
        with pytest.raises(UserError, match=said):
            load_gates("gates.yaml")
