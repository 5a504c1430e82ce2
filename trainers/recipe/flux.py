"""The recipe of FLUX: its transformer, fully fine-tuned or with low-rank adapters, on precomputed inputs."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from trainers.recipe.blocks import BaseRecipe, Block, Data, Place, Training, Weights


class FluxData(Data):
    precomputed: Place
    """Folder or s3:// prefix of latent moments and prompt embeddings, as `medsynth shards precompute RECIPE` writes."""


class FlowNoise(Block):
    """How sigma, the share of noise, is drawn: the logistic function of a normal draw, then shifted."""

    logit_mean: float = 0.0
    logit_std: float = Field(default=1.0, gt=0)
    resolution_shift: tuple[float, float] | None = (0.5, 1.15)
    """Shift mu at 256 and at 4096 image tokens, linear in their number; none leaves sigma as drawn."""


class LoRA(Block):
    """Low-rank adapters on the transformer's projections; all other weights stay as they are."""

    rank: int = Field(default=16, gt=0)
    alpha: float = Field(default=16.0, gt=0)
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")


class FluxTransformer(Block):
    noise: FlowNoise = FlowNoise()
    guidance_embedding: float | None = Field(default=1.0, ge=0)
    """The guidance that FLUX.1-dev is told while it trains; none for FLUX.1-schnell, which is not told any."""
    caption_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of samples trained on the empty prompt, which true classifier-free guidance needs."""
    activation_checkpointing: Literal["none", "selective", "full"] = "full"
    """Activations computed again in the backward pass: none; all but those of attention and matrix products; all."""
    engine: Literal["zero3", "ddp"] = "zero3"
    """zero3: weights, gradients and optimizer states cut over the ranks; ddp: a replica on each rank."""
    optimizer_states: Literal["fp32", "bf16"] = "fp32"
    """Precision of master weights and Adam's moments. bf16 takes 10 bytes a parameter in place of 18, and rounds
    stochastically."""
    lora: LoRA | None = None
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Further keys of DeepSpeed's configuration, as they are."""
    training: Training

    @model_validator(mode="after")
    def _engine_fits(self) -> Self:
        if self.lora is not None and self.engine == "zero3":
            raise ValueError("lora trains few weights: give engine: ddp, zero3 would cut the frozen ones for nothing")
        if self.engine == "ddp" and self.lora is None and self.training.precision == "bf16":
            raise ValueError("engine: ddp without lora trains the weights as they are: give precision: fp32 or zero3")
        if self.engine == "ddp" and self.deepspeed:
            raise ValueError("engine: ddp does not read the keys under deepspeed; remove them, or give engine: zero3")
        if self.training.channels_last:
            raise ValueError("training.channels_last serves convolutions, of which this transformer has none")
        if self.optimizer_states == "bf16" and (self.engine != "zero3" or self.training.precision != "bf16"):
            raise ValueError("optimizer_states: bf16 needs engine: zero3 and training.precision: bf16")
        return self


class FluxSampling(Block):
    """How pictures are drawn, while training proceeds and by default from the saved model."""

    num_inference_steps: int = Field(default=28, gt=0, le=1000)
    guidance_scale: float = Field(default=3.5, ge=0, le=100)
    """The guidance that the transformer is told (embedded guidance): one pass a step."""
    true_cfg_scale: float = Field(default=1.0, ge=1, le=100)
    """Classifier-free guidance against the empty prompt; above 1 it takes two passes a step."""
    prompts: tuple[str, ...] = Field(min_length=1)
    """The fixed prompts of the sample grids."""


class FluxRecipe(BaseRecipe):
    """Fine-tune FLUX's transformer (Rectified flow: Esser et al. 2024, arXiv 2403.03206)."""

    family: Literal["flux"]
    pretrained: Weights
    """A FLUX model in the diffusers layout: a hub id, a folder or an s3:// prefix."""
    max_tokens: int = Field(default=512, gt=1, le=512)
    """Tokens of a caption that T5 reads."""
    data: FluxData
    transformer: FluxTransformer
    sampling: FluxSampling

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if self.data.resolution % 16:
            raise ValueError(
                f"data.resolution {self.data.resolution} is not a multiple of 16: 8 by the VAE, 2 by packing"
            )
        transformer = self.transformer
        if transformer.training.compile and transformer.engine == "zero3" and self.cluster.max_workers > 1:
            raise ValueError(
                "training.compile under engine: zero3 needs cluster.num_workers: 1: over several workers it is not "
                "known to give the same losses"
            )
        self.check_batches(transformer.training)
        self.check_fidelity(transformer.training)
        return self
