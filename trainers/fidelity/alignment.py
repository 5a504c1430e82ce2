"""Does an image show what its prompt says? A score an image, so that two models can be compared pair by pair."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from trainers.fidelity.kernel import unit_norm
from trainers.fidelity.manifold import blocks
from trainers.fidelity.statistics import Features, Float64

ALIGNMENT_NEIGHBOURS = 5
MIN_BEARERS = 10
"""Real images that must bear a caption before its neighbourhood is asked for it."""


def clip_scores(image_features: Features, prompt_features: Features) -> Float64:
    """100 · max(cos, 0) of each image [N, D] with its own prompt [N, D], [N].

    CLIPScore of Hessel et al. 2021 (arXiv 2104.08718, Eq. 1) with weight 100, as torchmetrics has it, for their 2.5.
    """
    cosines: Float64 = (unit_norm(image_features) * unit_norm(prompt_features)).sum(axis=1)
    return 100 * cosines.clip(min=0)


def caption_alignment(
    generated: Features,
    real: Features,
    prompts: Sequence[str],
    captions_of_real: Sequence[tuple[str, ...]],
    k: int = ALIGNMENT_NEIGHBOURS,
) -> Float64:
    """Do a generated image's nearest real images bear its prompt as a caption? Beyond chance, [N].

    For each generated image: the share of its k nearest real images (by cosine) among whose captions its prompt is,
    less the share c of all real images that bear it, over 1 - c: Cohen's correction (1960). It is 1 if all neighbours
    bear the prompt, 0 on average for a model that ignores it, below 0 if it shows something else. It needs no text
    encoder, only captions that several real images share. NaN where fewer than MIN_BEARERS real images bear the
    prompt, or all do: take the mean with `np.nanmean`. The definition is this project's.
    """
    if len(generated) != len(prompts) or len(real) != len(captions_of_real):
        raise ValueError(
            f"got {len(generated)} generated images with {len(prompts)} prompts, {len(real)} real with captions of "
            f"{len(captions_of_real)}"
        )
    k = min(k, len(real))
    num_bearers = Counter(caption for captions in captions_of_real for caption in set(captions))
    prompt_ids = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
    bears = np.zeros((len(real), len(prompt_ids)), bool)
    for row, captions in enumerate(captions_of_real):
        bears[row, [prompt_ids[caption] for caption in captions if caption in prompt_ids]] = True
    scores = np.full(len(generated), np.nan)
    x, y = unit_norm(generated), unit_norm(real)
    for rows in blocks(len(x), len(y)):
        nearest = np.argpartition(-(x[rows] @ y.T), k - 1, axis=1)[:, :k]
        for row, neighbours in zip(range(rows.start, rows.stop), nearest, strict=True):
            chance = num_bearers[prompts[row]] / len(real)
            if num_bearers[prompts[row]] >= MIN_BEARERS and chance < 1:
                scores[row] = (bears[neighbours, prompt_ids[prompts[row]]].mean() - chance) / (1 - chance)
    return scores
