"""Precision, recall, density and coverage against plain loops, and against behaviour."""

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.trainers.fidelity.real_images import frames, pixel_features
from trainers.fidelity import manifold
from trainers.fidelity.manifold import (
    ManifoldScores,
    manifold_scores,
    manifold_scores_on_rows,
    neighbour_radii,
    precision_recall,
    squared_distances,
)


def reference_scores(x: NDArray[np.float64], y: NDArray[np.float64]) -> ManifoldScores:
    """By the papers' words: every distance on its own."""

    def radius(images: NDArray[np.float64], i: int, k: int) -> float:
        others = [float(np.linalg.norm(images[i] - images[j])) for j in range(len(images)) if j != i]
        return sorted(others)[k - 1]

    def lies_in(point: NDArray[np.float64], images: NDArray[np.float64], k: int) -> list[bool]:
        return [bool(np.linalg.norm(point - images[i]) <= radius(images, i, k)) for i in range(len(images))]

    precision = np.mean([any(lies_in(point, y, 3)) for point in x])
    recall = np.mean([any(lies_in(point, x, 3)) for point in y])
    inside = np.array([lies_in(point, y, 5) for point in x])  # [N, M]
    return ManifoldScores(
        float(precision),
        float(recall),
        float(2 / (1 / precision + 1 / recall)),
        float(inside.sum() / (5 * len(x))),
        float(inside.any(axis=0).mean()),
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_is_what_loops_give(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((20, 3)), rng.standard_normal((14, 3)) * 1.5 + 0.5
    x[3] = x[4] = x[5]  # duplicates are each other's neighbours
    expected = reference_scores(x, y)
    assert 0 < expected.precision < 1 or 0 < expected.recall < 1  # neither trivial
    assert manifold_scores(x, y) == pytest.approx(expected)
    assert manifold_scores_on_rows(x, y)(np.arange(20), np.arange(14)) == pytest.approx(expected)
    assert precision_recall(x, y) == pytest.approx((expected.precision, expected.recall))
    monkeypatch.setattr(manifold, "BLOCK_ELEMENTS", 40)  # two rows at a time
    assert manifold_scores(x, y) == pytest.approx(expected)


def test_on_rows_is_the_score_of_those_rows() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((40, 4)), rng.standard_normal((50, 4)) + 0.5
    rows, columns = rng.permutation(40)[:15], rng.permutation(50)[:20]
    assert manifold_scores_on_rows(x, y)(rows, columns) == pytest.approx(manifold_scores(x[rows], y[columns]))


def test_identical_sets_are_wholly_precise_and_covered() -> None:
    features = pixel_features(frames(240, 32)[:60])
    scores = manifold_scores(features, features)
    assert scores == pytest.approx(ManifoldScores(1, 1, 1, scores.density, 1))
    # The k neighbours and the image itself: (k + 1) / k.
    assert scores.density == pytest.approx(6 / 5)


def test_a_model_that_draws_one_mode_is_precise_but_recalls_half() -> None:
    rng = np.random.default_rng(4)
    left, right = rng.standard_normal((100, 2)), rng.standard_normal((100, 2)) + 100
    scores = manifold_scores(rng.standard_normal((100, 2)), np.concatenate([left, right]))
    assert scores.precision > 0.9
    assert 0.4 < scores.recall <= 0.5
    assert scores.coverage <= 0.5


def test_sets_apart_share_nothing() -> None:
    rng = np.random.default_rng(5)
    assert manifold_scores(rng.standard_normal((20, 3)), rng.standard_normal((20, 3)) + 50) == (0, 0, 0, 0, 0)


def test_falls_with_noise() -> None:
    features = pixel_features(frames(240, 32))
    noise = np.random.default_rng(0).standard_normal((120, 192))
    by_noise = [manifold_scores(features[:120] + sigma * noise, features[120:]) for sigma in (0, 0.1, 0.2, 0.4)]
    for name in ("precision", "density", "coverage"):
        values = [getattr(scores, name) for scores in by_noise]
        assert values == sorted(values, reverse=True), name
        assert values[-1] < 0.2 < 0.5 < values[0], name


def test_copies_are_at_no_distance_far_from_zero() -> None:
    x = np.random.default_rng(6).standard_normal((30, 64)) + 1000
    distances = squared_distances(x, x)
    assert (np.diag(distances) == 0).all()
    assert (distances[~np.eye(30, dtype=bool)] > 10).all()


def test_needs_more_images_than_neighbours() -> None:
    with pytest.raises(ValueError, match="over 5 samples in each set, got 5 and 20"):
        manifold_scores(np.ones((5, 2)), np.ones((20, 2)))
    with pytest.raises(ValueError, match="3 samples have no 3 nearest"):
        neighbour_radii(np.ones((3, 2)), 3)
