"""What trials are judged by: whether it is ever measured, in which stage, and which way is better."""

from typing import get_args

from cluster.errors import UserError, did_you_mean, nearest
from sweeps import population
from sweeps.guidance_spec import GuidanceGrid
from sweeps.spec import PBT, Mode, SweepSpec
from trainers.families import family_of
from trainers.fidelity.evaluation import measure_name
from trainers.fidelity.extractor_uris import label_of
from trainers.recipe import MSDMRecipe, MSDMSampling, Recipe

FIDELITY, GUIDANCE = "fidelity/", "guidance/"
LESS = ("fid", "fid_infinity", "kid", "cmmd", "ms_ssim", "copy_rate")
MORE = ("inception_score", "precision", "recall", "f1", "density", "coverage", "clip_score", "caption_alignment")
MODES: dict[str, Mode] = {**dict.fromkeys(LESS, "min"), **dict.fromkeys(MORE, "max")}
"""Measures of an evaluation, and which way is better."""
UNLABELLED = ("ms_ssim",)  # which looks at pixels, not features


def objective_stage(spec: SweepSpec, recipe: Recipe) -> str:
    """The stage whose steps count: the one that the metric is of; fidelity and guidance are of the last."""
    stage = spec.objective.metric.partition("/")[0]
    stages = family_of(recipe).STAGES
    return stage if stage in stages else stages[-1]


def objective_steps(spec: SweepSpec, recipe: Recipe) -> int:
    """Steps that a trial trains that stage for."""
    return family_of(recipe).training_of(recipe, objective_stage(spec, recipe)).steps


def guidance_metric(grid: GuidanceGrid) -> str:
    """What a trial with a block `guidance` is judged by, as MLflow has it."""
    return GUIDANCE + measure_name(grid.fidelity, label_of(grid.extractors[0]))


def check_objective(spec: SweepSpec, recipe: Recipe) -> None:
    """Raise UserError for an objective that is never measured, or a scheduler or budget that does not fit it."""
    metric = spec.objective.metric
    family = family_of(recipe)
    every = objective_steps(spec, recipe)
    if spec.guidance:
        fitting = guidance_metric(spec.guidance)
        if metric != fitting:
            raise UserError(f"sweep {spec.name}: objective.metric: with a block 'guidance', write {fitting}")
        _check_mode(spec, MODES[spec.guidance.fidelity])
        _check_guidance(spec, spec.guidance, recipe)
    elif metric.startswith(FIDELITY):
        if recipe.fidelity is None:
            raise UserError(
                f"sweep {spec.name}: objective.metric: {metric} is never logged, as the recipe measures no fidelity: "
                "give it a block 'fidelity', under 'fixed' or in its file"
            )
        label = label_of(recipe.fidelity.extractor)
        names = {name if name in UNLABELLED else measure_name(name, label): mode for name, mode in MODES.items()}
        name = metric.removeprefix(FIDELITY)
        if name not in names:
            guess = nearest(name, names)
            hint = f"did you mean '{FIDELITY}{guess}'? " if guess else ""
            raise UserError(
                f"sweep {spec.name}: objective.metric: '{metric}' is never logged; {hint}"
                f"there are, each after {FIDELITY}, {', '.join(names)}"
            )
        _check_mode(spec, names[name])
        every = recipe.fidelity.every_steps
    else:
        logged = [f"{stage}/{name}" for stage in family.STAGES for name in ("validation_loss", "loss")]
        if metric not in logged:
            hint = did_you_mean(metric, logged)
            raise UserError(
                f"sweep {spec.name}: objective.metric: '{metric}' is never logged; {hint}"
                f"there are {', '.join(logged)} and, with a block 'fidelity', {FIDELITY}NAME"
            )
        _check_mode(spec, "min")
        training = family.training_of(recipe, metric.partition("/")[0])
        every = training.validate_every_steps if metric.endswith("validation_loss") else training.log_every_steps
    stage = objective_stage(spec, recipe)
    steps = objective_steps(spec, recipe)
    if isinstance(spec.scheduler, PBT):
        _check_population(spec, spec.scheduler, recipe)
    elif spec.scheduler and (every >= steps or spec.scheduler.grace_steps >= steps):
        raise UserError(
            f"sweep {spec.name}: scheduler: asha would stop no trial, as {metric} is known every {every} steps and "
            f"judged from step {spec.scheduler.grace_steps}, of {steps}: lower scheduler.grace_steps, or how often "
            f"{stage}.training validates (validate_every_steps) or the fidelity is measured"
        )


def _check_mode(spec: SweepSpec, better: Mode) -> None:
    if spec.objective.mode != better:
        raise UserError(
            f"sweep {spec.name}: objective.mode: {'less' if better == 'min' else 'more'} is better of "
            f"{spec.objective.metric}, so write {better}"
        )


def _check_guidance(spec: SweepSpec, grid: GuidanceGrid, recipe: Recipe) -> None:
    is_msdm = isinstance(recipe, MSDMRecipe)
    samplers = get_args(MSDMSampling.model_fields["scheduler"].annotation) if is_msdm else ("euler",)
    for sampler in grid.samplers:
        if sampler not in samplers:
            raise UserError(
                f"sweep {spec.name}: guidance.samplers: this model has no '{sampler}', only {', '.join(samplers)}"
            )
    if grid.true_cfg_scales and is_msdm:
        raise UserError(f"sweep {spec.name}: guidance.true_cfg_scales: only FLUX is drawn with true guidance")


def _check_population(spec: SweepSpec, pbt: PBT, recipe: Recipe) -> None:
    stage, last = objective_stage(spec, recipe), family_of(recipe).STAGES[-1]
    schedule = family_of(recipe).training_of(recipe, stage).learning_rate_schedule
    problem = None
    if stage != last:
        problem = f"it perturbs the last stage, {last}, and the objective is of {stage}"
    elif misfits := population.misfits(spec.space, stage):
        allowed = ", ".join(f"{stage}.{name}" for name in population.CHANGEABLE)
        problem = f"a checkpoint does not go on with another {', '.join(misfits)}; it does with {allowed}"
    elif schedule != "constant":
        problem = f"it changes the learning rate itself: set {stage}.training.learning_rate_schedule to constant"
    elif pbt.perturb_steps >= objective_steps(spec, recipe):
        problem = f"perturb_steps {pbt.perturb_steps} leave one generation of {objective_steps(spec, recipe)} steps"
    if problem:
        raise UserError(f"sweep {spec.name}: scheduler: pbt: {problem}")
