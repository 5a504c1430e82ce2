"""Fréchet distance between Gaussians fitted to two sets of features: FID, and its extrapolation to infinite sets."""

from collections.abc import Callable

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from trainers.fidelity.statistics import Features, Float64, GaussianStatistics

Rows = NDArray[np.int64]
PARTS = (1, 2, 3, 4)
BLOCK_ROWS = 1000


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """|μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½): Heusel et al. 2017 (arXiv 1706.08500, Eq. 6).

    With Σ = F Fᵀ the last trace is the sum of the singular values of Faᵀ Fb: Σa Σb has their squares as eigenvalues.
    Taking the root before the product, not after, keeps the digits of small variances beside large ones, and no
    square root of a non-symmetric matrix is needed.
    """
    return _distance(a.mean - b.mean, _factor(a.covariance), _factor(b.covariance))


def fid(generated: Features, real: Features) -> float:
    """Fréchet distance between two sets of features [N, D] and [M, D].

    It is biased upwards at finite N and M: compare values only at equal sizes. Of sets of at least D images, blocks
    stream into their statistics: in float64 there is never more of them than a block.
    """
    if min(len(generated), len(real)) >= generated.shape[1]:
        return frechet_distance(_streamed(generated), _streamed(real))
    gap = generated.mean(axis=0, dtype=np.float64) - real.mean(axis=0, dtype=np.float64)
    return _distance(gap, _factor_of_features(generated), _factor_of_features(real))


def fid_on_rows(generated: Features, real: Features) -> Callable[[Rows, Rows], float]:
    """(rows of generated, rows of real) -> FID between them, for many resamples: inner products are taken once."""
    origin = real.mean(axis=0, dtype=np.float64)  # moved there, features far from zero keep their digits
    x, y = generated - origin, real - origin
    xx, yy, xy = x @ x.T, y @ y.T, x @ y.T

    def distance(rows: Rows, columns: Rows) -> float:
        if min(len(rows), len(columns)) > x.shape[1]:
            return fid(x[rows], y[columns])
        cross = xy[np.ix_(rows, columns)]
        norm_x, variance_x = _moments_by_gram(xx[np.ix_(rows, rows)])
        norm_y, variance_y = _moments_by_gram(yy[np.ix_(columns, columns)])
        gap = norm_x + norm_y - 2 * cross.mean()
        return float(gap + variance_x + variance_y - 2 * _overlap(cross))

    return distance


def fid_infinity(generated: Features, real: Features, *, seed: int) -> float:
    """FID extrapolated to infinitely many images: Chong & Forsyth 2020 (arXiv 1911.07023, Sec. 3.2).

    FID is nearly linear in 1/N; its intercept is free of the bias. Chong & Forsyth vary N with the real statistics
    fixed; here the real set, often as small, shrinks in the same proportion, so that the bias of both is removed. The
    smaller sets are the parts of seeded partitions into 1, 2, 3 and 4, averaged: every image counts once at each size.
    With fewer images than dimensions FID is not linear in 1/N and some bias is left.
    """
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(len(generated)), rng.permutation(len(real))
    return _intercept(lambda r, c: fid(generated[r], real[c]), rows, columns)


def fid_infinity_on_rows(generated: Features, real: Features) -> Callable[[Rows, Rows], float]:
    """Like `fid_on_rows`; rows and columns must come in random order, by which they are parted."""
    distance = fid_on_rows(generated, real)
    return lambda rows, columns: _intercept(distance, rows, columns)


def _intercept(distance: Callable[[Rows, Rows], float], rows: Rows, columns: Rows) -> float:
    """Least squares line through the mean FID of s parts, s = 1, 2, 3, 4, at s = 0."""
    means = [
        np.mean([distance(r, c) for r, c in zip(np.array_split(rows, s), np.array_split(columns, s), strict=True)])
        for s in PARTS
    ]
    return float(np.polyfit(PARTS, means, 1)[-1])


def _distance(gap: Float64, factor_a: Float64, factor_b: Float64) -> float:
    """From the difference of the means and a factor [D, R] of each covariance."""
    overlap = np.linalg.svd(factor_a.T @ factor_b, compute_uv=False).sum()
    return float(gap @ gap + np.square(factor_a).sum() + np.square(factor_b).sum() - 2 * overlap)


def _factor(covariance: Float64) -> Float64:
    """F [D, R] with F Fᵀ = Σ, by eigenvectors: Σ may be of deficient rank R."""
    variances, axes = scipy.linalg.eigh(covariance, driver="evd")
    is_more_than_rounding = variances > len(variances) * np.finfo(np.float64).eps * variances[-1]
    factor: Float64 = (axes * np.sqrt(variances.clip(min=0)))[:, is_more_than_rounding]
    return factor


def _factor_of_features(features: Features) -> Float64:
    """Of the covariance of [N, D]. Of few samples the centred features are one, and as small as the set."""
    n, dim = features.shape
    if n >= dim:
        return _factor(_streamed(features).covariance)
    if n < 2:
        raise ValueError(f"a covariance needs at least 2 samples, got {n}")
    centred: Float64 = (features - features.mean(axis=0, dtype=np.float64)) / np.sqrt(n - 1)
    return centred.T


def _streamed(features: Features) -> GaussianStatistics:
    return GaussianStatistics.from_batches(
        features[start : start + BLOCK_ROWS] for start in range(0, len(features), BLOCK_ROWS)
    )


def _moments_by_gram(gram: Float64) -> tuple[float, float]:
    """Squared norm of the mean, and trace of the unbiased covariance, from x xᵀ."""
    n, norm = len(gram), gram.mean()
    return float(norm), float((np.trace(gram) - n * norm) / (n - 1))


def _overlap(cross: Float64) -> float:
    """tr (Σx Σy)^½ from x yᵀ [N, M]: centred and over √((N-1)(M-1)), that is the product of the factors."""
    n, m = cross.shape
    centred = cross - cross.mean(axis=0) - cross.mean(axis=1, keepdims=True) + cross.mean()
    return float(np.linalg.svd(centred, compute_uv=False).sum() / np.sqrt((n - 1) * (m - 1)))
