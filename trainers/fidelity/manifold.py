"""Do generated images lie among the real ones, and do they reach all of them? By k-nearest-neighbour balls."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from trainers.fidelity.frechet import Rows
from trainers.fidelity.kernel import BLOCK_ELEMENTS
from trainers.fidelity.statistics import Features, Float64

PRECISION_NEIGHBOURS = 3
DENSITY_NEIGHBOURS = 5
ON_THE_BALL = 1 + 1e-9  # what lies on a ball lies in it, whichever way its distance was rounded


class ManifoldScores(NamedTuple):
    """Improved precision and recall: Kynkäänniemi et al. 2019 (arXiv 1904.06991, Eqs. 1 to 3), k = 3.
    Density and coverage: Naeem et al. 2020 (arXiv 2002.09797, Eqs. 3 and 4), k = 5.
    """

    precision: float
    """Share of generated images within the k-th neighbour distance of some real one."""
    recall: float
    """Share of real images within the k-th neighbour distance of some generated one."""
    f1: float
    """Harmonic mean of precision and recall."""
    density: float
    """Real balls that hold a generated image, on average, over k; about 1 for the same distribution, may exceed it."""
    coverage: float
    """Share of real balls that hold a generated image."""


def manifold_scores(generated: Features, real: Features) -> ManifoldScores:
    """Of [N, D] and [M, D], by Euclidean distances, blockwise. Raises ValueError for sets of 5 or fewer."""
    _check_sizes(len(generated), len(real))
    x, y = generated.astype(np.float64), real.astype(np.float64)
    radii_x = neighbour_radii(x, PRECISION_NEIGHBOURS)
    radii_y = neighbour_radii(y, PRECISION_NEIGHBOURS)
    density_radii_y = neighbour_radii(y, DENSITY_NEIGHBOURS)
    num_precise, num_inside = 0, 0
    is_recalled, is_covered = np.zeros(len(y), bool), np.zeros(len(y), bool)
    for rows in blocks(len(x), len(y)):
        distances = squared_distances(x[rows], y)
        inside = distances <= density_radii_y
        num_precise += int((distances <= radii_y).any(axis=1).sum())
        num_inside += int(inside.sum())
        is_covered |= inside.any(axis=0)
        is_recalled |= (distances <= radii_x[rows, None]).any(axis=0)
    precision, recall = num_precise / len(x), float(is_recalled.mean())
    density = num_inside / (DENSITY_NEIGHBOURS * len(x))
    return ManifoldScores(precision, recall, _harmonic_mean(precision, recall), density, float(is_covered.mean()))


def manifold_scores_on_rows(generated: Features, real: Features) -> Callable[[Rows, Rows], ManifoldScores]:
    """(rows of generated, rows of real) -> scores among them, for many resamples: distances are taken once."""
    x, y = generated.astype(np.float64), real.astype(np.float64)
    xx, yy, xy = squared_distances(x, x), squared_distances(y, y), squared_distances(x, y)

    def scores(rows: Rows, columns: Rows) -> ManifoldScores:
        _check_sizes(len(rows), len(columns))
        neighbours = (PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS)
        within_y = np.partition(yy[np.ix_(columns, columns)], neighbours, axis=1) * ON_THE_BALL
        within_x = np.partition(xx[np.ix_(rows, rows)], PRECISION_NEIGHBOURS, axis=1) * ON_THE_BALL
        distances = xy[np.ix_(rows, columns)]
        inside = distances <= within_y[:, DENSITY_NEIGHBOURS]
        precision = float((distances <= within_y[:, PRECISION_NEIGHBOURS]).any(axis=1).mean())
        recall = float((distances <= within_x[:, PRECISION_NEIGHBOURS, None]).any(axis=0).mean())
        density = float(inside.sum() / (DENSITY_NEIGHBOURS * len(rows)))
        coverage = float(inside.any(axis=0).mean())
        return ManifoldScores(precision, recall, _harmonic_mean(precision, recall), density, coverage)

    return scores


def precision_recall(generated: Features, real: Features) -> tuple[float, float]:
    """Improved precision and recall alone: for sets as small as 4 images each, such as those of one caption."""
    x, y = generated.astype(np.float64), real.astype(np.float64)
    distances = squared_distances(x, y)
    precision = (distances <= neighbour_radii(y, PRECISION_NEIGHBOURS)).any(axis=1).mean()
    recall = (distances <= neighbour_radii(x, PRECISION_NEIGHBOURS)[:, None]).any(axis=0).mean()
    return float(precision), float(recall)


def neighbour_radii(x: Float64, k: int) -> Float64:
    """Squared distance of each row of [N, D] to its k-th nearest other, [N]. Raises ValueError if N <= k."""
    if len(x) <= k:
        raise ValueError(f"{len(x)} samples have no {k} nearest neighbours each")
    # Each row is its own nearest, at 0, so index k is the k-th other.
    nearest = [np.partition(squared_distances(x[rows], x), k, axis=1)[:, k] for rows in blocks(len(x), len(x))]
    return np.concatenate(nearest) * ON_THE_BALL


def squared_distances(a: Float64, b: Float64) -> Float64:
    """Euclidean, [N, D] and [M, D] -> [N, M]. What rounding leaves of a zero is set to 0, so that copies are at 0."""
    norms = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1)
    distances: Float64 = norms - 2 * (a @ b.T)
    distances[distances < 1e-12 * norms] = 0
    return distances


def blocks(num_rows: int, num_columns: int) -> list[slice]:
    """Runs of rows whose products with all columns fit a bounded amount of memory."""
    size = max(1, BLOCK_ELEMENTS // num_columns)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def _check_sizes(n: int, m: int) -> None:
    if min(n, m) <= DENSITY_NEIGHBOURS:
        raise ValueError(f"density needs over {DENSITY_NEIGHBOURS} samples in each set, got {n} and {m}")


def _harmonic_mean(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b > 0 else 0.0
