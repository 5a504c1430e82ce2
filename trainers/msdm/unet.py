"""The denoiser: a U-Net whose levels attend to the prompt embeddings."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from trainers.recipe import MSDMSampling, Noise, UNetArchitecture

SAMPLERS: Mapping[str, type[SchedulerMixin]] = MappingProxyType(
    {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "dpm-solver++": DPMSolverMultistepScheduler}
)
"""Ho et al. 2020 (arXiv 2006.11239); Song et al. 2021 (2010.02502), without noise; Lu et al. 2022 (2211.01095)."""
NOISE_SCHEDULE = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("prediction_type", "rescale_betas_zero_snr", "timestep_spacing"),
)
"""What all samplers of a model have in common. The rest is a sampler's own, and named differently or not at all."""


def build_unet(
    architecture: UNetArchitecture, *, latent_channels: int, latent_side: int, embedding_dim: int
) -> UNet2DConditionModel:
    down = tuple("CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in architecture.cross_attention)
    up = tuple("CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(architecture.cross_attention))
    return UNet2DConditionModel(
        sample_size=latent_side,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=architecture.block_out_channels,
        layers_per_block=architecture.layers_per_block,
        cross_attention_dim=embedding_dim,
        # diffusers reads attention_head_dim as the number of heads in this model.
        attention_head_dim=architecture.num_attention_heads,
        norm_num_groups=architecture.norm_num_groups,
    )


def build_scheduler(noise: Noise, sampling: MSDMSampling) -> SchedulerMixin:
    """The diffusers sampler that undoes exactly the noise of training."""
    settings = {
        "num_train_timesteps": noise.num_train_timesteps,
        "beta_start": noise.beta_start,
        "beta_end": noise.beta_end,
        "beta_schedule": noise.beta_schedule,
        "prediction_type": noise.prediction_type,
        "rescale_betas_zero_snr": noise.zero_terminal_snr,
        # Start at the very last timestep, the only one that is (nearly) pure noise (Lin et al. 2023, Sec. 3.3).
        "timestep_spacing": "trailing",
    }
    return _sampler(sampling.scheduler, settings)


def another_sampler(scheduler: SchedulerMixin, sampler: str) -> SchedulerMixin:
    """A sampler, one of SAMPLERS, for the noise schedule and the prediction of `scheduler`."""
    return _sampler(sampler, {name: scheduler.config[name] for name in NOISE_SCHEDULE})


def sampler_named(class_name: str) -> str | None:
    """The name of a diffusers scheduler among SAMPLERS; None if it is none of these."""
    return next((name for name, kind in SAMPLERS.items() if kind.__name__ == class_name), None)


def _sampler(name: str, settings: Mapping[str, Any]) -> SchedulerMixin:
    # Latents are not bounded as pixels are, by which these two would clip them.
    unclipped = {} if name == "dpm-solver++" else {"clip_sample": False}
    return SAMPLERS[name](**settings, **unclipped)
