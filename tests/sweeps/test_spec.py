"""Specifications that are right are read; those that are wrong say which key, and what to write."""

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from cluster.errors import UserError
from sweeps.guidance_spec import GuidanceGrid
from sweeps.spec import ASHA, SweepSpec, dump_spec, load_spec
from trainers.fidelity.bootstrap import PAIRED_METRICS

LEARNING_RATE = "denoiser.training.learning_rate"


def load(document: dict[str, Any], tmp_path: Path) -> SweepSpec:
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return load_spec(str(path))


def test_a_specification_is_written_as_it_is_read(sweep_document: dict[str, Any], tmp_path: Path) -> None:
    sweep_document["scheduler"] = {"kind": "asha", "grace_steps": 2}
    sweep_document["fixed"]["fidelity"] = None
    spec = load(sweep_document, tmp_path)
    assert spec.scheduler == ASHA(grace_steps=2, reduction=3)
    (tmp_path / "again.yaml").write_text(dump_spec(spec))
    assert load_spec(str(tmp_path / "again.yaml")) == spec
    assert load(sweep_document | {"scheduler": "none"}, tmp_path).scheduler is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"serach": "grid"}, "unknown key 'serach': did you mean 'search'?"),
        ({"space": {}}, "space"),
        ({"space": {LEARNING_RATE: {"lograndom": [1, 2]}}}, "unknown key .*lograndom'.* did you mean 'loguniform'?"),
        ({"space": {LEARNING_RATE: {}}}, f"space.{LEARNING_RATE}: give one of"),
        ({"space": {LEARNING_RATE: {"choice": [1], "grid": [2]}}}, "not choice and grid"),
        ({"space": {LEARNING_RATE: {"choice": []}}}, "choice is empty"),
        ({"space": {LEARNING_RATE: {"grid": [1, 1]}}}, "a value twice"),
        ({"space": {LEARNING_RATE: {"loguniform": [1e-2, 1e-4]}}}, "loguniform is empty: 0.01 is not below 0.0001"),
        ({"space": {LEARNING_RATE: {"loguniform": [0, 1]}}}, "begins above 0"),
        ({"search": "grid"}, f"space.{LEARNING_RATE}: with search: grid, each key is a grid"),
        ({"fixed": {LEARNING_RATE: 1}}, "both fixed and in the space"),
        ({"budget": {}}, "budget: give trials, gpu_hours or wall_hours"),
        ({"budget": {"trials": 0}}, "budget.trials"),
        ({"scheduler": {"kind": "asha", "grace_step": 1}}, "did you mean 'grace_steps'?"),
    ],
)
def test_a_mistake_is_named(
    sweep_document: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load(sweep_document | change, tmp_path)


def test_a_condition_is_on_a_key_above_and_one_of_its_values(sweep_document: dict[str, Any], tmp_path: Path) -> None:
    schedule, warmup = "denoiser.training.learning_rate_schedule", "denoiser.training.warmup_steps"
    space = {schedule: {"choice": ["constant", "cosine"]}, warmup: {"choice": [1], "when": {schedule: "cosine"}}}
    load(sweep_document | {"space": space}, tmp_path)
    with pytest.raises(UserError, match="is not a key of the space above it"):
        load(sweep_document | {"space": dict(reversed(space.items()))}, tmp_path)
    space[warmup] = {"choice": [1], "when": {schedule: "linear"}}
    with pytest.raises(UserError, match="'linear' is none of the values listed"):
        load(sweep_document | {"space": space}, tmp_path)


def test_a_file_that_is_no_sweep(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("- 1")
    with pytest.raises(UserError, match="holds no sweep"):
        load_spec(str(tmp_path / "a.yaml"))
    (tmp_path / "a.yaml").write_text("a: [")
    with pytest.raises(UserError, match="is not YAML"):
        load_spec(str(tmp_path / "a.yaml"))


def test_fidelity_of_guidance_is_what_pairs_are_compared_by() -> None:
    assert get_args(GuidanceGrid.model_fields["fidelity"].annotation) == PAIRED_METRICS


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"fidelity": "kids"}, "guidance.fidelity"),
        ({"extractors": []}, "guidance.extractors"),
        ({"num_samples": 1}, "guidance.num_samples"),
        ({"guidance_scales": [-1]}, "guidance.guidance_scales.0"),
    ],
)
def test_a_mistake_in_the_grid_is_named(
    sweep_document: dict[str, Any], grid: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        load(sweep_document | {"guidance": grid}, tmp_path)
