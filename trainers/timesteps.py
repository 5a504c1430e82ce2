"""Noise schedules: how much signal and how much noise there is at each timestep, or at each sigma of a flow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if (
    TYPE_CHECKING
):  # objectives and schedules are plain torch: a benchmark runs them without the recipe's storage clients
    from trainers.recipe import FlowNoise, Noise


@dataclass(frozen=True)
class NoiseSchedule:
    """A discrete variance-preserving schedule (Ho et al. 2020, arXiv 2006.11239, Eq. 4).

    x_t = alpha_t x_0 + sigma_t noise, with alpha_t^2 = prod_s (1 - beta_s) and sigma_t^2 = 1 - alpha_t^2.
    `alpha` and `sigma` are float32 [T], computed in float64.
    """

    alpha: Tensor
    sigma: Tensor

    @classmethod
    def from_recipe(cls, noise: Noise) -> NoiseSchedule:
        """The schedule of a recipe; scaled_linear means linear in sqrt(beta) (Rombach et al. 2022)."""
        steps = noise.num_train_timesteps
        if noise.beta_schedule == "linear":
            betas = torch.linspace(noise.beta_start, noise.beta_end, steps, dtype=torch.float64)
        else:
            betas = torch.linspace(noise.beta_start**0.5, noise.beta_end**0.5, steps, dtype=torch.float64) ** 2
        alpha = torch.cumprod(1 - betas, dim=0).sqrt()
        if noise.zero_terminal_snr:
            alpha = _rescale_to_zero_terminal_snr(alpha)
        return cls(alpha=alpha.float(), sigma=(1 - alpha**2).sqrt().float())

    @property
    def num_timesteps(self) -> int:
        return len(self.alpha)

    def to(self, device: torch.device) -> NoiseSchedule:
        return NoiseSchedule(self.alpha.to(device), self.sigma.to(device))

    def at(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at `timesteps` [B], shaped [B, 1, 1, 1] for latents."""
        return self.alpha[timesteps].view(-1, 1, 1, 1), self.sigma[timesteps].view(-1, 1, 1, 1)

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2 at `timesteps`, [B]."""
        return (self.alpha[timesteps] / self.sigma[timesteps]) ** 2


def _rescale_to_zero_terminal_snr(alpha: Tensor) -> Tensor:
    """Shift and scale so that the last alpha is 0 and the first unchanged (Lin et al. 2023, 2305.08891, Alg. 1)."""
    first, last = alpha[0], alpha[-1]
    return (alpha - last) * first / (first - last)


# FLUX states its shift at these numbers of image tokens: images of 256 x 256 and of 1024 x 1024.
FEW_TOKENS, MANY_TOKENS = 256, 4096


def flow_sigmas(normals: Tensor, noise: FlowNoise, image_tokens: int) -> Tensor:
    """Logit-normal sigmas [B] in (0, 1) from standard normal draws [B] (Esser et al. 2024, 2403.03206, Eq. 19),
    shifted for the resolution."""
    sigmas = torch.sigmoid(noise.logit_mean + noise.logit_std * normals)
    if noise.resolution_shift is None:
        return sigmas
    return shifted(sigmas, resolution_shift(image_tokens, *noise.resolution_shift))


def resolution_shift(image_tokens: int, mu_few: float, mu_many: float) -> float:
    """FLUX's mu, linear in the number of image tokens: larger images need more noise to be as hard to see."""
    slope = (mu_many - mu_few) / (MANY_TOKENS - FEW_TOKENS)
    return mu_few + slope * (image_tokens - FEW_TOKENS)


def shifted(sigmas: Tensor, mu: float) -> Tensor:
    """sigma -> e^mu / (e^mu + 1/sigma - 1) (Esser et al. 2024, Eq. 23, with alpha = e^mu)."""
    return math.exp(mu) * sigmas / (1 + (math.exp(mu) - 1) * sigmas)
