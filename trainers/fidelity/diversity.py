"""How alike are the images drawn from one prompt? By structural similarity, on pixels."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MIN_SIDES = (11, 22, 44, 99, 176)
"""Shorter side that 1, 2, ... scales need: the 11-pixel window must fit, and torchmetrics asks a little more."""
PAIRS_AT_A_TIME = 32


def num_scales(side: int) -> int:
    """How many of the five scales an image of this shorter side has room for. Raises ValueError below 11 pixels."""
    fitting = sum(side >= least for least in MIN_SIDES)
    if fitting == 0:
        raise ValueError(f"MS-SSIM needs images of at least {MIN_SIDES[0]} pixels, got {side}")
    return fitting


def ms_ssim(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Multi-scale structural similarity of each pair of images: uint8 [N, H, W, C] twice -> [N], at most 1.

    Wang, Simoncelli & Bovik 2003 ("Multiscale structural similarity for image quality assessment", Eq. 7). Images with
    no room for five scales have fewer; their exponents are scaled to the same sum.
    """
    weights = SCALE_WEIGHTS[: num_scales(min(a.shape[1:3]))]
    betas = tuple(sum(SCALE_WEIGHTS) * weight / sum(weights) for weight in weights)
    similarities = [
        multiscale_structural_similarity_index_measure(
            _images(a[start : start + PAIRS_AT_A_TIME]),
            _images(b[start : start + PAIRS_AT_A_TIME]),
            data_range=1.0,
            betas=betas,
            reduction="none",
            normalize="relu",
        )
        for start in range(0, len(a), PAIRS_AT_A_TIME)
    ]
    return np.asarray(torch.cat([s.reshape(-1) for s in similarities]).double().numpy())


def similarity_within_prompts(
    pixels: NDArray[np.uint8], prompts: Sequence[str], *, seed: int, max_pairs: int = 20
) -> dict[str, float]:
    """Mean MS-SSIM over the pairs of images of each prompt that has several; at most `max_pairs` of each, at random.

    `pixels` are uint8 [N, H, W, 3], row i drawn from prompts[i]. Near 1: the model draws one picture for that prompt.
    """
    rng = np.random.default_rng(seed)
    firsts: list[int] = []
    seconds: list[int] = []
    pair_prompts: list[str] = []
    for prompt in dict.fromkeys(prompts):
        rows = [row for row, other in enumerate(prompts) if other == prompt]
        pairs = np.array(list(combinations(rows, 2)), dtype=np.int64).reshape(-1, 2)
        for first, second in pairs[rng.permutation(len(pairs))[:max_pairs]]:
            firsts.append(int(first))
            seconds.append(int(second))
            pair_prompts.append(prompt)
    if not firsts:
        return {}
    similarities = ms_ssim(pixels[firsts], pixels[seconds])
    by_prompt: dict[str, list[float]] = {}
    for prompt, similarity in zip(pair_prompts, similarities, strict=True):
        by_prompt.setdefault(prompt, []).append(float(similarity))
    return {prompt: float(np.mean(values)) for prompt, values in by_prompt.items()}


def _images(pixels: NDArray[Any]) -> torch.Tensor:
    """uint8 [N, H, W, C] -> float32 [N, C, H, W] in [0, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
