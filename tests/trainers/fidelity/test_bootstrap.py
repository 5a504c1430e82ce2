"""Intervals hold the truth as often as they claim, by simulation, and tell models apart that differ, and only those."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from trainers.fidelity.bootstrap import (
    PAIRED_METRICS,
    Interval,
    OnRows,
    half_sample_intervals,
    mean_interval,
    paired_difference,
    paired_mean_difference,
)
from trainers.fidelity.frechet import Rows, fid, fid_on_rows
from trainers.fidelity.kernel import kid, kid_on_rows
from trainers.fidelity.statistics import Features

Draw = Callable[[np.random.Generator], tuple[NDArray[np.float64], NDArray[np.float64]]]
SIMULATIONS = 100


def shifted(rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return rng.standard_normal((60, 3)) + 0.5, rng.standard_normal((50, 3))


def fewer_than_dimensions(rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return rng.standard_normal((24, 30)) + 0.3, rng.standard_normal((20, 30))


def interval_of(on_rows: Callable[[Features, Features], OnRows], x: Features, y: Features, value: float) -> Interval:
    [interval] = half_sample_intervals(
        value, lambda rows, columns: on_rows(x[rows], y[columns]), len(x), len(y), seed=0, num_bootstrap=40
    )
    return interval


@pytest.mark.parametrize(
    ("metric", "on_rows", "draw"),
    [(fid, fid_on_rows, shifted), (fid, fid_on_rows, fewer_than_dimensions), (kid, kid_on_rows, shifted)],
)
def test_intervals_cover_the_expected_value(
    metric: Callable[[Features, Features], float], on_rows: Callable[[Features, Features], OnRows], draw: Draw
) -> None:
    """At 95 %, of 100 intervals fewer than 88 do so with a chance of 0.4 %. And they are not endless."""
    rng = np.random.default_rng(0)
    expected = np.mean([metric(*draw(rng)) for _ in range(400)])
    pairs = [draw(rng) for _ in range(SIMULATIONS)]
    values = np.array([metric(x, y) for x, y in pairs])
    intervals = np.array([interval_of(on_rows, x, y, value) for (x, y), value in zip(pairs, values, strict=True)])
    covered = (intervals[:, 0] <= expected) & (expected <= intervals[:, 1])
    assert covered.sum() >= 88
    assert (intervals[:, 1] - intervals[:, 0]).mean() < 1.6 * 3.92 * values.std()


def test_resampling_with_replacement_would_not_do() -> None:
    """Why there are half samples: duplicates move FID by more than the interval is wide."""
    rng = np.random.default_rng(1)
    x, y = fewer_than_dimensions(rng)
    _, high = interval_of(fid_on_rows, x, y, fid(x, y))
    efron = [fid(x[rng.integers(24, size=24)], y[rng.integers(20, size=20)]) for _ in range(100)]
    assert np.mean(efron) > high


@pytest.mark.parametrize("size", [800, 3000])
def test_intervals_from_a_part_of_many_images_keep_their_width(size: int) -> None:
    """A difference of two means, whose interval is known: ± 1.96 √(1/N + 1/M)."""
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal(size), rng.standard_normal(size)
    used: list[int] = []

    def prepare(rows: Rows, columns: Rows) -> OnRows:
        used.append(len(rows))
        return lambda r, c: x[rows][r].mean() - y[columns][c].mean()

    [(low, high)] = half_sample_intervals(0.0, prepare, size, size, seed=0, num_bootstrap=300)
    assert used == [min(size, 1000)]
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(2 / size), rel=0.15)


@pytest.mark.parametrize("metric", PAIRED_METRICS)
def test_a_plainly_better_model_is_told_from_its_rival(metric: str) -> None:
    rng = np.random.default_rng(3)
    real, good = rng.standard_normal((70, 4)), rng.standard_normal((60, 4))
    bad = 0.3 * good + np.where(np.arange(60) % 2, 1.5, 9)[:, None]  # half of it absurd, and all too narrow
    better = paired_difference(metric, real, good, bad, seed=0, num_bootstrap=40)
    worse = paired_difference(metric, real, bad, good, seed=0, num_bootstrap=40)
    sign = -1 if metric in ("fid", "kid", "cmmd") else 1
    assert sign * better.value > 0
    assert sign * better.interval[0] > 0
    assert sign * better.interval[1] > 0
    assert worse.value == pytest.approx(-better.value)
    assert worse.interval == pytest.approx((-better.interval[1], -better.interval[0]))


@pytest.mark.parametrize("metric", ["fid", "kid", "f1"])
def test_the_same_model_does_not_differ_from_itself(metric: str) -> None:
    rng = np.random.default_rng(4)
    real, model = rng.standard_normal((50, 4)), rng.standard_normal((60, 4))
    difference = paired_difference(metric, real, model, model, seed=0, num_bootstrap=20)
    assert difference.value == 0
    assert difference.interval == (0, 0)


def test_equal_models_seldom_differ() -> None:
    rng = np.random.default_rng(5)
    found = 0
    for seed in range(60):
        real, shared = rng.standard_normal((50, 3)), rng.standard_normal((40, 3))
        candidate, champion = (shared + 0.5 * rng.standard_normal((40, 3)) for _ in range(2))
        low, high = paired_difference("kid", real, candidate, champion, seed=seed, num_bootstrap=40).interval
        found += not low <= 0 <= high
    assert found <= 8  # 5 % of 60 are 3; more than 8 has a chance of 0.2 %


def test_pairing_makes_the_interval_narrower() -> None:
    rng = np.random.default_rng(6)
    real, champion = rng.standard_normal((60, 4)), rng.standard_normal((60, 4))
    candidate = champion + 0.2 * rng.standard_normal((60, 4)) + 0.2
    paired = paired_difference("fid", real, candidate, champion, seed=0, num_bootstrap=40).interval
    shuffled = paired_difference("fid", real, rng.permutation(candidate), champion, seed=0, num_bootstrap=40).interval
    assert paired[1] - paired[0] < 0.6 * (shuffled[1] - shuffled[0])


def test_the_interval_of_a_mean_covers_it() -> None:
    rng = np.random.default_rng(7)
    intervals = [mean_interval(rng.exponential(size=80), seed=seed, num_bootstrap=200) for seed in range(100)]
    covered = sum(low <= 1 <= high for low, high in intervals)
    assert 85 <= covered < 100  # percentile intervals of skewed scores: some 93 %
    assert intervals[0] == mean_interval(np.random.default_rng(7).exponential(size=80), seed=0, num_bootstrap=200)


def test_paired_scores_leave_out_images_without_one() -> None:
    rng = np.random.default_rng(8)
    champion = rng.standard_normal(100)
    candidate = champion + 0.1 + 0.01 * rng.standard_normal(100)
    candidate[3] = champion[7] = np.nan
    difference = paired_mean_difference(candidate, champion, seed=0)
    assert difference.value == pytest.approx(0.1, abs=0.005)
    assert 0.09 < difference.interval[0] < difference.value < difference.interval[1] < 0.11
    flags = paired_mean_difference(np.array([True, True, False]), np.array([False, True, False]), seed=0)
    assert flags.value == pytest.approx(1 / 3)


def test_refuses_what_is_no_pair() -> None:
    x = np.zeros((20, 2))
    with pytest.raises(ValueError, match="got 20 and 19"):
        paired_difference("fid", x, x, x[1:], seed=0)
    with pytest.raises(ValueError, match="no paired difference of 'fidd'; there is one of fid, kid"):
        paired_difference("fidd", x, x, x, seed=0)
    with pytest.raises(ValueError, match="no pair of images"):
        paired_mean_difference(np.array([np.nan, 1.0]), np.array([1.0, np.nan]), seed=0)
    with pytest.raises(ValueError, match="as many candidates"):
        paired_mean_difference(np.zeros(3), np.zeros(4), seed=0)
