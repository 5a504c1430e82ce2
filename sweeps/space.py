"""Decisions of a sweep, as functions of its specification and its trials so far: what to try next, whether it can be
tried, which trial is best. Nothing is kept between calls, so a sweep that was killed goes on as if it had not been.
"""

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import optuna
import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from cluster.errors import UserError
from data_shards import derive_seed
from sweeps import population
from sweeps.objective import check_objective, objective_stage, objective_steps
from sweeps.spec import PBT, Axis, SweepSpec, Trial
from trainers.families import family_of
from trainers.recipe import Recipe, load_recipe, read_document

STARTUP_TRIALS = 5  # drawn at random before the estimator has something to go by
MAX_CORNERS = 64  # tried on the recipe before a sweep starts
MAX_COMBINATIONS = 4096  # of which they are chosen; of more, they are drawn
LAST_STAGE_BLOCKS = ("sampling", "fidelity")  # of a recipe, that only its last stage reads

optuna.logging.set_verbosity(optuna.logging.WARNING)


def recipe_of(spec: SweepSpec, params: Mapping[str, Any]) -> Recipe:
    """The recipe with what is fixed and with a trial's values. Raises UserError as `load_recipe` does."""
    values = {**spec.fixed, **params}
    return load_recipe(spec.recipe, [f"{key}={yaml.safe_dump(value)}" for key, value in values.items()])


def full_steps(spec: SweepSpec) -> dict[str, int]:
    """The steps of each stage as the recipe's own file has them, whatever is fixed for the trials; by stage."""
    document = read_document(spec.recipe, "recipe", "'family' and 'data'")
    return {
        stage: block["training"]["steps"]
        for stage, block in document.items()
        if isinstance(block, dict) and isinstance(block.get("training"), dict) and "steps" in block["training"]
    }


def shortfall(recipe: Recipe, full: Mapping[str, int]) -> str:
    """Which stages of a trial's recipe are trained for fewer steps than in full, in words; empty if none is."""
    family = family_of(recipe)
    trained = {stage: family.training_of(recipe, stage).steps for stage in family.STAGES}
    short = [stage for stage in trained if trained[stage] < full.get(stage, 0)]
    return ", ".join(f"{stage} {trained[stage]:,} of {full[stage]:,} steps" for stage in short)


def grid_points(spec: SweepSpec) -> list[dict[str, Any]]:
    """Every combination of the grids' values, the last key changing fastest; one empty point if there is no grid."""
    values = {key: axis.grid for key, axis in spec.space.items() if axis.grid}
    return _combinations(spec, values, product(*values.values()))


def corners(spec: SweepSpec) -> list[dict[str, Any]]:
    """Combinations of the extreme values of all keys: all there are, or MAX_CORNERS of them."""
    values = {key: axis.extremes for key, axis in spec.space.items()}
    draw = random.Random(spec.seed)
    if math.prod(len(those) for those in values.values()) <= MAX_COMBINATIONS:
        found = _combinations(spec, values, product(*values.values()))
        return found if len(found) <= MAX_CORNERS else draw.sample(found, MAX_CORNERS)
    drawn = [tuple(draw.choice(those) for those in values.values()) for _ in range(MAX_CORNERS)]
    return _combinations(spec, values, drawn)


def num_trials(spec: SweepSpec) -> int | None:
    """How many trials there will be at most; None if only time bounds them."""
    if isinstance(spec.scheduler, PBT):
        steps = objective_steps(spec, recipe_of(spec, {}))
        return spec.scheduler.population * population.num_generations(spec.scheduler, steps)
    if spec.search != "grid":
        return spec.budget.trials
    points = len(grid_points(spec))
    return min(points, spec.budget.trials or points)


def next_trial(spec: SweepSpec, trials: Sequence[Trial], steps: int) -> Trial | None:
    """The trial that is to begin, given those before it, of which some still run; None if it has to wait for these.

    `steps` are those of a recipe of the sweep. Raises ValueError if there is nothing that it could go on from.
    """
    number, pbt = len(trials), spec.scheduler
    if not isinstance(pbt, PBT):
        return Trial(number, "running", next_params(spec, trials), None, 0, 0.0, None)
    begin, end = population.steps_of(pbt, number, steps)
    params, parent = next_params(spec, trials), None
    if before := population.last_generation(pbt, trials):
        if any(trial.state == "running" for trial in before):
            return None
        params, parent = population.next_member(spec, pbt, trials)
    return Trial(number, "running", params, None, begin, 0.0, None, parent=parent, begin=begin, end=end)


