"""Planted copies are found, honest images are not, and the test keeps its false-alarm rate."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy.spatial.distance import cdist

from cluster.errors import UserError
from tests.trainers.fidelity.real_images import frames, pixel_features
from trainers.fidelity.memorization import copy_threshold, nearest, training_bias

IMAGES = frames(240, 32)
TRAIN, HELD_OUT, HONEST = IMAGES[::3], IMAGES[1::3], IMAGES[2::3]


def recompressed(image: Image.Image) -> Image.Image:
    """A copy as one meets it: a JPEG of quality 60, a little brighter."""
    buffer = io.BytesIO()
    ImageEnhance.Brightness(image).enhance(1.05).save(buffer, "JPEG", quality=60)
    return Image.open(buffer).convert("RGB")


def test_nearest_is_scipys_by_cosine() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((30, 5)), rng.standard_normal((40, 5))
    found = nearest(x, y)
    cosine_distances = cdist(x, y, "cosine")
    np.testing.assert_array_equal(found.index, cosine_distances.argmin(axis=1))
    np.testing.assert_allclose(found.distance, np.sqrt(2 * cosine_distances.min(axis=1)), rtol=1e-9)


def test_planted_copies_are_found_and_honest_images_are_not() -> None:
    train, held_out, honest = (pixel_features(images) for images in (TRAIN, HELD_OUT, HONEST))
    copied = pixel_features(tuple(recompressed(image) for image in TRAIN[5:25]))
    threshold = copy_threshold(nearest(held_out, train).distance)
    found = nearest(copied, train)
    assert (found.distance <= threshold.distance).mean() >= 0.9
    assert (found.index == np.arange(5, 25)).all()
    exact = nearest(train[:20], train)
    assert (exact.distance == 0).all()
    assert (nearest(honest, train).distance <= threshold.distance).mean() <= 0.05


@pytest.mark.parametrize(("count", "rank", "rate"), [(999, 10, 0.01), (99, 1, 0.01), (250, 2, 2 / 251), (9, 1, 0.1)])
def test_threshold_is_the_rank_that_keeps_the_rate(count: int, rank: int, rate: float) -> None:
    distances = np.random.default_rng(count).permutation(np.arange(1.0, count + 1))
    threshold = copy_threshold(distances)
    assert threshold.distance == rank
    assert threshold.honest_rate == pytest.approx(rate)


def test_a_training_image_among_the_held_out_ones_hides_no_copy() -> None:
    """With so few the smallest distance is the threshold: that image's would be 0."""
    train, held_out = pixel_features(TRAIN), pixel_features(HELD_OUT)
    threshold = copy_threshold(nearest(held_out, train).distance)
    rounded = train[3:4] * np.float32(1.1)
    leaky = copy_threshold(nearest(np.concatenate([held_out, train[:1], rounded]), train).distance)
    assert (leaky.distance, leaky.honest_rate) == (threshold.distance, threshold.honest_rate)
    assert (threshold.num_leaked, leaky.num_leaked, leaky.num_held_out) == (0, 2, 80)
    copied = pixel_features(tuple(recompressed(image) for image in TRAIN[5:25]))
    assert (nearest(copied, train).distance <= leaky.distance).mean() >= 0.9


def test_held_out_images_that_are_all_training_images_judge_nothing() -> None:
    train = pixel_features(TRAIN)
    with pytest.raises(UserError, match="all 7 held-out images are training images: the splits leak"):
        copy_threshold(nearest(train[:7], train).distance)


def test_honest_images_are_flagged_as_often_as_promised() -> None:
    rng = np.random.default_rng(1)
    flagged = []
    for _ in range(3000):
        threshold = copy_threshold(rng.exponential(size=30))
        flagged.append(rng.exponential() <= threshold.distance)
    assert np.mean(flagged) == pytest.approx(1 / 31, abs=3 * np.sqrt(1 / 31 / 3000))


def test_share_is_counted_over_all_real_images_and_corrected_for_their_numbers() -> None:
    rng = np.random.default_rng(2)
    train, held_out, generated = (rng.standard_normal((size, 3)) for size in (30, 10, 200))
    bias = training_bias(generated, train, held_out, seed=0, num_permutations=9)
    is_nearer = nearest(generated, train).distance < nearest(generated, held_out).distance
    np.testing.assert_array_equal(bias.is_nearer_to_training, is_nearer)
    assert bias.share == is_nearer.mean()
    assert [bias.at_equal_sizes(share) for share in (0, 0.75, 0.9, 1)] == pytest.approx([0, 0.5, 0.75, 1])


def test_finds_a_model_that_copies_some_training_images() -> None:
    train, held_out, honest = (pixel_features(images) for images in (TRAIN, HELD_OUT[:30], HONEST))
    copied = pixel_features(tuple(recompressed(image) for image in TRAIN[:40]))
    bias = training_bias(np.concatenate([copied, honest[:40]]), train, held_out, seed=0)
    assert (bias.num_train, bias.num_held_out) == (80, 30)
    assert bias.at_equal_sizes(bias.share) > 0.65
    assert bias.p_value < 0.01
    assert training_bias(honest, train, held_out, seed=0).p_value > 0.05


def test_accuses_honest_models_no_more_often_than_it_says() -> None:
    rng = np.random.default_rng(3)
    biases = [
        training_bias(*(rng.standard_normal((size, 4)) for size in (40, 60, 20)), seed=seed, num_permutations=99)
        for seed in range(120)
    ]
    assert np.mean([bias.share for bias in biases]) == pytest.approx(0.75, abs=0.04)
    assert sum(bias.p_value <= 0.1 for bias in biases) <= 22  # 12 expected; more than 22 has a chance of 0.2 %
    assert sum(bias.p_value > 0.5 for bias in biases) >= 40


def test_images_that_are_in_both_sets_accuse_nobody() -> None:
    images = np.random.default_rng(4).standard_normal((50, 4))
    bias = training_bias(images, images, images, seed=0)
    assert bias.share == pytest.approx(0.5, abs=0.2)
    assert bias.p_value > 0.01


def test_refuses_empty_sets() -> None:
    with pytest.raises(ValueError, match="needs held-out images"):
        copy_threshold(np.array([]))
    with pytest.raises(ValueError, match="got 4 generated, 0 training and 3 held-out"):
        training_bias(np.ones((4, 2)), np.ones((0, 2)), np.ones((3, 2)), seed=0)
