"""What a sweep decides, from nothing but its specification and its trials."""

import math
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import UserError
from sweeps import space
from sweeps.spec import SweepSpec, Trial, load_spec
from trainers.recipe import MSDMRecipe

RATE, SCHEDULE = "denoiser.training.learning_rate", "denoiser.training.learning_rate_schedule"
WARMUP = "denoiser.training.warmup_steps"
FIDELITY = {"fidelity": {"every_steps": 2}}
CONDITIONAL = {
    SCHEDULE: {"choice": ["constant", "cosine"]},
    WARMUP: {"choice": [0, 1], "when": {SCHEDULE: "cosine"}},
    RATE: {"loguniform": [1e-4, 1e-2]},
}


def trial(number: int, params: dict[str, Any], value: float | None, state: Any = "finished") -> Trial:
    return Trial(number, state, params, value, 6, 1.0, None, {} if value is None else {6: value})


def run(spec: SweepSpec, trials: list[Trial], count: int) -> list[Trial]:
    """The sweep goes on for `count` trials, whose loss is how many orders of magnitude the rate is off 1e-3."""
    trials = list(trials)
    for number in range(len(trials), len(trials) + count):
        params = space.next_params(spec, trials)
        trials.append(trial(number, params, abs(math.log10(params[RATE]) + 3)))
    return trials


def test_the_estimator_learns_and_a_sweep_that_was_cut_off_draws_what_it_would_have_drawn(
    sweep_document: dict[str, Any],
) -> None:
    spec = SweepSpec.model_validate(sweep_document)
    whole = run(spec, [], 24)
    assert run(spec, whole[:7], 17) == whole
    assert all(1e-4 <= each.params[RATE] <= 1e-2 for each in whole)
    assert len({each.params[RATE] for each in whole}) == 24

    def loss_of_later_trials(search: str) -> float:
        seeds = [spec.model_copy(update={"search": search, "seed": seed}) for seed in range(5)]
        return sum(each.value or 0 for seeded in seeds for each in run(seeded, [], 24)[12:])

    assert loss_of_later_trials("optuna") < 0.7 * loss_of_later_trials("random")


def test_failed_trials_are_avoided(sweep_document: dict[str, Any]) -> None:
    """Everything above 1e-3 diverges."""
    spec = SweepSpec.model_validate(sweep_document)
    trials: list[Trial] = []
    for number in range(24):
        params = space.next_params(spec, trials)
        diverges = params[RATE] > 1e-3
        trials.append(trial(number, params, None if diverges else 1.0, "failed" if diverges else "finished"))
    early, late = trials[:8], trials[-8:]
    assert sum(each.state == "failed" for each in early) > sum(each.state == "failed" for each in late)


def test_conditional_keys_are_there_only_where_they_count(sweep_document: dict[str, Any]) -> None:
    spec = SweepSpec.model_validate(sweep_document | {"space": CONDITIONAL})
    trials = run(spec, [], 12)
    assert {each.params[SCHEDULE] for each in trials} == {"constant", "cosine"}
    for each in trials:
        assert (WARMUP in each.params) == (each.params[SCHEDULE] == "cosine")
    recipe = space.recipe_of(spec, {SCHEDULE: "cosine", WARMUP: 1, RATE: 1e-05})
    assert isinstance(recipe, MSDMRecipe)
    training = recipe.denoiser.training
    assert (training.learning_rate_schedule, training.warmup_steps, training.learning_rate) == ("cosine", 1, 1e-5)
    assert training.validate_every_steps == 2  # what is fixed
    assert len(space.corners(spec)) == 2 + 2 * 2


def test_a_grid_is_walked_once(sweep_document: dict[str, Any]) -> None:
    grids = {
        SCHEDULE: {"grid": ["constant", "cosine"]},
        WARMUP: {"grid": [0, 1], "when": {SCHEDULE: "cosine"}},
        RATE: {"grid": [1e-4, 1e-3]},
    }
    spec = SweepSpec.model_validate(sweep_document | {"space": grids, "search": "grid", "budget": {}})
    trials = run(spec, [], space.num_trials(spec) or 0)
    assert [tuple(each.params.values()) for each in trials] == [
        ("constant", 1e-4),
        ("constant", 1e-3),
        ("cosine", 0, 1e-4),
        ("cosine", 0, 1e-3),
        ("cosine", 1, 1e-4),
        ("cosine", 1, 1e-3),
    ]
    assert space.num_trials(spec.model_copy(update={"budget": spec.budget.model_copy(update={"trials": 3})})) == 3


