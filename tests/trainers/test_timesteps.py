"""The noise schedule against float64 NumPy and against diffusers."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from trainers.recipe import Noise
from trainers.timesteps import NoiseSchedule

SETTINGS: list[dict[str, Any]] = [
    {},
    {"beta_schedule": "linear", "beta_start": 1e-4},
    {"zero_terminal_snr": True, "prediction_type": "v_prediction"},
    {"num_train_timesteps": 100},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_alpha_and_sigma_equal_diffusers(settings: dict[str, Any]) -> None:
    noise = Noise(**settings)
    schedule = NoiseSchedule.from_recipe(noise)
    reference = DDPMScheduler(
        num_train_timesteps=noise.num_train_timesteps,
        beta_start=noise.beta_start,
        beta_end=noise.beta_end,
        beta_schedule=noise.beta_schedule,
        rescale_betas_zero_snr=noise.zero_terminal_snr,
    )
    torch.testing.assert_close(schedule.alpha**2, reference.alphas_cumprod, rtol=2e-5, atol=1e-7)


def test_alpha_equals_a_float64_product() -> None:
    schedule = NoiseSchedule.from_recipe(Noise())
    betas = np.linspace(np.sqrt(0.002), np.sqrt(0.02), 1000) ** 2
    alpha = np.sqrt(np.array([np.prod(1 - betas[: t + 1]) for t in range(1000)]))
    np.testing.assert_allclose(schedule.alpha.numpy(), alpha, rtol=1e-6)
    np.testing.assert_allclose(schedule.sigma.numpy(), np.sqrt(1 - alpha**2), rtol=1e-5)
    timesteps = torch.tensor([0, 10, 999])
    np.testing.assert_allclose(schedule.snr(timesteps), (alpha**2 / (1 - alpha**2))[timesteps], rtol=1e-4)


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_start() -> None:
    plain = NoiseSchedule.from_recipe(Noise())
    rescaled = NoiseSchedule.from_recipe(Noise(zero_terminal_snr=True, prediction_type="v_prediction"))
    assert rescaled.alpha[-1] == 0
    assert rescaled.sigma[-1] == 1
    torch.testing.assert_close(rescaled.alpha[0], plain.alpha[0])
