"""The sweep's specification, a YAML file, and what becomes of it: trials."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from cluster.errors import UserError, did_you_mean
from sweeps.guidance_spec import GuidanceGrid
from trainers.recipe import Block, apply_override, explain, parse_override, read_document

Mode = Literal["min", "max"]
State = Literal["running", "finished", "stopped", "failed"]
"""stopped: ended early because others were better; failed: diverged, or not to be trained at all."""


@dataclass(frozen=True)
class Trial:
    """One recipe of a sweep and how it fared."""

    number: int
    state: State
    params: dict[str, Any]  # dotted recipe key -> value
    value: float | None  # the objective's last value; None if there is none
    steps: int  # of optimization, in the objective's stage
    seconds: float
    run_id: str | None  # of MLflow
    intermediate: dict[int, float] = field(default_factory=dict)  # step -> value of the objective
    parent: int | None = None  # the trial whose checkpoint it goes on from
    begin: int = 0  # the step that it goes on at
    end: int | None = None  # the step that it is to reach; None: the recipe's last


class Axis(Block):
    """Values that one key of the recipe may take: give exactly one of the four kinds."""

    loguniform: tuple[float, float] | None = None
    """Any number between two, each order of magnitude being equally likely."""
    uniform: tuple[float, float] | None = None
    """Any number between two."""
    choice: tuple[Any, ...] | None = None
    """One of these."""
    grid: tuple[Any, ...] | None = None
    """Each of these in turn, together with each of the other grids."""
    when: dict[str, Any] = Field(default_factory=dict)
    """Counts only where other keys of the space have these values; else the recipe's own value stays."""

    @model_validator(mode="after")
    def _one_kind_with_values(self) -> Self:
        kinds = [kind for kind in ("loguniform", "uniform", "choice", "grid") if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise ValueError(f"give one of loguniform, uniform, choice and grid, not {' and '.join(kinds) or 'none'}")
        if bounds := self.loguniform or self.uniform:
            low, high = bounds
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"{kinds[0]} is empty: {low:g} is not below {high:g}")
            if self.loguniform and low <= 0:
                raise ValueError(f"loguniform begins above 0, not at {low:g}")
        elif not self.values:
            raise ValueError(f"{kinds[0]} is empty: give values")
        elif any(value in self.values[:place] for place, value in enumerate(self.values)):
            raise ValueError(f"{kinds[0]} has a value twice")
        return self

    @property
    def values(self) -> tuple[Any, ...]:
        """Those that are listed; none of a range."""
        return self.choice or self.grid or ()

    @property
    def extremes(self) -> tuple[Any, ...]:
        """The values at which a recipe may turn out to be wrong."""
        return self.values or self.loguniform or self.uniform or ()


class Objective(Block):
    metric: str
    """As training logs it: denoiser/validation_loss, fidelity/kid_random_vgg_64, ..."""
    mode: Mode = "min"


class ASHA(Block):
    """Asynchronous successive halving (Li et al. 2020, arXiv 1810.05934): of the trials that reach a rung, all but the
    best 1/reduction are stopped."""

    kind: Literal["asha"] = "asha"
    grace_steps: int = Field(gt=0)
    """The first rung; the others follow at this times the powers of `reduction`."""
    reduction: float = Field(default=3, gt=1)


class PBT(Block):
    """Population-based training (Jaderberg et al. 2017, arXiv 1711.09846), one generation after the other: the worst go
    on from the checkpoints of the best, with values perturbed; the others go on as they are."""

    kind: Literal["pbt"] = "pbt"
    population: int = Field(gt=1)
    """Trials of a generation."""
    perturb_steps: int = Field(gt=0)
    """Steps of a generation, of the objective's stage."""
    quantile: float = Field(default=0.25, gt=0, le=0.5)
    """The share of the worst that is replaced, and of the best that replace them; at least one trial each."""
    factors: tuple[float, float] = (0.8, 1.25)
    """By one of which a number is multiplied; of a list, a neighbour is taken."""
    resample_probability: float = Field(default=0.25, ge=0, le=1)
    """How likely a value is drawn anew from the space, in place of that."""

    @property
    def num_replaced(self) -> int:
        return max(1, int(self.population * self.quantile))


