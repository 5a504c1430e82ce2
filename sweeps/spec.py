"""The sweep's specification, a YAML file, and what becomes of it: trials."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from cluster import storage
from cluster.errors import UserError, nearest
from trainers.recipe import Block, explain

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
    mode: Literal["min", "max"] = "min"


class ASHA(Block):
    """Asynchronous successive halving (Li et al. 2020, arXiv 1810.05934): of the trials that reach a rung, all but the
    best 1/reduction are stopped."""

    kind: Literal["asha"] = "asha"
    grace_steps: int = Field(gt=0)
    """The first rung; the others follow at this times the powers of `reduction`."""
    reduction: float = Field(default=3, gt=1)


class Budget(Block):
    """What the sweep may take; the first that is used up ends it."""

    trials: int | None = Field(default=None, gt=0)
    """Needed where nothing else bounds them: a grid has its own number."""
    gpu_hours: float | None = Field(default=None, gt=0)
    wall_hours: float | None = Field(default=None, gt=0)


class SweepSpec(Block):
    """Which recipes are tried, and which of them is best."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    recipe: str
    """File or s3:// URI."""
    fixed: dict[str, Any] = Field(default_factory=dict)
    """Keys of the recipe that are other than in its file, in all trials."""
    space: dict[str, Axis] = Field(min_length=1)
    """Dotted keys of the recipe and the values they may take."""
    objective: Objective
    scheduler: ASHA | None = None
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
                    guess = nearest(other, seen)
                    hint = f"did you mean '{guess}'? " if guess else ""
                    raise ValueError(
                        f"space.{key}.when: '{other}' is not a key of the space above it; "
                        f"{hint}there are {', '.join(seen) or 'none'}"
                    )
                if value not in self.space[other].values:
                    raise ValueError(f"space.{key}.when: {value!r} is none of the values listed for '{other}'")
            if self.search == "grid" and not axis.grid:
                raise ValueError(f"space.{key}: with search: grid, each key is a grid")
            seen.append(key)
        if self.search != "grid" and not any(self.budget.model_dump().values()):
            raise ValueError("budget: give trials, gpu_hours or wall_hours")
        return self


def load_spec(uri: str) -> SweepSpec:
    """Read a specification from a file or s3:// URI. Raises UserError that names the key at fault and the nearest."""
    try:
        document = yaml.safe_load(storage.read_bytes(uri))
    except yaml.YAMLError as error:
        raise UserError(f"{uri} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise UserError(f"{uri} holds no sweep: expected keys such as 'recipe' and 'space' at its top level")
    try:
        return SweepSpec.model_validate(document)
    except ValidationError as error:
        raise UserError(f"{uri}: " + "; ".join(explain(error, SweepSpec))) from None


def dump_spec(spec: SweepSpec) -> str:
    """YAML that `load_spec` reads back to an equal specification."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
