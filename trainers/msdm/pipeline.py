"""MSDM as a diffusers pipeline: prompts to pictures."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainers.msdm.text_encoder import tokenize
from trainers.msdm.unet import another_sampler, sampler_named
from trainers.msdm.vae import decode_latents

PRECISIONS = ("fp32", "bf16")
"""Of the denoiser; the first is the default."""


class MSDMPipeline(DiffusionPipeline):
    """Text-to-image sampling with classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598).

    Saved and loaded in the diffusers layout: `MSDMPipeline.from_pretrained(folder)`.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        default_guidance_scale: float = 4.5,
        default_num_inference_steps: int = 30,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.register_to_config(
            default_guidance_scale=default_guidance_scale,
            default_num_inference_steps=default_num_inference_steps,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        *,
        negative_prompt: str | Sequence[str] = "",
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        sampler: str | None = None,
        precision: str = "fp32",
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], Any] | None = None,
    ) -> Any:
        """Draw one picture for each prompt.

        Args:
            negative_prompt: takes the place of the empty prompt; one for all, or one for each prompt.
            guidance_scale: w in  uncond + w (cond - uncond);  1 is the plain conditional prediction, at half the cost.
            sampler: one of trainers.msdm.unet.SAMPLERS on the model's own noise schedule; None: the model's own.
            precision: of the denoiser, one of PRECISIONS: that of its weights, or bf16 by autocast. Latents, text
                encoder and decoder keep theirs.
            generator: one for all, or one for each prompt, which makes a picture independent of its neighbours.
            latents: initial noise [B, C, h, w], instead of drawing it.
            prompt_embeds, prompt_mask: [B, L, D] and [B, L] as of `encode_prompts`, instead of prompts; so the negative
                ones, of which one row serves all. With both, no text encoder is needed.
            output_type: "pil", "np" (float [B, H, W, 3] in [0, 1]), "pt" (float [B, 3, H, W] in [0, 1]).
            callback_on_step_end: called as (pipeline, number of the step from 0, timestep, {}) after each step, as by
                diffusers' own pipelines; what it returns is left alone.
        """
        guidance_scale = self.config.default_guidance_scale if guidance_scale is None else guidance_scale
        steps = num_inference_steps or self.config.default_num_inference_steps
        for embeds, mask in ((prompt_embeds, prompt_mask), (negative_prompt_embeds, negative_prompt_mask)):
            if (embeds is None) != (mask is None):
                raise ValueError("embeddings and their mask must be given together")
        if prompt_embeds is None or prompt_mask is None:
            prompt_embeds, prompt_mask = self.encode_prompts([prompt] if isinstance(prompt, str) else list(prompt))
        num_images = len(prompt_embeds)
        is_guided = guidance_scale != 1
        if is_guided:
            if negative_prompt_embeds is None or negative_prompt_mask is None:
                negatives = [negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt)
                negative_prompt_embeds, negative_prompt_mask = self.encode_prompts(negatives)
            prompt_embeds = torch.cat([negative_prompt_embeds.expand_as(prompt_embeds), prompt_embeds])
            prompt_mask = torch.cat([negative_prompt_mask.expand_as(prompt_mask), prompt_mask])
        latents = self.initial_latents(num_images, generator) if latents is None else latents.to(self.device)
        scheduler = self._scheduler(sampler)
        scheduler.set_timesteps(steps, device=self.device)
        latents = latents * scheduler.init_noise_sigma
        step_arguments = _scheduler_arguments(scheduler, generator)

        with self._autocast(precision):  # around all steps, for it casts each weight once and keeps it until it ends
            for number, timestep in enumerate(self.progress_bar(scheduler.timesteps)):
                model_input = torch.cat([latents, latents]) if is_guided else latents
                model_input = scheduler.scale_model_input(model_input, timestep)
                prediction = self.unet(
                    model_input, timestep, prompt_embeds, encoder_attention_mask=prompt_mask, return_dict=False
                )[0].to(latents.dtype)
                if is_guided:
                    unconditional, conditional = prediction.chunk(2)
                    prediction = unconditional + guidance_scale * (conditional - unconditional)
                latents = scheduler.step(prediction, timestep, latents, **step_arguments, return_dict=False)[0]
                if callback_on_step_end is not None:
                    callback_on_step_end(self, number, timestep, {})

        images = (decode_latents(self.vae, latents) / 2 + 0.5).clamp(0, 1)
        return self._output(images, output_type, return_dict)

    def encode_prompts(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Prompt embeddings [B, L, D] and their attention mask [B, L]."""
        tokens = tokenize(self.tokenizer, prompts).to(self.device)
        embeds: Tensor = self.text_encoder(**tokens).last_hidden_state
        return embeds.to(self.unet.dtype), tokens["attention_mask"]

    def initial_latents(self, count: int, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
        """Standard normal noise [count, C, h, w], drawn on the CPU so that a seed means the same on any device."""
        side = self.unet.config.sample_size
        shape = (self.unet.config.in_channels, side, side)
        if generator is None or isinstance(generator, torch.Generator):
            noise = torch.randn(count, *shape, generator=generator)
        else:
            noise = torch.stack([torch.randn(shape, generator=one) for one in generator])
        return noise.to(self.device, self.unet.dtype)

    def _autocast(self, precision: str) -> AbstractContextManager[object]:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
        return torch.autocast(self.device.type, torch.bfloat16) if precision == "bf16" else nullcontext()

    def _scheduler(self, sampler: str | None) -> SchedulerMixin:
        if sampler is None or sampler == sampler_named(type(self.scheduler).__name__):
            return self.scheduler
        return another_sampler(self.scheduler, sampler)

    def _output(self, images: Tensor, output_type: str, return_dict: bool) -> Any:
        output: Any = images
        if output_type != "pt":
            output = images.permute(0, 2, 3, 1).float().cpu().numpy()
        if output_type == "pil":
            output = [Image.fromarray(np.round(image * 255).astype(np.uint8)) for image in output]
        return ImagePipelineOutput(images=output) if return_dict else (output,)


def _scheduler_arguments(scheduler: SchedulerMixin, generator: Any) -> dict[str, Any]:
    """Stochastic samplers draw noise at each step, which must come from the caller's generators."""
    if "generator" not in inspect.signature(scheduler.step).parameters:
        return {}
    return {"generator": list(generator) if isinstance(generator, Sequence) else generator}
