"""Does a model draw copies of its training images?

Distances are Euclidean between features scaled to unit length, √(2 - 2 cos): from 0 (a copy) to 2, and blind to a
feature's magnitude, which brightness and contrast move most.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.errors import UserError
from trainers.fidelity.kernel import unit_norm
from trainers.fidelity.manifold import blocks, squared_distances
from trainers.fidelity.statistics import Features, Float64

COPY_QUANTILE = 0.01
SAME_IMAGE = 1e-3
"""At or below this distance two features are of one image, but for rounding: extractors work in float32."""


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
    """Those it was calibrated on."""
    num_leaked: int
    """Held-out images that are training images: they say nothing about honest ones, and were left out."""


@dataclass(frozen=True)
class TrainingBias:
    """Are generated images nearer to training images than to held-out ones?"""

    is_nearer_to_training: NDArray[np.bool_]
    """[N]: of all real images, is the nearest one a training image?"""
    p_value: float
    """How often a random choice of held-out images gives as large a share."""
    num_train: int
    num_held_out: int

    @property
    def share(self) -> float:
        """Of generated images; T / (T + H) by chance."""
        return float(self.is_nearer_to_training.mean())

    def at_equal_sizes(self, share: float) -> float:
        """A share as it would be with as many training as held-out images: its odds times H / T.

        1/2 for a model that learnt the distribution, 1 for one that only copies.
        """
        train, held_out = share * self.num_held_out, (1 - share) * self.num_train
        return train / (train + held_out)


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

    Held-out images that are training images too are left out: a threshold of 0 would hide every copy. Raises UserError
    if no other is left.
    """
    if len(held_out_distances) == 0:
        raise ValueError("a copy threshold needs held-out images")
    distances = np.sort(held_out_distances[held_out_distances > SAME_IMAGE])
    count, num_leaked = len(distances), int((held_out_distances <= SAME_IMAGE).sum())
    if count == 0:
        raise UserError(
            f"all {num_leaked} held-out images are training images: the splits leak, so copies cannot be judged; "
            "write the shards again, with equal images in one split"
        )
    rank = max(1, int(quantile * (count + 1)))
    return CopyThreshold(float(distances[rank - 1]), rank / (count + 1), count, num_leaked)


def training_bias(
    generated: Features, train: Features, held_out: Features, *, seed: int, num_permutations: int = 999
) -> TrainingBias:
    """Train-versus-held-out test of [N, D] with [T, D] and [H, D], in the spirit of Meehan et al. 2020 (2004.05675).

    They ask whether generated images are nearer to the training set than held-out ones are, which blurred images may be
    without being copies. Here the two sets compete for the same image: is its nearest real image a training image, more
    often than the sets' sizes explain? The larger training set is not cut to the size of the other, which would hide
    most copies; the null accounts for it. The p-value comes from permutations of which real images are called held
    out, exact at any sample size; real images must be exchangeable: frames of one video, all on
    one side, make it too sure. Raises ValueError if a set is empty.
    """
    if min(len(generated), len(train), len(held_out)) == 0:
        raise ValueError(
            f"got {len(generated)} generated, {len(train)} training and {len(held_out)} held-out images: "
            "none may be empty"
        )
    rng = np.random.default_rng(seed)
    pool = len(train) + len(held_out)
    order = rng.permutation(pool)  # so that ties, as between equal images, fall either way
    is_train = order < len(train)
    found = nearest(generated, np.concatenate([train, held_out])[order]).index
    observed = is_train[found]
    times_nearest = np.bincount(found, minlength=pool)
    by_chance = np.array([times_nearest @ rng.permutation(is_train) for _ in range(num_permutations)])
    p_value = (1 + int((by_chance >= observed.sum()).sum())) / (1 + num_permutations)
    return TrainingBias(observed, p_value, len(train), len(held_out))
