"""A tiny model with random weights, whole."""

import pytest
import torch

from trainers.msdm import MSDMPipeline
from trainers.msdm.text_encoder import load_text_encoder
from trainers.msdm.unet import build_scheduler, build_unet
from trainers.msdm.vae import build_vae, set_channel_statistics
from trainers.recipe import MSDMRecipe


@pytest.fixture
def pipeline(recipe: MSDMRecipe) -> MSDMPipeline:
    torch.manual_seed(0)
    tokenizer, text_encoder = load_text_encoder(recipe.text_encoder)
    vae = build_vae(recipe.vae.architecture, recipe.data.resolution)
    set_channel_statistics(vae, torch.randn(16, 8, 8, 8) * 3 + 1)
    unet = build_unet(recipe.denoiser.architecture, latent_channels=8, latent_side=8, embedding_dim=32)
    pipeline = MSDMPipeline(
        vae.eval(),
        text_encoder,
        tokenizer,
        unet.eval(),
        build_scheduler(recipe.denoiser.noise, recipe.sampling),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
