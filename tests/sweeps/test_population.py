"""Population-based training: who goes on from whom, from nothing but the trials so far."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.errors import UserError
from sweeps import population, space
from sweeps.spec import PBT, SweepSpec, Trial, load_spec

RATE = "denoiser.training.learning_rate"
BEST_RATE, STEPS = 1e-3, 6  # of the small recipe


@pytest.fixture
def spec(sweep_document: dict[str, Any]) -> SweepSpec:
    return SweepSpec.model_validate(
        sweep_document
        | {
            "scheduler": {"kind": "pbt", "population": 4, "perturb_steps": 2},
            "search": "random",
            "budget": {},
        }
    )


def ended(trial: Trial) -> Trial:
    """Its loss is how many orders of magnitude its rate is off the best."""
    assert trial.end is not None
    value = abs(math.log10(trial.params[RATE] / BEST_RATE))
    return replace(trial, state="finished", value=value, steps=trial.end)


def run(spec: SweepSpec, trials: list[Trial], count: int, steps: int = STEPS) -> list[Trial]:
    trials = list(trials)
    for _ in range(count):
        trial = space.next_trial(spec, trials, steps)
        assert trial is not None
        trials.append(ended(trial))
    return trials


def test_the_worst_go_on_from_the_best_with_another_rate(spec: SweepSpec) -> None:
    trials = run(spec, [], 12)
    assert [(trial.begin, trial.end) for trial in trials] == [(0, 2)] * 4 + [(2, 4)] * 4 + [(4, 6)] * 4
    assert [trial.parent for trial in trials[:4]] == [None] * 4
    for first in (4, 8):
        before, now = trials[first - 4 : first], trials[first : first + 4]
        ranked = sorted(before, key=lambda trial: trial.value or 0)
        for own, trial in zip(before, now, strict=True):
            if own == ranked[-1]:
                assert trial.parent == ranked[0].number
                assert trial.params != ranked[0].params
            else:
                assert (trial.parent, trial.params) == (own.number, own.params)
    assert all(1e-4 <= trial.params[RATE] <= 1e-2 for trial in trials)


def test_the_population_moves_to_where_it_is_good(spec: SweepSpec) -> None:
    def worst(trials: list[Trial]) -> float:
        return max(trial.value or 0 for trial in trials)

    for seed in range(5):
        seeded = spec.model_copy(update={"seed": seed})
        trials = run(seeded, [], 4 * 20, steps=2 * 20)
        assert worst(trials[-4:]) < 0.5 * worst(trials[:4])


def test_a_sweep_that_was_cut_off_draws_what_it_would_have_drawn(spec: SweepSpec) -> None:
    whole = run(spec, [], 12)
    for cut in (3, 4, 7):
        assert run(spec, whole[:cut], 12 - cut) == whole


def test_a_generation_waits_for_the_one_before(spec: SweepSpec) -> None:
    trials = run(spec, [], 3)
    fourth = space.next_trial(spec, trials, STEPS)
    assert fourth is not None
    assert space.next_trial(spec, [*trials, fourth], STEPS) is None
    assert space.next_trial(spec, [*trials, ended(fourth)], STEPS) is not None


def test_failed_trials_are_replaced_before_poor_ones(spec: SweepSpec) -> None:
    trials = run(spec, [], 4)
    best = min(trials, key=lambda trial: trial.value or 0)
    lost = next(trial for trial in trials if trial != best)
    trials[lost.number] = replace(lost, state="failed", value=None)
    following = run(spec, trials, 4)[4:]
    assert [trial.parent for trial in following] == [
        best.number if member == lost.number else member for member in range(4)
    ]
    nothing_left = [replace(trial, state="failed") for trial in trials]
    with pytest.raises(ValueError, match="no trial of the generation before"):
        space.next_trial(spec, nothing_left, STEPS)


def test_a_list_is_perturbed_to_a_neighbour_and_a_number_by_a_factor(sweep_document: dict[str, Any]) -> None:
    dropout = "denoiser.caption_dropout"
    choices = (0.0, 0.1, 0.2, 0.3)
    spec = SweepSpec.model_validate(
        sweep_document
        | {
            "space": {RATE: {"uniform": [1e-4, 1e-2]}, dropout: {"choice": choices}},
            "scheduler": {"kind": "pbt", "population": 2, "perturb_steps": 2, "resample_probability": 0},
            "search": "random",
            "budget": {},
        }
    )
    pbt = spec.scheduler
    assert isinstance(pbt, PBT)
    for seed in range(20):
        trials = run(spec.model_copy(update={"seed": seed}), [], 2)
        best, worst = sorted(trials, key=lambda trial: trial.value or 0)
        trials = run(spec.model_copy(update={"seed": seed}), trials, 2)
        replaced = trials[2 + worst.number]
        assert replaced.parent == best.number
        ratio = replaced.params[RATE] / best.params[RATE]
        at_bound = replaced.params[RATE] in (1e-4, 1e-2)
        assert at_bound or min(abs(ratio - factor) for factor in pbt.factors) < 1e-12
        old, new = (choices.index(trial.params[dropout]) for trial in (best, replaced))
        assert abs(old - new) == 1 or (old == new and old in (0, len(choices) - 1))


def test_the_best_is_of_the_last_generation_and_its_recipe_tells_its_history(spec: SweepSpec) -> None:
    trials = run(spec, [], 12)
    best = space.best_trial(spec, [replace(trials[0], value=0.0), *trials[1:]])
    assert best is not None
    assert best.number >= 8
    cut_off = [*trials[:8], *(replace(trial, state="running", value=None, steps=4) for trial in trials[8:])]
    best_so_far = space.best_trial(spec, cut_off)
    assert best_so_far is not None
    assert 4 <= best_so_far.number < 8
    assert space.recipe_of_trial(spec, trials[5]).denoiser.training.steps == 4  # type: ignore[union-attr]
    told = space.history_of(trials, best).splitlines()
    assert [line.split()[3] for line in told[1:]] == ["2:", "4:", "6:"]
    assert told[-1].endswith(f"{RATE} {best.params[RATE]}")
    assert space.history_of(trials, trials[0]) == ""


def test_generations_cover_the_steps(spec: SweepSpec) -> None:
    assert space.num_trials(spec) == 12
    pbt = PBT(population=3, perturb_steps=4)
    assert population.num_generations(pbt, 10) == 3
    assert population.steps_of(pbt, 8, 10) == (8, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"search": "optuna"}, "search: with scheduler: pbt, the first generation is drawn at random"),
        ({"budget": {"trials": 3}}, "budget.trials: with scheduler: pbt"),
        ({"space": {RATE: {"grid": [1e-3]}}}, "with scheduler: pbt, a key is a loguniform"),
        ({"scheduler": {"kind": "pbt", "population": 4, "perturb": 2}}, "unknown key .*perturb'.*'perturb_steps'"),
        ({"scheduler": {"population": 4, "perturb_steps": 2}}, "missing key 'scheduler.kind'"),
        ({"scheduler": {"kind": "pbt", "population": 1, "perturb_steps": 2}}, "scheduler.pbt.population"),
        ({"space": {"denoiser.training.weight_decay": {"uniform": [0, 1]}}}, "does not go on with another denoiser.tr"),
        ({"fixed": {"denoiser.training.learning_rate_schedule": "cosine"}}, "schedule to constant"),
        ({"scheduler": {"kind": "pbt", "population": 4, "perturb_steps": 6}}, "leave one generation of 6 steps"),
        ({"objective": {"metric": "vae/validation_loss"}}, "it perturbs the last stage, denoiser"),
    ],
)
def test_what_cannot_be_a_population_is_said_before_it_starts(
    spec: SweepSpec, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(spec.model_dump(mode="json") | change))
    with pytest.raises(UserError, match=message):
        space.check(load_spec(str(path)))
