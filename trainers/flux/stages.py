"""FLUX's one stage: its transformer, on precomputed moments and prompt embeddings."""

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from data_shards import Batch, PromptStore, derive_seed
from data_shards.prompts import EMPTY_PROMPT
from trainers import randomness
from trainers.flux.footprint import footprint
from trainers.objectives import RectifiedFlowObjective
from trainers.pictures import to_pixels
from trainers.precomputed import on_device, posterior_draw, prompt_embeddings
from trainers.recipe import FluxRecipe
from trainers.stage import Stage
from trainers.timesteps import flow_sigmas
from trainers.transfer import to_device


def transformer_stage(
    recipe: FluxRecipe,
    transformer: FluxTransformer2DModel,
    vae: AutoencoderKL,
    scheduler: FlowMatchEulerDiscreteScheduler,
    prompts: PromptStore,
    device: torch.device,
) -> Stage:
    """Train `transformer`; previews draw the recipe's fixed prompts with the unmodified FluxPipeline.

    Of `vae` only the decoder is used, and of `prompts` those of previews: images and captions were encoded beforehand.
    The precision of `vae` is the one that the transformer computes in.
    """
    settings = recipe.transformer
    dtype = vae.dtype
    side = recipe.data.resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    guidance = settings.guidance_embedding

    empty = on_device(prompts.get([EMPTY_PROMPT]), device, dtype)

    def prepare(batch: Batch, is_training: bool) -> dict[str, Tensor | None]:
        draw = posterior_draw(batch, device)
        caption_dropout = settings.caption_dropout if is_training else 0.0
        sigmas = flow_sigmas(randomness.normal(batch.seeds, "sigma", ()), settings.noise, image_tokens=(side // 2) ** 2)
        return {
            "latents": (draw - vae.config.shift_factor) * vae.config.scaling_factor,
            "noise": to_device(randomness.normal(batch.seeds, "noise", draw.shape[1:]), device),
            "sigmas": to_device(sigmas, device),
            "guidance": None if guidance is None else torch.full(sigmas.shape, guidance, device=device),
            **prompt_embeddings(batch, empty, caption_dropout, device, dtype),
        }

    def preview(model: nn.Module, which: Sequence[int]) -> Tensor:
        pipeline = FluxPipeline(
            scheduler=scheduler,
            vae=vae,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=model,
        )
        pipeline.set_progress_bar_config(disable=True)
        sampling = recipe.sampling
        negative = {f"negative_{name}": value.expand(len(which), *value.shape[1:]) for name, value in empty.items()}
        drawn = pipeline(
            **on_device(prompts.get([sampling.prompts[i] for i in which]), device, dtype),
            **(negative if sampling.true_cfg_scale > 1 else {}),
            height=recipe.data.resolution,
            width=recipe.data.resolution,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            true_cfg_scale=sampling.true_cfg_scale,
            generator=[torch.Generator().manual_seed(derive_seed(recipe.seed, "preview", i)) for i in which],
            output_type="pt",
        )
        return to_pixels(drawn.images.float() * 2 - 1)

    counted = footprint(
        transformer.config,
        resolution=recipe.data.resolution,
        max_tokens=recipe.max_tokens,
        checkpointing="none",
        lora=settings.lora,
    )
    return Stage(
        model=transformer,
        prepare=prepare,
        objective=RectifiedFlowObjective(),
        preview=preview,
        num_previews=len(recipe.sampling.prompts),
        flops_per_image=counted.pass_flops,
    )
