import torch
from scipy import stats

from trainers import randomness

SEEDS = list(range(4000))


def test_a_draw_belongs_to_the_sample_not_to_its_batch() -> None:
    together = randomness.normal(SEEDS[:4], "noise", (2, 3))
    alone = torch.cat([randomness.normal([seed], "noise", (2, 3)) for seed in SEEDS[:4]])
    assert torch.equal(together, alone)


def test_purposes_draw_independently() -> None:
    noise = randomness.normal(SEEDS, "noise", (1,)).flatten()
    posterior = randomness.normal(SEEDS, "posterior", (1,)).flatten()
    assert abs(stats.pearsonr(noise, posterior).statistic) < 0.06


def test_draws_follow_their_distributions_over_samples() -> None:
    assert stats.kstest(randomness.normal(SEEDS, "noise", (1,)).flatten(), "norm").pvalue > 1e-4
    assert stats.kstest(randomness.uniform(SEEDS, "dropout"), "uniform").pvalue > 1e-4
    timesteps = randomness.integers(SEEDS, "timestep", 10)
    assert stats.chisquare(torch.bincount(timesteps, minlength=10)).pvalue > 1e-4
