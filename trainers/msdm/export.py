"""From checkpoints to models in the diffusers layout, with the moving-average weights."""

from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from data_shards import Batch
from trainers import checkpoint, randomness
from trainers.msdm.denoiser import build_denoiser
from trainers.msdm.pipeline import MSDMPipeline
from trainers.msdm.text_encoder import load_text_encoder
from trainers.msdm.unet import build_scheduler
from trainers.msdm.vae import TrainableVAE, build_vae, moments, set_channel_statistics
from trainers.recipe import MSDMRecipe, dump_recipe

# diffusers looks for this file when a folder names a pipeline class that is not its own.
PIPELINE_FILE = '"""Opens with medsynth installed."""\n\nfrom trainers.msdm import MSDMPipeline  # noqa: F401\n'


@torch.no_grad()
def export_vae(recipe: MSDMRecipe, checkpoint_folder: Path, batches: Iterable[Batch], out: Path) -> None:
    """Save the autoencoder of a checkpoint, with its latents' statistics over the images of `batches`."""
    model = TrainableVAE(build_vae(recipe.vae.architecture, recipe.data.resolution)).eval()
    checkpoint.load_averaged_weights(checkpoint_folder, model)
    draws = []
    for batch in batches:
        mean, logvar = moments(model.vae, batch.images)
        noise = randomness.normal(batch.seeds, "posterior", mean.shape[1:])
        draws.append(mean + (0.5 * logvar).exp() * noise)
    set_channel_statistics(model.vae, torch.cat(draws))
    model.vae.save_pretrained(out)


def export_pipeline(recipe: MSDMRecipe, vae_folder: Path, checkpoint_folder: Path, out: Path) -> None:
    """Save the whole model of a denoiser checkpoint, and the recipe that made it, in `out`."""
    vae = AutoencoderKL.from_pretrained(vae_folder)
    # diffusers would write down where it lay, and no two exports of one model would have the same digest.
    vae.register_to_config(_name_or_path="")
    tokenizer, text_encoder = load_text_encoder(recipe.text_encoder)
    unet = build_denoiser(recipe, text_encoder.config.hidden_size)
    checkpoint.load_averaged_weights(checkpoint_folder, unet)
    pipeline = MSDMPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(recipe.denoiser.noise, recipe.sampling),
        default_guidance_scale=recipe.sampling.guidance_scale,
        default_num_inference_steps=recipe.sampling.num_inference_steps,
    )
    pipeline.save_pretrained(out)
    (out / "pipeline.py").write_text(PIPELINE_FILE)
    (out / "recipe.yaml").write_text(dump_recipe(recipe))
