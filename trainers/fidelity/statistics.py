"""Count, mean and scatter of features: all that a Fréchet distance needs, exactly mergeable over processes."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.floating[Any]]
"""[N, D], one row an image."""
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class GaussianStatistics:
    """Moments of N feature vectors, in float64.

    `a + b` is what one pass over both sets would have found, by the pairwise update of Chan, Golub & LeVeque (1982,
    "Updating formulae and a pairwise algorithm for computing sample variances", Eq. 1.5). Sums of squares are taken
    about each part's own mean, so features far from zero lose no digits.
    """

    count: int
    mean: Float64
    """[D]"""
    scatter: Float64
    """[D, D]: sum over samples of (x - mean)(x - mean)ᵀ."""

    @classmethod
    def empty(cls, dim: int) -> "GaussianStatistics":
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    @classmethod
    def of(cls, features: Features) -> "GaussianStatistics":
        """Of one batch [N, D]."""
        if len(features) == 0:
            return cls.empty(features.shape[1])
        mean = features.mean(axis=0, dtype=np.float64)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    @classmethod
    def from_batches(cls, batches: Iterable[Features]) -> "GaussianStatistics":
        """Of a stream of batches [B, D]; holds one batch at a time. Raises ValueError if there is none."""
        total: GaussianStatistics | None = None
        for batch in batches:
            total = cls.of(batch) if total is None else total + cls.of(batch)
        if total is None:
            raise ValueError("statistics of no batches at all: their dimension is unknown")
        return total

    def __add__(self, other: "GaussianStatistics") -> "GaussianStatistics":
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"cannot merge statistics of {len(self.mean)} and {len(other.mean)} dimensions")
        count = self.count + other.count
        if count == 0:
            return self
        gap = other.mean - self.mean
        mean = self.mean + gap * (other.count / count)
        scatter = self.scatter + other.scatter
        scatter += np.outer(gap, gap * (self.count * other.count / count))
        return GaussianStatistics(count, mean, scatter)

    @property
    def covariance(self) -> Float64:
        """[D, D], unbiased. Raises ValueError for fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        return self.scatter / (self.count - 1)
