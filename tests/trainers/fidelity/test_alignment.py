"""Alignment scores against their definitions, and against models that heed or ignore the prompt."""

import numpy as np
import pytest
import torch

from trainers.fidelity.alignment import caption_alignment, clip_scores


def test_clip_score_is_a_hundred_times_the_cosine() -> None:
    rng = np.random.default_rng(0)
    images, prompts = rng.standard_normal((50, 8)), rng.standard_normal((50, 8))
    cosines = torch.nn.functional.cosine_similarity(torch.from_numpy(images), torch.from_numpy(prompts)).numpy()
    assert (cosines < 0).any()
    np.testing.assert_allclose(clip_scores(images, prompts), 100 * np.maximum(cosines, 0), rtol=1e-6)


CAPTIONS = ("large", "small")
CENTRES = np.array([[5.0, 0.0, 1.0], [0.0, 5.0, 1.0]])
PROMPTS = [CAPTIONS[i % 2] for i in range(40)]


def images_of(kinds: list[int], seed: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    return CENTRES[kinds] + 0.3 * np.random.default_rng(seed).standard_normal((len(kinds), 3))


REAL_KINDS = [0] * 30 + [1] * 15
REAL = images_of(REAL_KINDS, 0)
REAL_CAPTIONS = [(CAPTIONS[kind], "a polyp") for kind in REAL_KINDS]


def test_a_model_that_heeds_the_prompt_scores_one() -> None:
    scores = caption_alignment(images_of([i % 2 for i in range(40)], 1), REAL, PROMPTS, REAL_CAPTIONS)
    np.testing.assert_allclose(scores, 1)


def test_a_model_that_ignores_the_prompt_scores_nothing() -> None:
    """Whatever it draws instead, also if it is always the commoner kind."""
    rng = np.random.default_rng(2)
    prompts = [CAPTIONS[kind] for kind in rng.permutation(REAL_KINDS * 20)]  # as common as among the real images
    as_real = caption_alignment(images_of(list(rng.permutation(REAL_KINDS * 20)), 3), REAL, prompts, REAL_CAPTIONS)
    assert as_real.mean() == pytest.approx(0, abs=0.1)
    at_random = caption_alignment(rng.standard_normal((900, 3)), rng.standard_normal((45, 3)), prompts, REAL_CAPTIONS)
    assert at_random.mean() == pytest.approx(0, abs=0.05)


def test_a_model_that_draws_the_other_kind_scores_below_nothing() -> None:
    scores = caption_alignment(images_of([1 - i % 2 for i in range(40)], 4), REAL, PROMPTS, REAL_CAPTIONS)
    # No neighbour bears the prompt: -c / (1 - c) for captions of 2/3 and of 1/3 of the images.
    np.testing.assert_allclose(scores[:2], [-2, -0.5])


def test_captions_of_few_images_or_of_all_say_nothing() -> None:
    captions = [*REAL_CAPTIONS[:-1], ("small", "a polyp", "a rare polyp")]
    prompts = ["a polyp", "a rare polyp", "never seen", "large"]
    scores = caption_alignment(images_of([0, 0, 0, 0], 5), REAL, prompts, captions)
    assert np.isnan(scores).tolist() == [True, True, True, False]


def test_refuses_rows_that_do_not_match() -> None:
    with pytest.raises(ValueError, match="got 45 generated images with 40 prompts"):
        caption_alignment(REAL, REAL, PROMPTS, REAL_CAPTIONS)