class Budget(Block):
    """What the sweep may take; the first that is used up ends it."""

    trials: int | None = Field(default=None, gt=0)
    """Needed where nothing else bounds them: a grid has its own number."""
    gpu_hours: float | None = Field(default=None, gt=0)
    wall_hours: float | None = Field(default=None, gt=0)


class SweepSpec(Block):
    """Which recipes are tried, and which of them is best."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    recipe: str
    """File or s3:// URI."""
    fixed: dict[str, Any] = Field(default_factory=dict)
    """Keys of the recipe that are other than in its file, in all trials."""
    space: dict[str, Axis] = Field(min_length=1)
    """Dotted keys of the recipe and the values they may take."""
    objective: Objective
    guidance: GuidanceGrid | None = None
    """Settings that each trained trial is drawn with; it is judged by what the one recommended for it achieves."""
    scheduler: Annotated[ASHA | PBT, Field(discriminator="kind")] | None = None
    """none trains each trial to its end."""
    search: Literal["optuna", "random", "grid"] = "optuna"
    """optuna: its tree-structured Parzen estimator, which learns from the trials that ended."""
    seed: int = Field(default=0, ge=0)
    concurrency: int | None = Field(default=None, gt=0)
    """Trials at a time, if fewer than the cluster holds."""
    max_failures: int = Field(default=3, ge=0)
    """Restarts of a trial whose process was killed, each from its latest checkpoint."""
    budget: Budget = Budget()

    @field_validator("scheduler", mode="before")
    @classmethod
    def _none_is_a_word(cls, value: object) -> object:
        return None if value == "none" else value

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if twice := sorted(self.space.keys() & self.fixed.keys()):
            raise ValueError(f"{', '.join(twice)}: both fixed and in the space")
        seen: list[str] = []
        for key, axis in self.space.items():
            for other, value in axis.when.items():
                if other not in seen:
                    hint = did_you_mean(other, seen)
                    raise ValueError(
                        f"space.{key}.when: '{other}' is not a key of the space above it; "
                        f"{hint}there are {', '.join(seen) or 'none'}"
                    )
                if value not in self.space[other].values:
                    raise ValueError(f"space.{key}.when: {value!r} is none of the values listed for '{other}'")
            if self.search == "grid" and not axis.grid:
                raise ValueError(f"space.{key}: with search: grid, each key is a grid")
            seen.append(key)
        if isinstance(self.scheduler, PBT):
            self._check_population()
        elif self.search != "grid" and not any(self.budget.model_dump().values()):
            raise ValueError("budget: give trials, gpu_hours or wall_hours")
        if self.guidance and self.scheduler:
            raise ValueError("guidance: it is known only at a trial's end, so give no scheduler beside it")
        return self

    def _check_population(self) -> None:
        if self.search != "random":
            raise ValueError("search: with scheduler: pbt, the first generation is drawn at random: write random")
        if self.budget.trials:
            raise ValueError("budget.trials: with scheduler: pbt, steps and perturb_steps say how many there are")
        for key, axis in self.space.items():
            if axis.grid or axis.when:
                raise ValueError(f"space.{key}: with scheduler: pbt, a key is a loguniform, uniform or choice")


def load_spec(uri: str, overrides: Sequence[str] = ()) -> SweepSpec:
    """Read a specification from a file or s3:// URI and apply `key=value` overrides; `fixed.` takes a recipe's key.

    Raises UserError that names the key at fault and the nearest.
    """
    document = read_document(uri, "sweep", "'recipe' and 'space'")
    for override in overrides:
        block, _, rest = override.partition(".")
        if block == "fixed":  # whose keys are dotted themselves
            key, value = parse_override(rest)
            document["fixed"] = (document.get("fixed") or {}) | {key: value}
        else:
            apply_override(document, override)
    try:
        return SweepSpec.model_validate(document)
    except ValidationError as error:
        raise UserError(f"{uri}: " + "; ".join(explain(error, SweepSpec))) from None


def dump_spec(spec: SweepSpec) -> str:
    """YAML that `load_spec` reads back to an equal specification."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
