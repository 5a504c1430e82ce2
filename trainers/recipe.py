"""The recipe: one YAML file is one experiment, complete and readable alone.

Nothing is looked up anywhere else: a recipe together with the shards it names repeats a run.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster import storage
from cluster.errors import UserError, nearest


class Block(BaseModel):
    """Base of all recipe blocks: unknown keys are errors, values never change, docstrings are the help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


B = TypeVar("B", bound=Block)


class Data(Block):
    shards: str
    """Folder or s3:// prefix that holds the shards and their manifest.json."""
    resolution: int = Field(gt=0, multiple_of=8)
    """Side in pixels; images are scaled to their shorter side and cropped to the centre."""
    horizontal_flip: bool = False
    """Mirror half of the images. Leave off where captions say left or right."""
    num_workers: int = Field(default=1, ge=0)
    """Decoding threads per rank; 0 decodes in the training thread."""


class Training(Block):
    steps: int = Field(gt=0)
    """Optimizer steps; samples seen = steps x global_batch_size."""
    global_batch_size: int = Field(gt=0)
    """Samples per optimizer step over all ranks; the run is the same at any world size."""
    micro_batch_size: int = Field(gt=0)
    """Samples per rank and forward pass; gradient accumulation follows from it."""
    learning_rate: float = Field(gt=0)
    learning_rate_schedule: Literal["constant", "cosine"] = "constant"
    """After warm-up: constant, or a half cosine down to zero at the last step."""
    warmup_steps: int = Field(default=0, ge=0)
    adam_betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    """Ceiling of the moving average's decay, which is ramped as (1 + step) / (10 + step)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: forward passes under autocast; weights, gradients and optimizer states stay fp32."""
    log_every_steps: int = Field(default=50, gt=0)
    validate_every_steps: int = Field(default=500, gt=0)
    preview_every_steps: int = Field(default=500, gt=0)
    checkpoint_every_steps: int = Field(default=500, gt=0)

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of "
                f"micro_batch_size {self.micro_batch_size}"
            )
        return self


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
    training: Training


class TextEncoder(Block):
    pretrained: str
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


class Sampling(Block):
    """How pictures are drawn, while training proceeds and by default from the saved model."""

    scheduler: Literal["ddpm", "ddim", "dpm-solver++"] = "dpm-solver++"
    num_inference_steps: int = Field(default=30, gt=0)
    guidance_scale: float = Field(default=3.5, ge=1)
    prompts: tuple[str, ...] = Field(min_length=1)
    """The fixed prompts of the sample grids."""


class Cluster(Block):
    num_workers: int = Field(default=1, gt=0)
    """Training processes (ranks)."""
    cpus_per_worker: int = Field(default=1, gt=0)
    use_gpu: bool = False
    storage: str = "runs"
    """Folder or s3:// prefix under which each run has its own folder."""
    max_failures: int = Field(default=3, ge=0)
    """Restarts from the latest checkpoint before the run gives up."""
    keep_checkpoints: int = Field(default=2, gt=0)


class Tracking(Block):
    experiment: str = "medsynth"
    artifact_location: str | None = None
    """Where MLflow keeps artifacts; none leaves it to the MLflow server."""
    register_as: str | None = None
    """Name of the registered model that the result becomes a version of."""


class Recipe(Block):
    """The whole experiment: MSDM's autoencoder first, then its denoiser in the autoencoder's latents."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    family: Literal["msdm"] = "msdm"
    seed: int = Field(default=0, ge=0)
    data: Data
    vae: VAEStage
    text_encoder: TextEncoder
    denoiser: DenoiserStage
    sampling: Sampling
    cluster: Cluster = Cluster()
    tracking: Tracking = Tracking()

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
            per_pass = stage.training.micro_batch_size * self.cluster.num_workers
            if stage.training.global_batch_size % per_pass:
                raise ValueError(
                    f"global_batch_size {stage.training.global_batch_size} is not a multiple of micro_batch_size "
                    f"{stage.training.micro_batch_size} x {self.cluster.num_workers} workers"
                )
        return self


def load_recipe(uri: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a file or s3:// URI and apply `a.b=value` overrides, values being YAML.

    Raises UserError that names the key at fault, what is allowed, and the nearest key.
    """
    try:
        document = yaml.safe_load(storage.read_bytes(uri))
    except yaml.YAMLError as error:
        raise UserError(f"{uri} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise UserError(f"{uri} holds no recipe: expected keys such as 'name' and 'data' at its top level")
    for override in overrides:
        _apply_override(document, override)
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise UserError(f"{uri}: " + "; ".join(_explain(error))) from None


def at_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with every local path made absolute: workers have working folders of their own."""
    encoder = recipe.text_encoder
    is_folder = Path(encoder.pretrained).is_dir()  # else a hub id, or a URI
    return recipe.model_copy(
        update={
            "data": _with(recipe.data, shards=storage.absolute(recipe.data.shards)),
            "text_encoder": _with(encoder, pretrained=storage.absolute(encoder.pretrained)) if is_folder else encoder,
            "cluster": _with(recipe.cluster, storage=storage.absolute(recipe.cluster.storage)),
        }
    )


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _with(block: B, **values: str) -> B:
    return block.model_copy(update=values)


def _apply_override(document: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"--set {override}: write it as key=value, for example data.resolution=64")
    *parents, last = path.split(".")
    block = document
    for parent in parents:
        block = block.setdefault(parent, {})
        if not isinstance(block, dict):
            raise UserError(f"--set {override}: '{parent}' is a value, not a block of keys")
    try:
        block[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {override}: the value is not YAML") from None


def _explain(error: ValidationError) -> Iterator[str]:
    """One sentence for each problem, with the dotted key first."""
    for problem in error.errors():
        *parents, last = [str(part) for part in problem["loc"]] or [""]
        key = ".".join([*parents, last])
        if problem["type"] == "extra_forbidden":
            allowed = _keys_at(parents)
            guess = nearest(last, allowed)
            hint = f"did you mean '{guess}'? " if guess else ""
            yield f"unknown key '{key}': {hint}allowed here: {', '.join(allowed)}"
        elif problem["type"] == "missing":
            yield f"missing key '{key}'"
        elif problem["type"] == "value_error":
            yield (f"{key}: " if key else "") + str(problem["ctx"]["error"])
        else:
            yield f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, not {problem['input']!r}"


def _keys_at(path: Sequence[str]) -> list[str]:
    """The keys allowed in the block at `path`."""
    block: type[BaseModel] = Recipe
    for name in path:
        annotation = block.model_fields[name].annotation
        block = next(t for t in (annotation, *get_args(annotation)) if isinstance(t, type) and issubclass(t, BaseModel))
    return list(block.model_fields)
