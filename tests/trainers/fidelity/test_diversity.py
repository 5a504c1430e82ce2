"""MS-SSIM within a prompt: on real frames, and against torchmetrics with the published scales."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image import MultiScaleStructuralSimilarityIndexMeasure

from tests.trainers.fidelity.real_images import frames, pixels
from trainers.fidelity.diversity import MIN_SIDES, ms_ssim, num_scales, similarity_within_prompts


def as_images(array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> torch.Tensor:
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 255


def test_images_with_room_for_all_scales_have_the_published_measure() -> None:
    images = pixels(frames(4, 176))
    published = MultiScaleStructuralSimilarityIndexMeasure(data_range=1.0, reduction="none")
    expected = published(as_images(images[:2]), as_images(images[2:]))
    np.testing.assert_allclose(ms_ssim(images[:2], images[2:]), expected, rtol=1e-5)


def test_one_scale_is_plain_ssim() -> None:
    images = pixels(frames(4, 16))
    expected = structural_similarity_index_measure(
        as_images(images[:2]), as_images(images[2:]), data_range=1.0, reduction="none"
    )
    assert isinstance(expected, torch.Tensor)
    np.testing.assert_allclose(ms_ssim(images[:2], images[2:]), expected.clamp(min=0), rtol=1e-3)


@pytest.mark.parametrize("side", MIN_SIDES)
def test_every_size_has_scales_that_fit(side: int) -> None:
    images = pixels(frames(2, side))
    assert ms_ssim(images[:1], images[:1]) == pytest.approx([1])
    assert 0 <= ms_ssim(images[:1], images[1:])[0] < 0.95
    assert num_scales(side) == num_scales(side - 1) + 1 if side > 11 else num_scales(side) == 1


def test_an_image_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 11 pixels, got 10"):
        num_scales(10)


def test_a_model_that_repeats_itself_is_less_varied() -> None:
    images = pixels(frames(8, 44))
    noise = np.random.default_rng(0).integers(0, 6, (4, *images.shape[1:]))
    repeated = (np.repeat(images[:1], 4, axis=0) * 0.97 + noise).astype(np.uint8)
    prompts = ["varied"] * 4 + ["repeated"] * 4 + ["drawn once"]
    found = similarity_within_prompts(np.concatenate([images[:4], repeated, images[4:5]]), prompts, seed=0)
    assert list(found) == ["varied", "repeated"]
    assert found["varied"] < 0.6 < 0.95 < found["repeated"]


def test_is_the_mean_over_pairs_of_one_prompt_up_to_a_limit() -> None:
    images = pixels(frames(5, 44))
    prompts = ["a", "b", "a", "a", "b"]
    found = similarity_within_prompts(images, prompts, seed=0)
    assert found["a"] == pytest.approx(ms_ssim(images[[0, 0, 2]], images[[2, 3, 3]]).mean(), rel=1e-6)
    assert found["b"] == pytest.approx(ms_ssim(images[[1]], images[[4]])[0], rel=1e-6)
    one_pair = similarity_within_prompts(images, prompts, seed=0, max_pairs=1)["a"]
    assert abs(ms_ssim(images[[0, 0, 2]], images[[2, 3, 3]]) - one_pair).min() < 1e-6
    assert one_pair != pytest.approx(found["a"])
