"""Maximum mean discrepancy between two sets of features: KID and CMMD. Unbiased at any number of images."""

from collections.abc import Callable

import numpy as np

from trainers.fidelity.frechet import Rows
from trainers.fidelity.statistics import Features, Float64

Kernel = Callable[[Float64], Float64]
"""Of inner products."""
CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
BLOCK_ELEMENTS = 16_000_000
"""Of the kernel matrix at a time: 128 MB."""


def kid(generated: Features, real: Features) -> float:
    """Squared MMD with the kernel (xᵀy / D + 1)³: Bińkowski et al. 2018 (arXiv 1801.01401, Sec. 4), over all pairs.

    Unbiased, hence a little negative at times. Published figures are often x 1000.
    """
    return _squared_mmd(_float64(generated), _float64(real), _cubic(generated.shape[1]))


def cmmd(generated: Features, real: Features) -> float:
    """1000 x squared MMD with a Gaussian kernel, σ = 10, on unit-norm features: Jayasumana et al. 2024 (2401.09603).

    The unbiased estimate of their Eq. 4, hence a little negative at times. The definition, bandwidth included, is the
    same for extractors other than CLIP.
    """
    return CMMD_SCALE * _squared_mmd(unit_norm(generated), unit_norm(real), _gaussian)


def kid_on_rows(generated: Features, real: Features) -> Callable[[Rows, Rows], float]:
    """(rows of generated, rows of real) -> KID between them, for many resamples: the kernel is taken once."""
    return _squared_mmd_on_rows(_float64(generated), _float64(real), _cubic(generated.shape[1]), scale=1)


def cmmd_on_rows(generated: Features, real: Features) -> Callable[[Rows, Rows], float]:
    """As `kid_on_rows`."""
    return _squared_mmd_on_rows(unit_norm(generated), unit_norm(real), _gaussian, scale=CMMD_SCALE)


def unit_norm(features: Features) -> Float64:
    """Rows scaled to length 1, in float64; rows of zeros stay."""
    x = _float64(features)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    unit: Float64 = x / np.where(norms > 0, norms, 1)
    return unit


def _float64(features: Features) -> Float64:
    return features.astype(np.float64)


def _cubic(dim: int) -> Kernel:
    def kernel(products: Float64) -> Float64:
        base = products / dim + 1
        return base * base * base  # ten times faster than ** 3

    return kernel


def _gaussian(products: Float64) -> Float64:
    """exp(-|x - y|² / 2σ²) of unit vectors, whose |x - y|² is 2 - 2 xᵀy."""
    return np.exp((products - 1) / CMMD_SIGMA**2)


def _squared_mmd(x: Float64, y: Float64, kernel: Kernel) -> float:
    """The U-statistic of Gretton et al. 2012 (JMLR 13, Eq. 3), blockwise."""
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"a discrepancy needs at least 2 samples in each set, got {n} and {m}")
    within_x = (_kernel_sum(x, x, kernel) - _diagonal_sum(x, kernel)) / (n * (n - 1))
    within_y = (_kernel_sum(y, y, kernel) - _diagonal_sum(y, kernel)) / (m * (m - 1))
    return float(within_x + within_y - 2 * _kernel_sum(x, y, kernel) / (n * m))


def _kernel_sum(a: Float64, b: Float64, kernel: Kernel) -> float:
    block = max(1, BLOCK_ELEMENTS // len(b))
    return float(sum(kernel(a[start : start + block] @ b.T).sum() for start in range(0, len(a), block)))


def _diagonal_sum(x: Float64, kernel: Kernel) -> float:
    return float(kernel(np.square(x).sum(axis=1)).sum())


def _squared_mmd_on_rows(x: Float64, y: Float64, kernel: Kernel, scale: float) -> Callable[[Rows, Rows], float]:
    xx, yy, xy = kernel(x @ x.T), kernel(y @ y.T), kernel(x @ y.T)
    np.fill_diagonal(xx, 0)
    np.fill_diagonal(yy, 0)

    def value(rows: Rows, columns: Rows) -> float:
        n, m = len(rows), len(columns)
        within_x = xx[np.ix_(rows, rows)].sum() / (n * (n - 1))
        within_y = yy[np.ix_(columns, columns)].sum() / (m * (m - 1))
        return float(scale * (within_x + within_y - 2 * xy[np.ix_(rows, columns)].mean()))

    return value
