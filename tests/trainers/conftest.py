"""Tiny models with random weights, whole, and the recipes that train them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from trainers.msdm import MSDMPipeline
from trainers.msdm.text_encoder import load_text_encoder
from trainers.msdm.unet import build_scheduler, build_unet
from trainers.msdm.vae import build_vae, set_channel_statistics
from trainers.recipe import FluxRecipe, MSDMRecipe


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


@pytest.fixture
def flux_document(flux_folder: Path, shards: str, precomputed: str, tmp_path: Path) -> dict[str, Any]:
    """A complete small FLUX recipe as plain data; tests change what they test."""
    return {
        "name": "tiny-flux",
        "family": "flux",
        "pretrained": str(flux_folder),
        "max_tokens": 16,
        "data": {"shards": shards, "precomputed": precomputed, "resolution": 32},
        "transformer": {
            "activation_checkpointing": "none",
            "training": {
                "steps": 6,
                "global_batch_size": 4,
                "micro_batch_size": 2,
                "learning_rate": 1e-3,
                "ema_decay": 0.5,
                "log_every_steps": 2,
                "validate_every_steps": 6,
                "preview_every_steps": 6,
                "checkpoint_every_steps": 2,
            },
        },
        "sampling": {"num_inference_steps": 2, "prompts": ["a large polyp", "a small polyp", "a polyp"]},
        "cluster": {"num_workers": 1, "storage": str(tmp_path / "runs")},
        "tracking": {"register_as": "tiny-flux"},
    }


@pytest.fixture
def flux_recipe(flux_document: dict[str, Any]) -> FluxRecipe:
    return FluxRecipe.model_validate(flux_document)
