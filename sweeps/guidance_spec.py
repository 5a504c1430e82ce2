"""A guidance sweep as a YAML file."""

from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import Field, ValidationError

from cluster import storage
from cluster.errors import UserError
from trainers.recipe import Block, apply_override, explain


class GuidanceSpec(Block):
    """Which settings of one trained model are compared, and on what. The keys are those of `sweep_guidance`."""

    model: str
    """As for `medsynth evaluate`."""
    data: str
    """Shards of real images: a folder or s3:// prefix."""
    splits: tuple[str, ...] | None = None
    """Whose captions and images to compare with; None: all but train."""
    guidance_scales: tuple[float, ...] = ()
    """Here and below: none leaves it as the model has it."""
    true_cfg_scales: tuple[float, ...] = ()
    """FLUX."""
    num_inference_steps: tuple[int, ...] = ()
    samplers: tuple[str, ...] = ()
    num_samples: int = Field(default=256, gt=0)
    """Images that each setting draws."""
    images_per_prompt: int = Field(default=2, gt=0)
    seed: int = Field(default=0, ge=0)
    extractors: tuple[str, ...] = ("random-vgg",)
    fidelity: str = "kid"
    """Taken on the first extractor's features."""
    batch_size: int = Field(default=8, gt=0)

    @property
    def arguments(self) -> dict[str, Any]:
        """Of `sweep_guidance`, but for the model and the data."""
        return self.model_dump(exclude={"model", "data"})


def load_guidance_spec(uri: str, overrides: Sequence[str] = ()) -> GuidanceSpec:
    """Read a specification from a file or s3:// URI and apply `key=value` overrides.

    Raises UserError that names the key at fault and the nearest.
    """
    try:
        document = yaml.safe_load(storage.read_bytes(uri))
    except yaml.YAMLError as error:
        raise UserError(f"{uri} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise UserError(f"{uri} holds no guidance sweep: expected keys such as 'model' and 'guidance_scales'")
    for override in overrides:
        apply_override(document, override)
    try:
        return GuidanceSpec.model_validate(document)
    except ValidationError as error:
        raise UserError(f"{uri}: " + "; ".join(explain(error, GuidanceSpec))) from None
