"""A guidance sweep as a YAML file."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from cluster.errors import UserError
from trainers.drawing_settings import (
    BATCH_SIZE,
    GUIDANCE_SCALE,
    NUM_IMAGES,
    NUM_INFERENCE_STEPS,
    SEED,
    TRUE_CFG_SCALE,
    Bounds,
)
from trainers.recipe import Block, apply_override, explain, read_document


def _within(bounds: Bounds) -> Any:
    return Field(strict=True, ge=bounds.low, le=bounds.high, allow_inf_nan=False if bounds.kind is float else None)


DEFAULT_GRID: dict[str, Any] = {"guidance_scales": [1, 1.5, 2, 3, 4.5, 7.5]}
"""Of a model that is named without a specification."""


class GuidanceGrid(Block):
    """Which settings of a trained model are compared. The keys are those of `sweep_guidance`."""

    splits: tuple[str, ...] | None = None
    """Whose captions and images to compare with; None: all but train."""
    guidance_scales: tuple[Annotated[float, _within(GUIDANCE_SCALE)], ...] = ()
    """Here and below: none leaves it as the model has it."""
    true_cfg_scales: tuple[Annotated[float, _within(TRUE_CFG_SCALE)], ...] = ()
    """FLUX."""
    num_inference_steps: tuple[Annotated[int, _within(NUM_INFERENCE_STEPS)], ...] = ()
    samplers: tuple[str, ...] = ()
    num_samples: int = Field(default=256, ge=16, le=NUM_IMAGES.high)
    """Images that each setting draws."""
    images_per_prompt: int = Field(default=2, gt=0, le=NUM_IMAGES.high)
    seed: int = Field(default=0, ge=SEED.low, le=SEED.high)
    extractors: tuple[str, ...] = Field(default=("random-vgg",), min_length=1)
    fidelity: Literal["fid", "kid", "cmmd", "precision", "recall", "f1", "density", "coverage"] = "kid"
    """Taken on the first extractor's features."""
    batch_size: int = Field(default=8, ge=BATCH_SIZE.low, le=BATCH_SIZE.high)

    @property
    def arguments(self) -> dict[str, Any]:
        """Of `sweep_guidance`, but for the model and the data."""
        return self.model_dump(exclude={"model", "data"})


class GuidanceSpec(GuidanceGrid):
    """Which settings of one model are compared, and on what."""

    model: str
    """As for `medsynth evaluate`."""
    data: str
    """Shards of real images: a folder or s3:// prefix."""


def load_guidance_spec(uri: str | None, overrides: Sequence[str] = ()) -> GuidanceSpec:
    """Read a specification from a file or s3:// URI, or begin with DEFAULT_GRID, and apply `key=value` overrides.

    Raises UserError that names the key at fault and the nearest.
    """
    document = read_document(uri, "guidance sweep", "'model' and 'guidance_scales'") if uri else {**DEFAULT_GRID}
    for override in overrides:
        apply_override(document, override)
    try:
        return GuidanceSpec.model_validate(document)
    except ValidationError as error:
        raise UserError(f"{uri or 'guidance sweep'}: " + "; ".join(explain(error, GuidanceSpec))) from None