def test_a_grid_among_drawn_keys_is_walked_in_turn(sweep_document: dict[str, Any]) -> None:
    spec = SweepSpec.model_validate(
        sweep_document | {"space": {SCHEDULE: {"grid": ["constant", "cosine"]}, RATE: {"loguniform": [1e-4, 1e-2]}}}
    )
    trials = run(spec, [], 6)
    assert [each.params[SCHEDULE] for each in trials] == ["constant", "cosine"] * 3
    assert len({each.params[RATE] for each in trials}) == 6


def test_the_best_is_one_that_was_trained_to_its_end(sweep_document: dict[str, Any]) -> None:
    spec = SweepSpec.model_validate(sweep_document)
    trials = [
        trial(0, {RATE: 1e-3}, 0.5),
        trial(1, {RATE: 1e-3}, 0.1, "stopped"),
        trial(2, {RATE: 1e-3}, 0.2, "running"),
        trial(3, {RATE: 1e-3}, None, "failed"),
        trial(4, {RATE: 1e-3}, 0.4),
    ]
    best = space.best_trial(spec, trials)
    assert best is not None
    assert best.number == 4
    largest = spec.model_copy(update={"objective": spec.objective.model_copy(update={"mode": "max"})})
    best = space.best_trial(largest, trials)
    assert best is not None
    assert best.number == 0
    assert space.best_trial(spec, trials[1:4]) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"space": {"denoiser.training.learning_rat": {"choice": [1e-3]}}},
            "unknown key 'denoiser.training.learning_rat': did you mean 'learning_rate'?",
        ),
        ({"space": {WARMUP: {"uniform": [0, 4]}}}, "denoiser.training.warmup_steps.*integer"),
        ({"space": {RATE: {"choice": [1e-3, -1]}}}, "denoiser.training.learning_rate.*greater than 0"),
        ({"space": {"cluster.num_workers": {"choice": [1, 8]}}}, "is not a multiple of micro_batch_size 2 x 8 workers"),
        ({"objective": {"metric": "denoiser/validation_los"}}, "never logged; did you mean 'denoiser/validation_loss'"),
        ({"objective": {"metric": "fidelity/kid_random_vgg_64"}}, "the recipe measures no fidelity"),
        ({"budget": {"gpu_hours": 1}}, "the recipe uses no GPU"),
        ({"objective": {"metric": "denoiser/loss", "mode": "max"}}, "less is better of denoiser/loss, so write min"),
        (
            {"objective": {"metric": "fidelity/coverag_random_vgg_64", "mode": "max"}, "fixed": FIDELITY},
            "did you mean 'fidelity/coverage_random_vgg_64'",
        ),
        (
            {"objective": {"metric": "fidelity/coverage_random_vgg_64"}, "fixed": FIDELITY},
            "more is better of fidelity/coverage_random_vgg_64, so write max",
        ),
        ({"guidance": {}}, "with a block 'guidance', write guidance/kid_random_vgg"),
        (
            {"guidance": {"samplers": ["euler"]}, "objective": {"metric": "guidance/kid_random_vgg"}},
            "guidance.samplers: this model has no 'euler', only ddpm, ddim",
        ),
        ({"scheduler": {"kind": "asha", "grace_steps": 6}}, "asha would stop no trial"),
        ({"scheduler": {"kind": "asha", "grace_steps": 2}, "fixed": {}}, "asha would stop no trial"),
        ({"recipe": "nowhere.yaml"}, "nowhere.yaml"),
    ],
)
def test_what_would_end_a_sweep_later_is_said_at_once(
    sweep_document: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    spec = SweepSpec.model_validate(sweep_document | change)
    with pytest.raises(UserError, match=message):
        space.check(spec)


def test_what_no_key_changes_is_shared(sweep_document: dict[str, Any]) -> None:
    def shared(**keys: Any) -> tuple[str, ...]:
        document = sweep_document | {"space": {key: {"choice": [value]} for key, value in keys.items()}}
        spec = SweepSpec.model_validate(document)
        return space.shared_stages(spec, space.recipe_of(spec, {}))

    assert shared(**{RATE: 1e-3, "sampling.guidance_scale": 2.0}) == ("vae",)
    assert shared(**{RATE: 1e-3, "vae.kl_weight": 1e-5}) == ()
    assert shared(seed=1) == ()
    sweep_document["objective"] = {"metric": "vae/validation_loss"}
    assert shared(**{"denoiser.training.steps": 4}) == ()


def test_as_many_trials_at_once_as_whole_ones_fit(recipe: MSDMRecipe, sweep_document: dict[str, Any]) -> None:
    spec = SweepSpec.model_validate(sweep_document)

    def fitting(nodes: list[dict[str, float]], fidelity: bool = False, **cluster: Any) -> int:
        document = recipe.model_dump() | {"cluster": cluster}
        if fidelity:
            document["fidelity"] = {"every_steps": 2, "use_gpu": cluster.get("use_gpu", False)}
        return space.concurrency(spec, [MSDMRecipe.model_validate(document)], nodes)

    assert fitting([{"CPU": 2}]) == 2
    assert fitting([{"CPU": 2}], num_workers=2) == 1
    assert fitting([{"CPU": 2}], fidelity=True) == 1
    assert fitting([{"CPU": 6}, {"CPU": 6}], cpus_per_worker=4) == 2  # not 3: a process is on one machine
    assert fitting([{"CPU": 16, "GPU": 8}], num_workers=2, use_gpu=True) == 4
    assert fitting([{"CPU": 16, "GPU": 8}], num_workers=2, use_gpu=True, fidelity=True) == 2
    assert fitting([{"CPU": 3, "GPU": 8}], use_gpu=True) == 3
    for nodes in ([{"CPU": 3.0}], [{"CPU": 3.0}, {"CPU": 3.0}]):
        with pytest.raises(UserError, match="a trial has 1 workers of 4 CPUs"):
            fitting(nodes, cpus_per_worker=4)
    capped = spec.model_copy(update={"concurrency": 3})
    assert space.concurrency(capped, [recipe], [{"CPU": 8}]) == 3
    assert space.concurrency(spec, [recipe], [{"CPU": 0}], grows=True) == 1
    assert space.concurrency(capped, [recipe], [{"CPU": 0}], grows=True) == 3


@pytest.mark.parametrize("name", ["msdm-learning-rate", "flux-learning-rate"])
def test_the_specifications_that_come_along_are_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    spec = load_spec(str(root / "sweeps" / "specs" / f"{name}.yaml"))
    assert space.check(spec)
    assert spec.name == name


def test_a_large_space_is_checked_at_some_of_its_corners(sweep_document: dict[str, Any]) -> None:
    of_denoiser = ("learning_rate", "ema_decay", "weight_decay", "max_grad_norm")
    keys = ["denoiser.caption_dropout", "vae.training.learning_rate", "vae.training.ema_decay"]
    keys += [f"denoiser.training.{name}" for name in of_denoiser]
    choices = [0.01 * (number + 1) for number in range(8)]
    spec = SweepSpec.model_validate(sweep_document | {"space": {key: {"choice": choices} for key in keys}})
    corners = space.corners(spec)  # of 8 to the 7th
    assert 32 < len(corners) <= space.MAX_CORNERS
    assert corners == space.corners(spec)


@pytest.mark.parametrize(
    ("fixed", "short"),
    [
        ({}, ""),
        ({"denoiser.training.steps": 9}, ""),
        ({"denoiser.training.steps": 3}, "denoiser 3 of 6 steps"),
        ({"denoiser.training.steps": 3, "vae.training.steps": 2}, "vae 2 of 6 steps, denoiser 3 of 6 steps"),
    ],
)
def test_a_trial_is_short_of_what_the_recipes_file_asks_for(
    sweep_document: dict[str, Any], fixed: dict[str, int], short: str
) -> None:
    pace = {f"denoiser.training.{what}_every_steps": 1 for what in ("validate", "preview", "checkpoint")}
    spec = SweepSpec.model_validate(sweep_document | {"fixed": pace | fixed})
    assert space.shortfall(space.recipe_of(spec, {}), space.full_steps(spec)) == short
