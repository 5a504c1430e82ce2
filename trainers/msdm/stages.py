"""MSDM's two stages: first the autoencoder, then the denoiser in its latents."""

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from data_shards import Batch, PromptStore, derive_seed
from data_shards.prompts import EMPTY_PROMPT
from trainers import randomness
from trainers.flops import pass_flops
from trainers.msdm.denoiser import build_denoiser, denoiser_flops, denoising_objective
from trainers.msdm.pipeline import MSDMPipeline
from trainers.msdm.unet import build_scheduler
from trainers.msdm.vae import TrainableVAE, build_vae, standardize
from trainers.objectives import AutoencoderObjective
from trainers.pictures import to_pixels
from trainers.precomputed import on_device, posterior_draw, prompt_embeddings
from trainers.recipe import MSDMRecipe
from trainers.stage import Stage
from trainers.transfer import to_device


def vae_stage(recipe: MSDMRecipe, examples: Tensor, device: torch.device) -> Stage:
    """Train the autoencoder; previews show `examples` [N, 3, H, W] above their reconstructions."""
    architecture = recipe.vae.architecture
    torch.manual_seed(derive_seed(recipe.seed, "vae"))
    latent_side = recipe.data.resolution // architecture.downsampling
    latent_shape = (architecture.latent_channels, latent_side, latent_side)

    def prepare(batch: Batch, is_training: bool) -> dict[str, Tensor]:
        noise = randomness.normal(batch.seeds, "posterior", latent_shape)
        return {"images": to_device(batch.images, device), "noise": to_device(noise, device)}

    def preview(model: nn.Module, which: Sequence[int]) -> Tensor:
        images = examples[list(which)].to(device)
        reconstructions, _, _ = model(images, images.new_zeros(len(images), *latent_shape))
        return to_pixels(torch.cat([images, reconstructions.float()], dim=2))

    def build() -> nn.Module:
        return TrainableVAE(build_vae(architecture, recipe.data.resolution))

    objective = AutoencoderObjective(recipe.vae.kl_weight)
    return Stage(
        model=build(),
        prepare=prepare,
        objective=objective,
        preview=preview,
        num_previews=len(examples),
        flops_per_image=pass_flops(build, objective, images=examples[:1], noise=torch.zeros(1, *latent_shape)),
    )


def denoiser_stage(recipe: MSDMRecipe, vae: AutoencoderKL, prompts: PromptStore, device: torch.device) -> Stage:
    """Train the U-Net on the latents of a trained `vae`; previews draw the recipe's fixed prompts.

    Of `vae` only the decoder is used, and of `prompts` those of previews: images and captions were encoded beforehand.
    """
    vae = vae.to(device).eval().requires_grad_(False)
    objective = denoising_objective(recipe, device)
    empty = on_device(prompts.get([EMPTY_PROMPT]), device, torch.float32)
    embedding_dim = empty["prompt_embeds"].shape[-1]
    torch.manual_seed(derive_seed(recipe.seed, "denoiser"))
    unet = build_denoiser(recipe, embedding_dim)

    def prepare(batch: Batch, is_training: bool) -> dict[str, Tensor]:
        draw = posterior_draw(batch, device)
        timesteps = randomness.integers(batch.seeds, "timestep", objective.schedule.num_timesteps)
        caption_dropout = recipe.denoiser.caption_dropout if is_training else 0.0
        return {
            "latents": standardize(vae, draw),
            "noise": to_device(randomness.normal(batch.seeds, "noise", draw.shape[1:]), device),
            "timesteps": to_device(timesteps, device),
            **prompt_embeddings(batch, empty, caption_dropout, device, torch.float32),
        }

    def preview(model: nn.Module, which: Sequence[int]) -> Tensor:
        pipeline = MSDMPipeline(
            vae=vae,
            text_encoder=None,
            tokenizer=None,
            unet=model,
            scheduler=build_scheduler(recipe.denoiser.noise, recipe.sampling),
        )
        pipeline.set_progress_bar_config(disable=True)
        conditional = on_device(prompts.get([recipe.sampling.prompts[i] for i in which]), device, torch.float32)
        drawn = pipeline(
            prompt_embeds=conditional["prompt_embeds"],
            prompt_mask=conditional["prompt_mask"],
            negative_prompt_embeds=empty["prompt_embeds"],
            negative_prompt_mask=empty["prompt_mask"],
            guidance_scale=recipe.sampling.guidance_scale,
            num_inference_steps=recipe.sampling.num_inference_steps,
            generator=[torch.Generator().manual_seed(derive_seed(recipe.seed, "preview", i)) for i in which],
            output_type="pt",
        )
        return to_pixels(drawn.images * 2 - 1)

    return Stage(
        model=unet,
        prepare=prepare,
        objective=objective,
        preview=preview,
        num_previews=len(recipe.sampling.prompts),
        flops_per_image=denoiser_flops(recipe, embedding_dim),
    )
