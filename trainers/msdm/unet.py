"""The denoiser: a U-Net whose levels attend to the prompt embeddings."""

from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from trainers.recipe import MSDMSampling, Noise, UNetArchitecture


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
    if sampling.scheduler == "ddpm":
        return DDPMScheduler(**settings, clip_sample=False)
    if sampling.scheduler == "ddim":
        return DDIMScheduler(**settings, clip_sample=False, set_alpha_to_one=True)
    return DPMSolverMultistepScheduler(**settings)
