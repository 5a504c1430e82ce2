"""KID and CMMD against plain loops, torchmetrics, and against chance."""

from collections.abc import Callable
from itertools import permutations, product

import numpy as np
import pytest
import torch
from torchmetrics.image.kid import KernelInceptionDistance

from tests.trainers.fidelity.real_images import blurred, frames, pixel_features
from tests.trainers.fidelity.test_frechet import Mean, draw
from trainers.fidelity import kernel
from trainers.fidelity.frechet import Rows
from trainers.fidelity.kernel import cmmd, cmmd_on_rows, kid, kid_on_rows
from trainers.fidelity.statistics import Features, Float64

Metric = Callable[[Features, Features], float]
MetricOnRows = Callable[[Features, Features], Callable[[Rows, Rows], float]]


def test_kid_is_what_loops_over_pairs_give(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = draw(0, 9, 4), draw(1, 7, 4, shift=0.5)

    def k(a: Float64, b: Float64) -> float:
        return float((a @ b / 4 + 1) ** 3)

    within_x = np.mean([k(a, b) for a, b in permutations(x, 2)])
    within_y = np.mean([k(a, b) for a, b in permutations(y, 2)])
    expected = within_x + within_y - 2 * np.mean([k(a, b) for a, b in product(x, y)])
    assert kid(x, y) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(kernel, "BLOCK_ELEMENTS", 20)  # two or three rows at a time
    assert kid(x, y) == pytest.approx(expected, rel=1e-9)


def test_cmmd_is_what_loops_over_pairs_give() -> None:
    x, y = draw(2, 9, 4), draw(3, 7, 4, shift=0.5)

    def k(a: Float64, b: Float64) -> float:
        gap = a / np.linalg.norm(a) - b / np.linalg.norm(b)
        return float(np.exp(-(gap @ gap) / (2 * 10.0**2)))

    within_x = np.mean([k(a, b) for a, b in permutations(x, 2)])
    within_y = np.mean([k(a, b) for a, b in permutations(y, 2)])
    expected = 1000 * (within_x + within_y - 2 * np.mean([k(a, b) for a, b in product(x, y)]))
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-6)
    assert cmmd(7 * x, y) == pytest.approx(expected, rel=1e-6)


def test_kid_is_torchmetrics_kid_on_the_same_features() -> None:
    images = torch.from_numpy(np.random.default_rng(5).integers(0, 256, (60, 3, 8, 8), dtype=np.uint8))
    fake = (images[:30].float() * 0.7).to(torch.uint8)
    metric = KernelInceptionDistance(feature=Mean(), subsets=1, subset_size=30).set_dtype(torch.float64)
    metric.update(images[30:], real=True)
    metric.update(fake, real=False)
    mean, _ = metric.compute()
    assert kid(Mean()(fake).numpy(), Mean()(images[30:]).numpy()) == pytest.approx(mean.item(), rel=1e-6)


@pytest.mark.parametrize(("metric", "size"), [(kid, 20), (cmmd, 20), (kid, 60)])
def test_unbiased_between_samples_of_one_distribution(metric: Metric, size: int) -> None:
    rng = np.random.default_rng(0)
    values = [metric(rng.standard_normal((size, 6)), rng.standard_normal((size + 5, 6))) for _ in range(200)]
    error = np.std(values) / np.sqrt(len(values))
    assert np.mean(values) == pytest.approx(0, abs=3 * error)
    assert min(values) < 0 < max(values)


@pytest.mark.parametrize(("metric", "on_rows"), [(kid, kid_on_rows), (cmmd, cmmd_on_rows)])
def test_on_rows_is_the_metric_of_those_rows(metric: Metric, on_rows: MetricOnRows) -> None:
    x, y = draw(6, 40, 5), draw(7, 50, 5, shift=1)
    rows, columns = np.array([3, 1, 17, 30, 22]), np.arange(5, 45)
    assert on_rows(x, y)(rows, columns) == pytest.approx(metric(x[rows], y[columns]), rel=1e-9)


@pytest.mark.parametrize("metric", [kid, cmmd])
def test_least_on_identical_sets_and_grows_with_blur_and_noise(metric: Metric) -> None:
    images = frames(240, 32)
    real, others = pixel_features(images[1::2]), images[::2]
    assert metric(real, real) < 0  # unbiased: below 0 by what pairing an image with itself takes away
    by_blur = [metric(pixel_features(blurred(others, radius)), real) for radius in (1, 4, 8)]
    noise = np.random.default_rng(0).standard_normal((120, 192))
    by_noise = [metric(pixel_features(others) + sigma * noise, real) for sigma in (0.2, 0.4, 0.8)]
    for values in (by_blur, by_noise):
        assert values == sorted(values)
        assert values[-1] > 3 * abs(values[0])


def test_one_sample_has_no_discrepancy() -> None:
    with pytest.raises(ValueError, match="got 1 and 5"):
        kid(np.ones((1, 4)), np.ones((5, 4)))
