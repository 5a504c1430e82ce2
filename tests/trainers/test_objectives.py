"""Targets, weights and losses against float64 computations and against diffusers' scheduler."""

from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from trainers.objectives import AutoencoderObjective, DenoisingObjective
from trainers.recipe import Noise
from trainers.timesteps import NoiseSchedule

PredictionType = Literal["epsilon", "v_prediction"]
SCHEDULER = DDPMScheduler(num_train_timesteps=1000, beta_start=0.002, beta_end=0.02, beta_schedule="scaled_linear")


class Recorder(nn.Module):
    """A denoiser that remembers its input and predicts what it is told."""

    def __init__(self, prediction: Tensor) -> None:
        super().__init__()
        self.prediction = prediction
        self.seen: Tensor | None = None

    def forward(self, noisy_latents: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor]:
        self.seen = noisy_latents
        return (self.prediction,)


@pytest.fixture
def draws() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (6, 8, 4, 4)
    return {
        "latents": torch.randn(shape, generator=generator),
        "noise": torch.randn(shape, generator=generator),
        "timesteps": torch.tensor([0, 1, 100, 500, 998, 999]),
        "prompt_embeds": torch.zeros(6, 3, 16),
        "prompt_mask": torch.ones(6, 3, dtype=torch.int64),
    }


def objective(prediction_type: PredictionType, gamma: float | None = None) -> DenoisingObjective:
    schedule = NoiseSchedule.from_recipe(Noise(prediction_type=prediction_type))
    return DenoisingObjective(schedule, prediction_type, gamma)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noisy_latents_and_target_are_those_of_diffusers(
    prediction_type: PredictionType, draws: dict[str, Tensor]
) -> None:
    latents, noise, timesteps = draws["latents"], draws["noise"], draws["timesteps"]
    target = noise if prediction_type == "epsilon" else SCHEDULER.get_velocity(latents, noise, timesteps)
    denoiser = Recorder(target)
    losses = objective(prediction_type)(denoiser, **draws)
    torch.testing.assert_close(denoiser.seen, SCHEDULER.add_noise(latents, noise, timesteps))
    assert losses.shape == (6,)
    assert losses.max() < 1e-10


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_losses_equal_a_float64_computation(prediction_type: PredictionType, draws: dict[str, Tensor]) -> None:
    denoiser = Recorder(torch.full_like(draws["latents"], 0.25))
    losses = objective(prediction_type, gamma=5.0)(denoiser, **draws)
    latents, noise = draws["latents"].double().numpy(), draws["noise"].double().numpy()
    betas = np.linspace(np.sqrt(0.002), np.sqrt(0.02), 1000) ** 2
    alpha = np.sqrt(np.cumprod(1 - betas))[draws["timesteps"].numpy()].reshape(-1, 1, 1, 1)
    sigma = np.sqrt(1 - alpha**2)
    snr = (alpha**2 / sigma**2).reshape(-1)
    target = noise if prediction_type == "epsilon" else alpha * noise - sigma * latents
    weights = np.minimum(snr, 5.0) / (snr if prediction_type == "epsilon" else snr + 1)
    expected = weights * ((0.25 - target) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_agree_with_diffusers_snr(gamma: float) -> None:
    timesteps = torch.arange(1000)
    snr = compute_snr(SCHEDULER, timesteps)
    capped = torch.minimum(snr, torch.full_like(snr, gamma))
    torch.testing.assert_close(objective("epsilon", gamma).weights(timesteps), capped / snr, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        objective("v_prediction", gamma).weights(timesteps), capped / (snr + 1), rtol=1e-4, atol=1e-6
    )


def test_epsilon_and_velocity_weights_are_the_same_weight_on_the_image() -> None:
    """An error d in x_0 is d * alpha / sigma in epsilon and d / sigma in v, so both must cost min(SNR, gamma) d^2."""
    timesteps = torch.arange(1000)
    schedule = NoiseSchedule.from_recipe(Noise())
    on_image_epsilon = objective("epsilon", 5.0).weights(timesteps) * schedule.snr(timesteps)
    on_image_velocity = objective("v_prediction", 5.0).weights(timesteps) / schedule.sigma[timesteps] ** 2
    torch.testing.assert_close(on_image_epsilon, on_image_velocity, rtol=1e-3, atol=1e-5)


def test_autoencoder_loss_equals_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(3, 3, 8, 8, generator=generator) * 2 - 1
    mean, logvar = torch.randn(2, 3, 4, 2, 2, generator=generator).unbind(0)

    class Fixed(nn.Module):
        def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return images + 0.5, mean, logvar

    losses = AutoencoderObjective(kl_weight=0.1)(Fixed(), images=images, noise=torch.zeros_like(mean))
    posterior = torch.distributions.Normal(mean.double(), (0.5 * logvar.double()).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mean).double(), 1.0)
    divergence = torch.distributions.kl_divergence(posterior, prior).sum(dim=(1, 2, 3))
    torch.testing.assert_close(losses.double(), 0.25 + 0.1 * divergence, rtol=1e-5, atol=1e-6)
