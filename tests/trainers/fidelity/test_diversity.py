"""MS-SSIM within a prompt: on real frames, and against torchmetrics with the published scales."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image import MultiScaleStructuralSimilarityIndexMeasure

from tests.trainers.fidelity.real_images import frames, pixels
from trainers.fidelity.diversity import MIN_SIDES, PAIRS_AT_A_TIME, ms_ssim, num_scales, similarity_within_prompts


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
    drawn = np.concatenate([images[:4], repeated, images[4:5]])
    found = similarity_within_prompts(drawn.__getitem__, prompts, seed=0)
    assert list(found) == ["varied", "repeated"]
    assert found["varied"] < 0.6 < 0.95 < found["repeated"]


def test_is_the_mean_over_pairs_of_one_prompt_up_to_a_limit() -> None:
    images = pixels(frames(5, 44))
    prompts = ["a", "b", "a", "a", "b"]
    found = similarity_within_prompts(images.__getitem__, prompts, seed=0)
    assert found["a"] == pytest.approx(ms_ssim(images[[0, 0, 2]], images[[2, 3, 3]]).mean(), rel=1e-6)
    assert found["b"] == pytest.approx(ms_ssim(images[[1]], images[[4]])[0], rel=1e-6)
    one_pair = similarity_within_prompts(images.__getitem__, prompts, seed=0, max_pairs=1)["a"]
    assert abs(ms_ssim(images[[0, 0, 2]], images[[2, 3, 3]]) - one_pair).min() < 1e-6
    assert one_pair != pytest.approx(found["a"])


def test_of_many_images_of_one_prompt_only_the_chosen_pairs_are_read_and_few_at_a_time() -> None:
    """All pairs of 100,000 images would not fit any memory."""
    rng = np.random.default_rng(0)
    blocks: list[tuple[int, ...]] = []

    def read(numbers: Sequence[int]) -> NDArray[np.uint8]:
        blocks.append(tuple(numbers))
        return rng.integers(0, 256, (len(numbers), 11, 11, 3), dtype=np.uint8)

    similarity_within_prompts(read, ["one prompt"] * 100_000, seed=1, max_pairs=70)
    assert [len(numbers) for numbers in blocks] == [PAIRS_AT_A_TIME] * 4 + [6, 6]
    firsts, seconds = (np.concatenate(blocks[side::2]) for side in (0, 1))
    assert (firsts < seconds).all()
    assert len({*zip(firsts.tolist(), seconds.tolist(), strict=True)}) == 70
    assert firsts.mean() == pytest.approx(100_000 / 3, rel=0.3)
    assert seconds.mean() == pytest.approx(200_000 / 3, rel=0.3)
    before = blocks.copy()
    blocks.clear()
    similarity_within_prompts(read, ["one prompt"] * 100_000, seed=1, max_pairs=70)
    assert blocks == before


def test_every_pair_is_as_likely() -> None:
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 11, 11, 3), np.uint8)
    seen: Counter[tuple[int, int]] = Counter()

    def read(numbers: Sequence[int]) -> NDArray[np.uint8]:
        asked.append(numbers[0])
        return np.asarray(images[list(numbers)])

    for seed in range(500):
        asked: list[int] = []
        similarity_within_prompts(read, ["a"] * 5, seed=seed, max_pairs=1)
        seen[asked[0], asked[1]] += 1
    assert {*seen} == {*combinations(range(5), 2)}
    assert max(abs(count - 50) for count in seen.values()) < 25  # 3.7 standard deviations


def test_images_without_a_prompt_are_not_of_one_prompt() -> None:
    images = pixels(frames(4, 11))
    assert similarity_within_prompts(images.__getitem__, ["", "", "", ""], seed=0) == {}
    assert list(similarity_within_prompts(images.__getitem__, ["", "a", "", "a"], seed=0)) == ["a"]
