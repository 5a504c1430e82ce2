"""FID against SciPy's matrix square root, torchmetrics and closed forms on Gaussians."""

import tracemalloc

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray
from torchmetrics.image.fid import FrechetInceptionDistance

from tests.trainers.fidelity.real_images import blurred, frames, pixel_features
from trainers.fidelity.frechet import (
    fid,
    fid_infinity,
    fid_infinity_on_rows,
    fid_on_rows,
    frechet_distance,
)
from trainers.fidelity.statistics import GaussianStatistics


def draw(seed: int, count: int, dim: int, *, shift: float = 0.0, scale: float = 1.0) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, dim)) @ rng.standard_normal((dim, dim)) * scale + shift


def reference_fid(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """As published: SciPy's square root of the non-symmetric product."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b)
    return float(np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(a + b) - 2 * np.trace(root.real))


@pytest.mark.parametrize(("n", "m"), [(60, 80), (200, 12), (10, 12), (9, 300)])
def test_is_what_the_matrix_square_root_gives(n: int, m: int) -> None:
    x, y = draw(0, n, 16), draw(1, m, 16, shift=0.5, scale=1.3)
    # SciPy's root of a singular matrix is only good to about the root of rounding.
    rtol = 1e-9 if min(n, m) > 16 else 1e-5
    assert fid(x, y) == pytest.approx(reference_fid(x, y), rel=rtol)


@pytest.mark.parametrize(("n", "m"), [(10, 12), (9, 300), (200, 12)])
def test_few_samples_give_the_same_by_gram_and_by_moments(n: int, m: int) -> None:
    x, y = draw(2, n, 16) + 100, draw(3, m, 16) + 100
    by_moments = frechet_distance(GaussianStatistics.of(x), GaussianStatistics.of(y))
    assert fid(x, y) == pytest.approx(by_moments, rel=1e-6)


def test_closed_form_of_gaussians() -> None:
    rng = np.random.default_rng(4)
    axes = scipy.linalg.qr(rng.standard_normal((6, 6)))[0]
    variances_a, variances_b = np.geomspace(1e-7, 1e2, 6), rng.uniform(0.5, 2, 6) * np.geomspace(1e-7, 1e2, 6)
    gap = 1e-3 * rng.standard_normal(6)
    a = GaussianStatistics(101, np.zeros(6), 100 * axes @ np.diag(variances_a) @ axes.T)
    b = GaussianStatistics(51, gap, 50 * axes @ np.diag(variances_b) @ axes.T)
    expected = gap @ gap + np.sum((np.sqrt(variances_a) - np.sqrt(variances_b)) ** 2)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-11)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-11)


class Mean(torch.nn.Module):
    """Features for torchmetrics: mean colours of four quarters."""

    num_features = 12

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.double(), 2).flatten(1)


def test_is_torchmetrics_fid_on_the_same_features() -> None:
    images = torch.from_numpy(np.random.default_rng(5).integers(0, 256, (80, 3, 8, 8), dtype=np.uint8))
    fake = (images[:30].float() * 0.7).to(torch.uint8)
    metric = FrechetInceptionDistance(feature=Mean(), input_img_size=(3, 8, 8)).set_dtype(torch.float64)
    metric.update(images[30:], real=True)
    metric.update(fake, real=False)
    ours = fid(Mean()(fake).numpy(), Mean()(images[30:]).numpy())
    assert ours == pytest.approx(metric.compute().item(), rel=1e-9)


def test_merged_statistics_give_the_distance_of_the_whole() -> None:
    """Also for features whose variances are ten orders of magnitude apart."""
    scales = np.geomspace(1e-4, 10, 30)
    x, y = draw(11, 300, 30) * scales + 1, draw(12, 200, 30) * scales
    parts = [GaussianStatistics.from_batches(np.array_split(features, 7)) for features in (x, y)]
    whole = [GaussianStatistics.of(features) for features in (x, y)]
    assert frechet_distance(*parts) == pytest.approx(frechet_distance(*whole), rel=1e-9)


def test_many_images_stream_into_the_distance_of_the_whole() -> None:
    """They are never all in float64."""
    x, y = (draw(seed, 30_500, 16, shift=50).astype(np.float32) for seed in (13, 14))
    whole = frechet_distance(GaussianStatistics.of(x), GaussianStatistics.of(y))
    tracemalloc.start()
    found = fid(x, y)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == pytest.approx(whole, rel=1e-9)
    assert peak < x.nbytes / 4


@pytest.mark.parametrize(("n", "m"), [(16, 16), (16, 15), (15, 16), (1500, 15)])
def test_streamed_or_not_it_is_the_same(n: int, m: int) -> None:
    """Streamed with as many images as dimensions, by the images themselves with fewer."""
    x, y = draw(15, n, 16), draw(16, m, 16, shift=1)
    assert fid(x, y) == pytest.approx(fid_on_rows(x, y)(np.arange(n), np.arange(m)), rel=1e-9)


@pytest.mark.parametrize("dim", [4, 100])
def test_on_rows_is_fid_of_those_rows(dim: int) -> None:
    x, y = draw(6, 40, dim), draw(7, 50, dim, shift=1)
    rows, columns = np.array([3, 1, 17, 30, 22, 9, 11]), np.arange(5, 45)
    assert fid_on_rows(x, y)(rows, columns) == pytest.approx(fid(x[rows], y[columns]), rel=1e-9)


@pytest.mark.parametrize("count", [60, 240])
def test_zero_on_identical_sets(count: int) -> None:
    features = pixel_features(frames(240, 32)[:count])  # 192 dimensions: fewer and more than images
    assert fid(features, features) == pytest.approx(0, abs=1e-6)


def test_grows_with_blur_and_with_noise() -> None:
    images = frames(240, 32)
    real, others = pixel_features(images[1::2]), images[::2]
    by_blur = [fid(pixel_features(blurred(others, radius)), real) for radius in (0, 2, 4, 8)]
    assert by_blur == sorted(by_blur)
    assert by_blur[-1] > 1.5 * by_blur[0]
    noise = np.random.default_rng(0).standard_normal((120, 192))
    by_noise = [fid(pixel_features(others) + sigma * noise, real) for sigma in (0, 0.1, 0.2, 0.4)]
    assert by_noise == sorted(by_noise)
    assert by_noise[-1] > 2 * by_noise[0]


def test_fid_infinity_removes_the_bias_of_few_images() -> None:
    """Identity covariances, means 0.5 apart in one of five dimensions: the distance is 0.25."""
    rng = np.random.default_rng(8)
    plain, extrapolated = [], []
    for seed in range(40):
        x, y = rng.standard_normal((150, 5)), rng.standard_normal((100, 5))
        x[:, 0] += 0.5
        plain.append(fid(x, y))
        extrapolated.append(fid_infinity(x, y, seed=seed))
    error = np.std(extrapolated) / np.sqrt(len(extrapolated))
    assert np.mean(plain) > 0.25 + 4 * error  # the bias is there to be removed
    assert np.mean(extrapolated) == pytest.approx(0.25, abs=3 * error)


def test_fid_infinity_is_a_function_of_its_seed() -> None:
    x, y = draw(9, 40, 4), draw(10, 40, 4)
    assert fid_infinity(x, y, seed=1) == fid_infinity(x, y, seed=1) != fid_infinity(x, y, seed=2)
    rng = np.random.default_rng(1)
    rows, columns = rng.permutation(40), rng.permutation(40)
    assert fid_infinity_on_rows(x, y)(rows, columns) == pytest.approx(fid_infinity(x, y, seed=1), rel=1e-9)


def test_fid_infinity_is_the_intercept_of_the_least_squares_line() -> None:
    x, y = draw(11, 24, 4), draw(12, 36, 4, shift=1)
    mean = [
        np.mean([fid(a, b) for a, b in zip(np.split(x, parts), np.split(y, parts), strict=True)])
        for parts in (1, 2, 3, 4)
    ]
    expected = mean[0] + 0.5 * mean[1] - 0.5 * mean[3]  # the normal equations, solved by hand
    assert fid_infinity_on_rows(x, y)(np.arange(24), np.arange(36)) == pytest.approx(expected, rel=1e-9)


def test_one_sample_has_no_distance() -> None:
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        fid(np.ones((1, 4)), np.ones((5, 4)))
