"""The autoencoder: images to latents and back.

Levels of representation: image [B, 3, H, W] in [-1, 1] -> moments (mean and log-variance of the posterior)
-> a draw from it -> latents, standardised per channel: what the denoiser sees.
"""

from functools import lru_cache

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from trainers.recipe import VAEArchitecture

# A posterior that begins wide drowns the first reconstructions in noise; this narrow one learns faster.
INITIAL_LOGVAR = -6.0


def build_vae(architecture: VAEArchitecture, resolution: int) -> AutoencoderKL:
    levels = len(architecture.block_out_channels)
    vae = AutoencoderKL(
        sample_size=resolution,
        latent_channels=architecture.latent_channels,
        block_out_channels=architecture.block_out_channels,
        layers_per_block=architecture.layers_per_block,
        norm_num_groups=architecture.norm_num_groups,
        mid_block_add_attention=architecture.mid_block_attention,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        scaling_factor=1.0,  # latents_mean and latents_std do the scaling, per channel
    )
    logvar_part = slice(architecture.latent_channels, None)
    nn.init.zeros_(vae.quant_conv.weight.data[logvar_part])
    nn.init.constant_(vae.quant_conv.bias.data[logvar_part], INITIAL_LOGVAR)
    return vae


class TrainableVAE(nn.Module):
    """The autoencoder with its whole forward pass in one call, as DistributedDataParallel needs it."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(reconstruction, posterior mean, posterior log-variance); `noise` picks the draw that is decoded."""
        mean, logvar = moments(self.vae, images)
        draw = mean + (0.5 * logvar).exp() * noise
        return self.vae.decode(draw, return_dict=False)[0], mean, logvar


def moments(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of the posterior, float32 [B, C, h, w] each."""
    posterior = vae.encode(images, return_dict=False)[0]
    return posterior.mean.float(), posterior.logvar.float()


def standardize(vae: AutoencoderKL, draw: Tensor) -> Tensor:
    """Draws from the posterior -> latents of zero mean and unit variance in each channel."""
    mean, std = _channel_statistics(vae, draw)
    return (draw - mean) / std


def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Latents -> images [B, 3, H, W], nominally in [-1, 1]."""
    mean, std = _channel_statistics(vae, latents)
    images: Tensor = vae.decode(latents * std + mean, return_dict=False)[0]
    return images


def set_channel_statistics(vae: AutoencoderKL, draws: Tensor) -> None:
    """Keep the mean and standard deviation of `draws` [N, C, h, w] per channel in the autoencoder's config."""
    flat = draws.double().transpose(0, 1).flatten(1)  # [C, N*h*w]
    vae.register_to_config(latents_mean=flat.mean(1).tolist(), latents_std=flat.std(1).tolist())


def _channel_statistics(vae: AutoencoderKL, like: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = vae.config.latents_mean, vae.config.latents_std
    return _per_channel(tuple(mean), like.dtype, like.device), _per_channel(tuple(std), like.dtype, like.device)


@lru_cache(16)  # made once: a process waits for the GPU that it hands numbers of its own to
def _per_channel(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device).view(1, -1, 1, 1)
