"""Merged statistics against one pass over everything, and against NumPy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.fidelity.statistics import GaussianStatistics


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    offset=st.sampled_from([0.0, 1.0, 1e6]),
    as_tree=st.booleans(),
)
def test_any_partition_merges_to_the_one_pass_value(seed: int, sizes: list[int], offset: float, as_tree: bool) -> None:
    features = np.random.default_rng(seed).standard_normal((sum(sizes), 5)) + offset
    parts = [GaussianStatistics.of(part) for part in np.split(features, np.cumsum(sizes)[:-1])]
    assert len(parts) == len(sizes)
    while len(parts) > 1:
        parts = [parts[0] + parts[1], *parts[2:]] if as_tree else [*parts[:-2], parts[-2] + parts[-1]]
    whole = GaussianStatistics.of(features)
    assert parts[0].count == whole.count == sum(sizes)
    np.testing.assert_allclose(parts[0].mean, whole.mean, rtol=1e-9, atol=1e-12)
    # A scatter's elements may cancel: what is small beside the largest is held to the largest.
    np.testing.assert_allclose(parts[0].scatter, whole.scatter, rtol=1e-9, atol=1e-9 * abs(whole.scatter).max())


def test_far_from_zero_no_digits_are_lost() -> None:
    near = np.random.default_rng(0).standard_normal((500, 3))
    far = GaussianStatistics.from_batches(np.split(near + 2.0**27, 10))
    np.testing.assert_allclose(far.covariance, np.cov(near, rowvar=False), rtol=1e-6, atol=1e-7)


def test_is_numpys_mean_and_unbiased_covariance_of_float32_batches() -> None:
    features = np.random.default_rng(1).standard_normal((100, 4)).astype(np.float32)
    statistics = GaussianStatistics.from_batches(features[start : start + 7] for start in range(0, 100, 7))
    assert statistics.scatter.dtype == np.float64
    np.testing.assert_allclose(statistics.mean, features.mean(axis=0, dtype=np.float64), rtol=1e-9)
    np.testing.assert_allclose(statistics.covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-9)


def test_refuses_what_has_no_statistics() -> None:
    with pytest.raises(ValueError, match="no batches"):
        GaussianStatistics.from_batches([])
    with pytest.raises(ValueError, match="3 and 4 dimensions"):
        GaussianStatistics.empty(3) + GaussianStatistics.empty(4)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        _ = GaussianStatistics.of(np.ones((1, 3))).covariance
