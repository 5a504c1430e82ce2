"""Objectives: tensors in, one loss per sample out. No devices, no randomness, no settings looked up."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from trainers.timesteps import NoiseSchedule


@dataclass(frozen=True)
class AutoencoderObjective:
    """Reconstruction and KL divergence of a variational autoencoder (Kingma & Welling 2014, Eq. 10)."""

    kl_weight: float

    def __call__(self, vae: nn.Module, *, images: Tensor, noise: Tensor) -> Tensor:
        """Losses [B] of `images` [B, 3, H, W] in [-1, 1]; `noise` [B, C, h, w] draws from the posterior."""
        reconstruction, mean, logvar = vae(images, noise)
        squared_error = (reconstruction.float() - images).square().mean(dim=(1, 2, 3))
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))
        losses: Tensor = squared_error + self.kl_weight * divergence
        return losses


@dataclass(frozen=True)
class DenoisingObjective:
    """Predict the noise or the velocity of noisy latents (Ho et al. 2020, Eq. 14; Salimans & Ho 2022, App. D)."""

    schedule: NoiseSchedule
    prediction_type: Literal["epsilon", "v_prediction"]
    min_snr_gamma: float | None = None

    def __call__(
        self,
        denoiser: nn.Module,
        *,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor,
    ) -> Tensor:
        """Losses [B]; latents and noise [B, C, h, w], timesteps [B] int64, prompt_embeds [B, L, D], mask [B, L]."""
        alpha, sigma = self.schedule.at(timesteps)
        noisy_latents = alpha * latents + sigma * noise
        target = noise if self.prediction_type == "epsilon" else alpha * noise - sigma * latents
        prediction = denoiser(
            noisy_latents, timesteps, prompt_embeds, encoder_attention_mask=prompt_mask, return_dict=False
        )[0]
        squared_error = (prediction.float() - target).square().mean(dim=(1, 2, 3))
        losses: Tensor = squared_error * self.weights(timesteps)
        return losses

    def weights(self, timesteps: Tensor) -> Tensor:
        """Min-SNR weights [B] (Hang et al. 2023, arXiv 2303.09556, Sec. 3.4); ones without a gamma.

        For x_0 the weight is min(SNR, gamma); in terms of epsilon that is min(SNR, gamma) / SNR, and in
        terms of v min(SNR, gamma) / (SNR + 1).
        """
        snr = self.schedule.snr(timesteps)
        if self.min_snr_gamma is None:
            return torch.ones_like(snr)
        capped = snr.clamp(max=self.min_snr_gamma)
        return capped / snr if self.prediction_type == "epsilon" else capped / (snr + 1)
