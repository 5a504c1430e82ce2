"""Does a model draw copies of its training images?

Distances are Euclidean between features scaled to unit length, √(2 - 2 cos): from 0 (a copy) to 2, and blind to a
feature's magnitude, which brightness and contrast move most.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from trainers.fidelity.kernel import unit_norm
from trainers.fidelity.manifold import blocks, squared_distances
from trainers.fidelity.statistics import Features, Float64

COPY_QUANTILE = 0.01
MAX_TESTED = 2000
"""Generated images that the train-versus-held-out test takes, at random if there are more."""


@dataclass(frozen=True)
class Nearest:
    """For each image of one set its nearest in another."""

    index: NDArray[np.int64]
    """[N]"""
    distance: Float64
    """[N]"""


@dataclass(frozen=True)
class CopyThreshold:
    """How near to a training image is suspicious."""

    distance: float
    """At or below it, an image counts as a copy."""
    honest_rate: float
    """Share of new real images that would be flagged all the same."""
    num_held_out: int


@dataclass(frozen=True)
class TrainingBias:
    """Are generated images nearer to training images than to held-out ones?"""

    scores: Float64
    """[N]: for each tested image, the chance that it is nearer to a training than to a held-out image."""
    p_value: float
    """How often a random choice of held-out images gives as high a mean score."""
    size: int
    """Images of either set."""

    @property
    def value(self) -> float:
        """Mean score: 1/2 for a model that learnt the distribution, 1 for one that only copies."""
        return float(self.scores.mean())


def nearest(images: Features, others: Features) -> Nearest:
    """The nearest of `others` [M, D] to each of `images` [N, D], blockwise."""
    x, y = unit_norm(images), unit_norm(others)
    indices, distances = [], []
    for rows in blocks(len(x), len(y)):
        squared = squared_distances(x[rows], y)
        index = squared.argmin(axis=1)
        indices.append(index)
        distances.append(np.sqrt(squared[np.arange(len(index)), index]))
    return Nearest(np.concatenate(indices), np.concatenate(distances))


def copy_threshold(held_out_distances: Float64, quantile: float = COPY_QUANTILE) -> CopyThreshold:
    """Calibrated on real images that were not trained on: their distances [H] to the nearest training image.

    The r-th smallest of H distances is undercut by a further honest image with chance r / (H + 1), whatever their
    distribution (as in conformal prediction: Vovk et al. 2005). r is the largest that keeps this within `quantile`;
    with fewer than 1 / quantile - 1 held-out images there is none, the smallest distance is taken, and the chance,
    1 / (H + 1), is larger than asked: `honest_rate` says it.
    """
    count = len(held_out_distances)
    if count == 0:
        raise ValueError("a copy threshold needs held-out images")
    rank = max(1, int(quantile * (count + 1)))
    return CopyThreshold(float(np.sort(held_out_distances)[rank - 1]), rank / (count + 1), count)


def training_bias(
    generated: Features, train: Features, held_out: Features, *, seed: int, num_permutations: int = 999
) -> TrainingBias:
    """Train-versus-held-out test, in the spirit of Meehan et al. 2020 (arXiv 2004.05675), exact at any sample size.

    A generated image's score is the chance that the nearest of m random training images lies nearer than the nearest
    of the m held-out ones. It is averaged over all choices of m out of T training images in closed form: with q
    training images nearer than any held-out one, 1 - C(T - q, m) / C(T, m). So no copy is missed by the choice, and
    both sets count as equally large: one half is chance. The p-value comes from permutations of which real images are
    called held out; real images must be exchangeable (neither set easier to draw, no video in both). If there are more
    held-out than training images, as many are taken at random.
    """
    rng = np.random.default_rng(seed)
    size = min(len(train), len(held_out))
    if size == 0:
        raise ValueError(f"got {len(train)} training and {len(held_out)} held-out images: neither may be empty")
    held_out = held_out[rng.permutation(len(held_out))[:size]]
    generated = generated[np.sort(rng.permutation(len(generated))[:MAX_TESTED])]
    num_train, pool_size = len(train), len(train) + size
    order = rng.permutation(pool_size)  # so that ties, as between equal images, fall either way
    is_held_out = (np.arange(pool_size) >= num_train)[order]
    # Where held-out images are one in 1 + T/m, the first is farther down than this with chance e⁻²⁰ or less.
    depth = min(pool_size - size + 1, 1 + 20 * -(-pool_size // size))
    neighbours = _neighbours(unit_norm(generated), unit_norm(np.concatenate([train, held_out])[order]), depth)
    score_of_rank = _score_by_rank(num_train, size, depth)

    def scores(held: NDArray[np.bool_]) -> Float64:
        found = held[neighbours]  # [N, depth]
        return score_of_rank[np.where(found.any(axis=1), found.argmax(axis=1), depth)]

    observed = scores(is_held_out)
    by_chance = np.array([scores(rng.permutation(is_held_out)).mean() for _ in range(num_permutations)])
    at_least = int((by_chance >= observed.mean() - 1e-12).sum())
    return TrainingBias(observed, (1 + at_least) / (1 + num_permutations), size)


def _neighbours(x: Float64, y: Float64, depth: int) -> NDArray[np.int64]:
    """Indices [N, depth] of the nearest rows of y, nearest first."""
    found = []
    for rows in blocks(len(x), len(y)):
        distances = squared_distances(x[rows], y)
        near = np.argpartition(distances, depth - 1, axis=1)[:, :depth]
        order = np.argsort(np.take_along_axis(distances, near, axis=1), axis=1, kind="stable")
        found.append(np.take_along_axis(near, order, axis=1))
    return np.concatenate(found)


def _score_by_rank(num_train: int, size: int, depth: int) -> Float64:
    """1 - C(T - q, m) / C(T, m) for q = 0 ... depth, [depth + 1]."""
    q = np.arange(depth + 1)
    rest = num_train - q
    is_possible = rest >= size
    rest = np.where(is_possible, rest, size)
    log_ratio = gammaln(rest + 1) - gammaln(rest - size + 1) - gammaln(num_train + 1) + gammaln(num_train - size + 1)
    return np.where(is_possible, 1 - np.exp(log_ratio), 1.0)