def recipe_of_trial(spec: SweepSpec, trial: Trial) -> Recipe:
    """Its recipe, which ends at the step where the trial ends. Raises UserError as `load_recipe` does."""
    recipe = recipe_of(spec, trial.params)
    if trial.end is None:
        return recipe
    until = {f"{objective_stage(spec, recipe)}.training.steps": trial.end}
    return recipe_of(spec, trial.params | until)


def next_params(spec: SweepSpec, trials: Sequence[Trial]) -> dict[str, Any]:
    """What trial number len(trials) is to try, given those before it, of which some still run."""
    number = len(trials)
    points = grid_points(spec)
    point = points[number % len(points)]
    if spec.search == "grid":
        return point
    seed = derive_seed(spec.seed, "trial", number) % 2**32
    study = optuna.create_study(
        sampler=optuna.samplers.RandomSampler(seed)
        if spec.search == "random"
        else optuna.samplers.TPESampler(n_startup_trials=STARTUP_TRIALS, constant_liar=True, seed=seed),
        direction="minimize" if spec.objective.mode == "min" else "maximize",
    )
    study.add_trials([_as_optuna(spec, trial) for trial in trials])
    asked = study.ask()
    params: dict[str, Any] = {}
    for key, axis in spec.space.items():
        if not _counts(axis, params):
            continue
        if key in point:
            params[key] = point[key]
        elif axis.choice:
            params[key] = axis.choice[asked.suggest_categorical(key, range(len(axis.choice)))]
        else:
            low, high = axis.extremes
            params[key] = asked.suggest_float(key, low, high, log=axis.loguniform is not None)
    return params


def best_trial(spec: SweepSpec, trials: Sequence[Trial]) -> Trial | None:
    """Of the trials that were trained to the recipe's end, the one whose objective ended best."""
    ended = [trial for trial in trials if trial.state == "finished" and trial.value is not None]
    if isinstance(spec.scheduler, PBT):  # of which earlier generations were not
        ended = [trial for trial in ended if trial.steps == max(other.steps for other in ended)]
    sign = 1 if spec.objective.mode == "min" else -1
    return min(ended, key=lambda trial: sign * (trial.value or 0), default=None)


def check(spec: SweepSpec) -> list[Recipe]:
    """The recipes at the corners of the space. Raises UserError for what would end the sweep after it began."""
    try:
        recipes = [recipe_of(spec, params) for params in corners(spec)]
        recipe_of(spec, next_params(spec.model_copy(update={"search": "random"}), []))
    except UserError as error:
        raise UserError(f"sweep {spec.name}: {error}") from None
    for recipe in recipes:
        check_objective(spec, recipe)
        if recipe.cluster.is_elastic:
            raise UserError(
                f"sweep {spec.name}: cluster.num_workers {list(recipe.cluster.worker_range)}: trials share the "
                "cluster, so give one number, as by --set fixed.cluster.num_workers=1"
            )
    if spec.budget.gpu_hours is not None and not gpus_of(recipes[0]):
        raise UserError(f"sweep {spec.name}: budget.gpu_hours: the recipe uses no GPU; give trials or wall_hours")
    return recipes


def with_sampling(recipe: Recipe, setting: Mapping[str, Any]) -> Recipe:
    """The recipe of a model that is drawn with a guidance sweep's setting unless the user says otherwise."""
    known = {"scheduler" if name == "sampler" else name: value for name, value in setting.items()}
    fitting = {name: value for name, value in known.items() if name in type(recipe.sampling).model_fields}
    return recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update=fitting)})


def history_of(trials: Sequence[Trial], trial: Trial) -> str:
    """A comment for the recipe of a trial that went on from others: which values were in force up to which step."""
    line: list[Trial] = [trial]
    while line[0].parent is not None:
        line.insert(0, trials[line[0].parent])
    if len(line) == 1:
        return ""
    told = [
        f"#   to step {one.end}: {', '.join(f'{key} {value}' for key, value in one.params.items())}" for one in line
    ]
    return "\n".join(["# Of a population; the model was trained with other values before these:", *told, ""])


def shared_stages(spec: SweepSpec, recipe: Recipe) -> tuple[str, ...]:
    """Stages that come out the same in all trials, as no key of the space changes them: trained once, for all."""
    *earlier, last = family_of(recipe).STAGES
    if objective_stage(spec, recipe) != last:
        return ()
    blocks = {key.partition(".")[0] for key in spec.space}
    return tuple(earlier) if blocks <= {last, *LAST_STAGE_BLOCKS} else ()


