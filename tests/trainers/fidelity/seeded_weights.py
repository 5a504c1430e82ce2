"""Weights and pixels that any library can be given, drawn from bits that NumPy promises never to change."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def seeded_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the same names and of the same shapes, such that activations keep their scale."""
    return {name: _seeded(name, state[name].shape, seed) for seed, name in enumerate(sorted(state))}


def _seeded(name: str, shape: torch.Size, seed: int) -> Tensor:
    if name.endswith(("num_batches_tracked", "position_ids")):
        return torch.zeros(shape, dtype=torch.int64)
    bits = np.random.Philox(key=seed).random_raw(shape.numel()) >> np.uint64(40)
    draws = torch.from_numpy(bits.astype(np.float32)).mul_(2.0**-23).sub_(1).reshape(shape)  # in [-1, 1), exactly
    if len(shape) > 1:
        return draws * math.sqrt(6 / math.prod(shape[1:]))
    return 1 + draws / 4 if name.endswith(("running_var", "weight")) else draws / 10


def pattern(side: int) -> Tensor:
    """Pixels uint8 [1, side, side, 3] with detail at all scales."""
    y, x = np.mgrid[:side, :side]
    channels = [(x * y // 7 + 31 * channel * x + 17 * y) % 256 for channel in range(3)]
    return torch.from_numpy(np.stack(channels, axis=-1).astype(np.uint8))[None]
