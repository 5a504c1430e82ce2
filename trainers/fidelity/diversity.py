"""How alike are the images drawn from one prompt? By structural similarity, on pixels."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MIN_SIDES = (11, 22, 44, 99, 176)
"""Shorter side that 1, 2, ... scales need: the 11-pixel window must fit, and torchmetrics asks a little more."""
MAX_PAIRS = 20  # of a prompt
PAIRS_AT_A_TIME = 32

ReadPixels = Callable[[Sequence[int]], NDArray[np.uint8]]
"""Numbers of images [n] -> their pixels, uint8 [n, H, W, 3]."""


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
    similarities = multiscale_structural_similarity_index_measure(
        _images(a), _images(b), data_range=1.0, betas=betas, reduction="none", normalize="relu"
    )
    return np.asarray(similarities.reshape(-1).double().numpy())


def similarity_within_prompts(
    read: ReadPixels, prompts: Sequence[str], *, seed: int, max_pairs: int = MAX_PAIRS
) -> dict[str, float]:
    """Mean MS-SSIM over the pairs of images of each prompt that has several; at most `max_pairs` of each, at random.

    Image i was drawn from prompts[i]; one whose prompt is empty from none, so it is in no pair. No more than
    PAIRS_AT_A_TIME pairs are read at a time. Near 1: the model draws one picture for that prompt.
    """
    rng = np.random.default_rng(seed)
    rows_of: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        if prompt:
            rows_of.setdefault(prompt, []).append(row)
    pairs = [(prompt, *pair) for prompt, rows in rows_of.items() for pair in _some_pairs(rows, max_pairs, rng)]
    by_prompt: dict[str, list[float]] = {}
    for start in range(0, len(pairs), PAIRS_AT_A_TIME):
        some = pairs[start : start + PAIRS_AT_A_TIME]
        similarities = ms_ssim(read([first for _, first, _ in some]), read([second for _, _, second in some]))
        for (prompt, _, _), similarity in zip(some, similarities, strict=True):
            by_prompt.setdefault(prompt, []).append(float(similarity))
    return {prompt: float(np.mean(values)) for prompt, values in by_prompt.items()}


def _some_pairs(rows: Sequence[int], count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """At most `count` different pairs of rows, all as likely. They are chosen by number: listing all takes n²/2."""
    num_pairs = len(rows) * (len(rows) - 1) // 2
    chosen = rng.choice(num_pairs, size=min(count, num_pairs), replace=False).tolist()
    return [(rows[first], rows[second]) for first, second in map(_pair, chosen)]


def _pair(number: int) -> tuple[int, int]:
    """The pairs i < j, numbered by j, then by i: (0, 1), (0, 2), (1, 2), (0, 3), ..."""
    second = (1 + math.isqrt(1 + 8 * number)) // 2
    return number - second * (second - 1) // 2, second


def _images(pixels: NDArray[Any]) -> torch.Tensor:
    """uint8 [N, H, W, C] -> float32 [N, C, H, W] in [0, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
