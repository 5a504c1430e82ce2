"""The recipe of MSDM: its autoencoder first, then its denoiser in the autoencoder's latents."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainers.recipe.blocks import PLACE, BaseRecipe, Block, Data, Training, Weights


class VAEArchitecture(Block):
    latent_channels: int = 8
    block_out_channels: tuple[int, ...] = (64, 128, 256, 512)
    """Channels per level; each level but the last halves the side."""
    layers_per_block: int = 2
    norm_num_groups: int = 32
    mid_block_attention: bool = True

    @property
    def downsampling(self) -> int:
        """Pixels per latent, along one side."""
        return int(2 ** (len(self.block_out_channels) - 1))


class VAEStage(Block):
    architecture: VAEArchitecture = VAEArchitecture()
    kl_weight: float = Field(default=1e-6, ge=0)
    """Weight of the KL term, summed over a sample's latents, against the mean squared error per pixel."""
    pretrained: Annotated[str | None, PLACE] = None
    """Folder or s3:// prefix of a run, such as runs/first: its finished autoencoder is taken, and none is trained."""
    training: Training


class TextEncoder(Block):
    pretrained: Weights
    """A hub id, a folder, an s3:// prefix, or package://NAME/FOLDER inside an installed Python package."""
    max_tokens: int = Field(default=64, gt=1)
    """Captions are cut and padded to this many tokens."""


class UNetArchitecture(Block):
    block_out_channels: tuple[int, ...] = (256, 256, 512, 1024)
    """Channels per level; each level but the last halves the side."""
    cross_attention: tuple[bool, ...] = (True, True, True, False)
    """Which levels attend to the prompt embeddings."""
    layers_per_block: int = 2
    num_attention_heads: int = 8
    norm_num_groups: int = 32

    @model_validator(mode="after")
    def _levels_agree(self) -> Self:
        if len(self.cross_attention) != len(self.block_out_channels):
            raise ValueError(
                f"cross_attention has {len(self.cross_attention)} levels, "
                f"block_out_channels {len(self.block_out_channels)}"
            )
        return self


class Noise(Block):
    num_train_timesteps: int = Field(default=1000, gt=1)
    beta_start: float = Field(default=0.002, gt=0, lt=1)
    beta_end: float = Field(default=0.02, gt=0, lt=1)
    beta_schedule: Literal["linear", "scaled_linear"] = "scaled_linear"
    zero_terminal_snr: bool = False
    """Rescale the schedule so that the last timestep is pure noise; needs v_prediction."""
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    min_snr_gamma: float | None = Field(default=None, gt=0)
    """Cap of the signal-to-noise ratio in the loss weight; none weights all timesteps alike."""

    @model_validator(mode="after")
    def _terminal_noise_is_predictable(self) -> Self:
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            raise ValueError("zero_terminal_snr needs prediction_type v_prediction: pure noise tells no epsilon")
        return self


class DenoiserStage(Block):
    architecture: UNetArchitecture = UNetArchitecture()
    noise: Noise = Noise()
    caption_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of samples trained on the empty prompt, which classifier-free guidance needs."""
    training: Training


class MSDMSampling(Block):
    """How pictures are drawn, while training proceeds and by default from the saved model."""

    scheduler: Literal["ddpm", "ddim", "dpm-solver++"] = "dpm-solver++"
    num_inference_steps: int = Field(default=30, gt=0)
    guidance_scale: float = Field(default=4.5, ge=1, le=100)
    """w in  uncond + w (cond - uncond).  The study's 3.5, of  (1 + w) cond - w uncond,  is 4.5 here."""
    prompts: tuple[str, ...] = Field(min_length=1)
    """The fixed prompts of the sample grids."""


class MSDMRecipe(BaseRecipe):
    """The whole experiment: MSDM's autoencoder first, then its denoiser in the autoencoder's latents."""

    family: Literal["msdm"] = "msdm"
    data: Data
    vae: VAEStage
    text_encoder: TextEncoder
    denoiser: DenoiserStage
    sampling: MSDMSampling

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        latent_side, remainder = divmod(self.data.resolution, self.vae.architecture.downsampling)
        halvings = 2 ** (len(self.denoiser.architecture.block_out_channels) - 1)
        if remainder or latent_side % halvings:
            raise ValueError(
                f"data.resolution {self.data.resolution} gives latents of side {latent_side}, which the "
                f"denoiser's {len(self.denoiser.architecture.block_out_channels)} levels must halve evenly"
            )
        for stage in (self.vae, self.denoiser):
            self.check_batches(stage.training)
        self.check_fidelity(self.denoiser.training)
        if self.sampling.num_inference_steps > self.denoiser.noise.num_train_timesteps:
            raise ValueError(
                f"sampling.num_inference_steps {self.sampling.num_inference_steps} is more than "
                f"denoiser.noise.num_train_timesteps {self.denoiser.noise.num_train_timesteps}"
            )
        return self