def concurrency(
    spec: SweepSpec, recipes: Sequence[Recipe], nodes: Sequence[Mapping[str, float]], *, grows: bool = False
) -> int:
    """How many trials fit the cluster at once, each with all of its processes, up to the specification's limit.

    `nodes` are the resources of each machine, by Ray's names. A process is never cut over machines. What drives a
    trial only waits, and takes no processor. Raises UserError if not even one trial fits, unless the cluster `grows`:
    then it is as large as the specification's limit asks for.
    """
    fits = min(_fitting(recipe, nodes) for recipe in recipes)
    if grows:
        return spec.concurrency or max(fits, 1)
    if not fits:
        there = {name: int(sum(node.get(name, 0) for node in nodes)) for name in ("CPU", "GPU")}
        largest = max(recipes, key=lambda recipe: recipe.cluster.max_workers * recipe.cluster.cpus_per_worker).cluster
        each = f"{largest.cpus_per_worker} CPUs" + (" and a GPU" if largest.use_gpu else "")
        beside = " and one that measures fidelity" if recipes[0].fidelity else ""
        raise UserError(
            f"sweep {spec.name}: a trial has {largest.max_workers} workers of {each}{beside}, and the Ray cluster's "
            f"{len(nodes)} machines with {there['CPU']} CPUs and {there['GPU']} GPUs never hold them at once: "
            "set cluster.num_workers lower, or connect to a larger cluster with RAY_ADDRESS"
        )
    return min(fits, spec.concurrency or fits)


def gpus_of(recipe: Recipe) -> int:
    """GPUs that a trial takes."""
    workers = recipe.cluster.max_workers if recipe.cluster.use_gpu else 0
    return workers + int(recipe.fidelity is not None and recipe.fidelity.use_gpu)


def _fitting(recipe: Recipe, nodes: Sequence[Mapping[str, float]]) -> int:
    cluster, fidelity = recipe.cluster, recipe.fidelity
    cpus = (cluster.max_workers + (fidelity is not None)) * cluster.cpus_per_worker
    rooms = 0  # for processes that train
    for node in nodes:
        room = node.get("CPU", 0) // cluster.cpus_per_worker
        rooms += int(min(room, node.get("GPU", 0)) if cluster.use_gpu else room)
    slots = sum(int(node.get("CPU", 0) // cluster.cpus_per_worker) for node in nodes) * cluster.cpus_per_worker
    fits = [rooms // cluster.max_workers, slots // cpus]
    if gpus := gpus_of(recipe):
        fits.append(int(sum(node.get("GPU", 0) for node in nodes)) // gpus)
    return min(fits)


def _combinations(
    spec: SweepSpec, values: Mapping[str, Sequence[Any]], combinations: Iterable[tuple[Any, ...]]
) -> list[dict[str, Any]]:
    """Combinations of the keys' values without the keys that do not count, and each only once."""
    found: dict[str, dict[str, Any]] = {}
    for combination in combinations:
        point: dict[str, Any] = {}
        for key, value in zip(values, combination, strict=True):
            # A condition on a key that is not combined here is decided elsewhere.
            if _counts(spec.space[key], point, among=values):
                point[key] = value
        found.setdefault(repr(point), point)
    return list(found.values())


def _counts(axis: Axis, params: Mapping[str, Any], among: Mapping[str, Any] | None = None) -> bool:
    return all(
        key in params and params[key] == value for key, value in axis.when.items() if among is None or key in among
    )


def _as_optuna(spec: SweepSpec, trial: Trial) -> FrozenTrial:
    """A stopped trial is as good as its last value at its last step, a failed one worse than all others."""
    params, distributions = dict(_optuna_params(spec, trial)), dict(_distributions(spec, trial))
    if trial.state == "running":
        return create_trial(state=TrialState.RUNNING, params=params, distributions=distributions)
    if trial.state == "finished" and trial.value is not None:
        return create_trial(value=trial.value, params=params, distributions=distributions)
    return create_trial(
        state=TrialState.PRUNED,
        params=params,
        distributions=distributions,
        intermediate_values=trial.intermediate if trial.state == "stopped" else {},
    )


def _optuna_params(spec: SweepSpec, trial: Trial) -> Iterator[tuple[str, Any]]:
    """Values of a listed choice go by their place: Optuna takes only numbers and words."""
    for key, value in trial.params.items():
        axis = spec.space[key]
        if not axis.grid:
            yield key, axis.choice.index(value) if axis.choice else value


def _distributions(spec: SweepSpec, trial: Trial) -> Iterator[tuple[str, BaseDistribution]]:
    for key in trial.params:
        axis = spec.space[key]
        if axis.choice:
            yield key, CategoricalDistribution(range(len(axis.choice)))
        elif not axis.grid:
            low, high = axis.extremes
            yield key, FloatDistribution(low, high, log=axis.loguniform is not None)
