"""Noise schedules: how much signal and how much noise there is at each timestep."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainers.recipe import Noise


@dataclass(frozen=True)
class NoiseSchedule:
    """A discrete variance-preserving schedule (Ho et al. 2020, arXiv 2006.11239, Eq. 4).

    x_t = alpha_t x_0 + sigma_t noise, with alpha_t^2 = prod_s (1 - beta_s) and sigma_t^2 = 1 - alpha_t^2.
    `alpha` and `sigma` are float32 [T], computed in float64.
    """

    alpha: Tensor
    sigma: Tensor

    @classmethod
    def from_recipe(cls, noise: Noise) -> "NoiseSchedule":
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

    def to(self, device: torch.device) -> "NoiseSchedule":
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
