"""Objectives: tensors in, one loss per sample out. No devices, no randomness, no settings looked up."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from trainers.flux.packing import image_ids, pack, prompt_ids
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


@dataclass(frozen=True)
class RectifiedFlowObjective:
    """Predict the velocity of the straight path from latents to noise (Liu et al. 2022, arXiv 2209.03003, Eq. 1).

    x_sigma = (1 - sigma) x_0 + sigma noise, with target  d x_sigma / d sigma = noise - x_0.
    """

    def __call__(
        self,
        transformer: nn.Module,
        *,
        latents: Tensor,
        noise: Tensor,
        sigmas: Tensor,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor,
        guidance: Tensor | None,
    ) -> Tensor:
        """Losses [B], float32.

        latents and noise [B, C, h, w] and sigmas [B] are float32; prompt_embeds [B, L, D] and pooled_prompt_embeds
        [B, P] are in the transformer's precision, which the noisy latents take on; guidance [B], or None for a
        transformer that is told none (schnell).
        """
        sigma = sigmas.view(-1, 1, 1, 1)
        noisy_latents = (1 - sigma) * latents + sigma * noise
        target = noise - latents
        height, width = latents.shape[2:]
        prediction = transformer(
            hidden_states=pack(noisy_latents).to(prompt_embeds.dtype),
            timestep=sigmas.to(prompt_embeds.dtype),
            guidance=guidance,
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled_prompt_embeds,
            txt_ids=prompt_ids(prompt_embeds.shape[1], prompt_embeds),
            img_ids=image_ids(height, width, prompt_embeds),
            return_dict=False,
        )[0]
        losses: Tensor = (prediction.float() - pack(target)).square().mean(dim=(1, 2))
        return losses
