"""A stage: everything the loop needs to know of the model it trains."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from data_shards import Batch


@dataclass(frozen=True)
class Stage:
    """One model to be trained, with the four functions that make it this model and no other."""

    model: nn.Module

    prepare: Callable[[Batch, bool], Mapping[str, Tensor | None]]
    """(batch, is_training) -> the objective's keyword arguments: frozen encoders and each sample's random draws."""

    objective: Callable[..., Tensor]
    """(model, **prepared) -> losses [B]."""

    preview: Callable[[nn.Module, Sequence[int]], Tensor]
    """(averaged model, which pictures) -> pixels uint8 [N, H, W, 3] of those pictures."""

    num_previews: int
    """Pictures of a whole preview; ranks share the drawing."""

    flops_per_image: float
    """Of a forward and a backward pass of the trained model alone; what is computed again to save memory is no more."""
