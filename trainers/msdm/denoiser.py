"""A recipe's denoiser and its objective, and inputs of the right shapes to count and to time them with."""

import torch
from torch import Tensor, nn

from trainers.flops import pass_flops
from trainers.msdm.unet import build_unet
from trainers.objectives import DenoisingObjective
from trainers.recipe import MSDMRecipe
from trainers.timesteps import NoiseSchedule


def build_denoiser(recipe: MSDMRecipe, embedding_dim: int) -> nn.Module:
    """The U-Net, on prompt embeddings of `embedding_dim` channels."""
    unet: nn.Module = build_unet(
        recipe.denoiser.architecture,
        latent_channels=recipe.vae.architecture.latent_channels,
        latent_side=_latent_side(recipe),
        embedding_dim=embedding_dim,
    )
    return unet


def denoising_objective(recipe: MSDMRecipe, device: torch.device) -> DenoisingObjective:
    noise = recipe.denoiser.noise
    return DenoisingObjective(NoiseSchedule.from_recipe(noise).to(device), noise.prediction_type, noise.min_snr_gamma)


def made_up_inputs(recipe: MSDMRecipe, embedding_dim: int, size: int) -> dict[str, Tensor]:
    """The objective's arguments for `size` images that there are not."""
    latents = torch.randn(size, recipe.vae.architecture.latent_channels, _latent_side(recipe), _latent_side(recipe))
    tokens = recipe.text_encoder.max_tokens
    return {
        "latents": latents,
        "noise": torch.randn_like(latents),
        "timesteps": torch.randint(recipe.denoiser.noise.num_train_timesteps, (size,)),
        "prompt_embeds": torch.randn(size, tokens, embedding_dim),
        "prompt_mask": torch.ones(size, tokens, dtype=torch.int64),
    }


def denoiser_flops(recipe: MSDMRecipe, embedding_dim: int) -> float:
    """Of the forward and backward pass of one image."""
    meta = torch.device("meta")
    with meta:  # where nothing is drawn either, so that no generator moves on
        inputs = made_up_inputs(recipe, embedding_dim, 1)
    return pass_flops(lambda: build_denoiser(recipe, embedding_dim), denoising_objective(recipe, meta), **inputs)


def _latent_side(recipe: MSDMRecipe) -> int:
    return recipe.data.resolution // recipe.vae.architecture.downsampling
