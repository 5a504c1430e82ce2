"""Random draws that belong to a sample, not to a rank.

Each draw is seeded by the sample's own seed and the name of what is drawn, so a sample gets the same noise,
timestep and dropout whichever rank holds it, at any world size, and again after a resume.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from data_shards import derive_seed


def normal(seeds: Sequence[int], purpose: str, shape: Sequence[int]) -> Tensor:
    """Standard normal float32 [B, *shape], one independent draw for each seed."""
    return torch.stack([torch.randn(tuple(shape), generator=_generator(seed, purpose)) for seed in seeds])


def integers(seeds: Sequence[int], purpose: str, high: int) -> Tensor:
    """Uniform int64 [B] in [0, high)."""
    return torch.cat([torch.randint(high, (1,), generator=_generator(seed, purpose)) for seed in seeds])


def uniform(seeds: Sequence[int], purpose: str) -> Tensor:
    """Uniform float32 [B] in [0, 1)."""
    return torch.cat([torch.rand(1, generator=_generator(seed, purpose)) for seed in seeds])


def _generator(seed: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, purpose))
