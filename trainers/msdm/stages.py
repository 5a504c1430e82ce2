"""MSDM's two stages: first the autoencoder, then the denoiser in its latents."""

from collections.abc import Sequence
from functools import partial

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from data_shards import Batch, derive_seed
from trainers import randomness
from trainers.flops import pass_flops
from trainers.msdm.conditioning import FrozenEncoders
from trainers.msdm.pipeline import MSDMPipeline
from trainers.msdm.text_encoder import load_text_encoder
from trainers.msdm.unet import build_scheduler, build_unet
from trainers.msdm.vae import TrainableVAE, build_vae, standardize
from trainers.objectives import AutoencoderObjective, DenoisingObjective
from trainers.pictures import to_pixels
from trainers.recipe import MSDMRecipe
from trainers.stage import Stage
from trainers.timesteps import NoiseSchedule
from trainers.transfer import to_device

EMPTY_PROMPT = ""
NORMAL_DRAWS = ("posterior", "noise")


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


def denoiser_stage(recipe: MSDMRecipe, vae: AutoencoderKL, device: torch.device) -> Stage:
    """Train the U-Net on the latents of a trained `vae`; previews draw the recipe's fixed prompts."""
    tokenizer, text_encoder = load_text_encoder(recipe.text_encoder)
    encoders = FrozenEncoders(vae, tokenizer, text_encoder, device)
    noise_settings = recipe.denoiser.noise
    schedule = NoiseSchedule.from_recipe(noise_settings).to(device)
    latent_channels = recipe.vae.architecture.latent_channels
    latent_side = recipe.data.resolution // recipe.vae.architecture.downsampling
    embedding_dim = text_encoder.config.hidden_size

    build = partial(
        build_unet,
        recipe.denoiser.architecture,
        latent_channels=latent_channels,
        latent_side=latent_side,
        embedding_dim=embedding_dim,
    )

    torch.manual_seed(derive_seed(recipe.seed, "denoiser"))
    unet = build()

    def prepare(batch: Batch, is_training: bool) -> dict[str, Tensor]:
        captions = batch.captions
        if is_training:
            dropped = (randomness.uniform(batch.seeds, "caption_dropout") < recipe.denoiser.caption_dropout).tolist()
            captions = [EMPTY_PROMPT if drop else c for c, drop in zip(captions, dropped, strict=True)]
        prompt_embeds, prompt_mask = encoders.prompts(captions)
        mean, logvar = encoders.moments(batch)
        shape = mean.shape[1:]
        posterior, noise = (to_device(randomness.normal(batch.seeds, what, shape), device) for what in NORMAL_DRAWS)
        draw = mean + (0.5 * logvar).exp() * posterior
        timesteps = randomness.integers(batch.seeds, "timestep", schedule.num_timesteps)
        return {
            "latents": standardize(encoders.vae, draw),
            "noise": noise,
            "timesteps": to_device(timesteps, device),
            "prompt_embeds": prompt_embeds,
            "prompt_mask": prompt_mask,
        }

    def preview(model: nn.Module, which: Sequence[int]) -> Tensor:
        pipeline = MSDMPipeline(
            vae=encoders.vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=model,
            scheduler=build_scheduler(noise_settings, recipe.sampling),
        )
        pipeline.set_progress_bar_config(disable=True)
        drawn = pipeline(
            [recipe.sampling.prompts[i] for i in which],
            guidance_scale=recipe.sampling.guidance_scale,
            num_inference_steps=recipe.sampling.num_inference_steps,
            generator=[torch.Generator().manual_seed(derive_seed(recipe.seed, "preview", i)) for i in which],
            output_type="pt",
        )
        return to_pixels(drawn.images * 2 - 1)

    def objective_on(schedule: NoiseSchedule) -> DenoisingObjective:
        return DenoisingObjective(schedule, noise_settings.prediction_type, noise_settings.min_snr_gamma)

    latents = torch.zeros(1, latent_channels, latent_side, latent_side)
    return Stage(
        model=unet,
        prepare=prepare,
        objective=objective_on(schedule),
        preview=preview,
        num_previews=len(recipe.sampling.prompts),
        flops_per_image=pass_flops(
            build,
            objective_on(schedule.to(torch.device("meta"))),
            latents=latents,
            noise=latents,
            timesteps=torch.zeros(1, dtype=torch.int64),
            prompt_embeds=torch.zeros(1, recipe.text_encoder.max_tokens, embedding_dim),
            prompt_mask=torch.ones(1, recipe.text_encoder.max_tokens, dtype=torch.int64),
        ),
    )
