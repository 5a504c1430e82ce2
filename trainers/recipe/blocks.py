"""Blocks that the recipes of every family share."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from cluster.names import experiment_name_fault, registered_name_fault

# Marks of keys that hold paths: a place is a folder or s3:// prefix; weights may also be a hub id or a
# package's; an extractor is KIND:WEIGHTS.
PLACE = "place"
WEIGHTS = "weights"
EXTRACTOR = "extractor"


def _is_place(place: str) -> str:
    """Raise ValueError for what would be taken for a folder of an odd name."""
    scheme, colon, rest = place.partition(":")
    is_uri = bool(colon) and "/" not in scheme and rest.startswith("/")
    if not place.strip() or not place.isprintable():
        raise ValueError(f"{place!r} names no place: give a folder, or s3://BUCKET/PREFIX")
    if is_uri and not (scheme == "file" or (scheme == "s3" and rest.startswith("//") and rest.strip("/"))):
        raise ValueError(f"{place!r} is neither a folder nor s3://BUCKET/PREFIX")
    return place


Place = Annotated[str, PLACE, AfterValidator(_is_place)]
Weights = Annotated[str, WEIGHTS]
Extractor = Annotated[str, EXTRACTOR]


class Block(BaseModel):
    """Base of all recipe blocks: unknown keys are errors, values never change, docstrings are the help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Cache(Block):
    """Shards and prompt embeddings kept on each machine's own disk, of use where they come from object storage for
    several epochs."""

    folder: Place
    """On each machine; ranks and trainings there share it."""
    max_gigabytes: float = Field(gt=0)
    """Of 10^9 bytes. What has not been used for longest goes first. Under 8 MiB for each of a global batch's samples
    it serves little."""

    @field_validator("folder")
    @classmethod
    def _is_local(cls, folder: str) -> str:
        if "://" in folder.removeprefix("file://"):
            raise ValueError(f"{folder} is no folder of a machine's own disk")
        return folder


class Data(Block):
    shards: Place
    """Folder or s3:// prefix that holds the shards and their manifest.json."""
    resolution: int = Field(gt=0, multiple_of=8)
    """Side in pixels; images are scaled to their shorter side and cropped to the centre."""
    horizontal_flip: bool = False
    """Mirror half of the images. Leave off where captions say left or right."""
    num_workers: int = Field(default=1, ge=0)
    """Decoding threads per rank; 0 decodes in the training thread."""
    cache: Cache | None = None
    """Without one, shards are read from where they are in each epoch."""


class Training(Block):
    steps: int = Field(gt=0)
    """Optimizer steps; samples seen = steps x global_batch_size."""
    global_batch_size: int = Field(gt=0)
    """Samples per optimizer step over all ranks; the run is the same at any world size."""
    micro_batch_size: int = Field(gt=0)
    """Samples per rank and forward pass; gradient accumulation follows from it."""
    learning_rate: float = Field(gt=0)
    learning_rate_schedule: Literal["constant", "cosine", "exponential"] = "constant"
    """After warm-up: constant, or a half cosine down to zero at the last step. Without one: an exponential rise from
    initial_learning_rate to learning_rate at the last step, to find out how large it may be."""
    initial_learning_rate: float | None = Field(default=None, gt=0)
    """Where the schedule `exponential` starts, which needs it; others have none."""
    warmup_steps: int = Field(default=0, ge=0)
    adam_betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    """Ceiling of the moving average's decay, which is ramped as (1 + step) / (10 + step)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: forward passes under autocast; weights, gradients and optimizer states stay fp32."""
    compile: bool = False
    """torch.compile the model's blocks, which takes a minute or more at each start: worth it on GPUs, in long runs."""
    channels_last: bool = False
    """Keep images and latents with their channels innermost, as convolutions on tensor cores take them."""
    log_every_steps: int = Field(default=50, gt=0)
    validate_every_steps: int = Field(default=500, gt=0)
    validation_samples: int | None = Field(default=None, gt=0)
    """How many samples of the validation split its loss is taken over, always the same; none takes all."""
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

    @model_validator(mode="after")
    def _schedule_is_whole(self) -> Self:
        schedule, start = self.learning_rate_schedule, self.initial_learning_rate
        if schedule != "exponential" and start is not None:
            raise ValueError(
                f"initial_learning_rate {start:g} needs learning_rate_schedule exponential, not {schedule}"
            )
        if schedule == "exponential" and (start is None or start >= self.learning_rate):
            raise ValueError(
                "learning_rate_schedule exponential needs an initial_learning_rate below learning_rate "
                f"{self.learning_rate:g}, not {'none' if start is None else f'{start:g}'}"
            )
        if schedule == "exponential" and self.warmup_steps:
            raise ValueError(f"learning_rate_schedule exponential has no warm-up: warmup_steps {self.warmup_steps}")
        return self


class Cluster(Block):
    num_workers: int | tuple[int, int] = 1
    """Training processes (ranks); [fewest, most] starts with what the cluster has, and grows and shrinks with it."""
    cpus_per_worker: int = Field(default=1, gt=0)
    use_gpu: bool = False
    storage: Place = "runs"
    """Folder or s3:// prefix under which each run has its own folder."""
    max_failures: int = Field(default=3, ge=0)
    """Restarts from the latest checkpoint before the run gives up."""
    keep_checkpoints: int = Field(default=2, gt=0)
    hang_timeout_seconds: float = Field(default=1800, gt=0)
    """A rank that takes longer for a step, with the validation, previews and checkpoint that follow it, is ended, which
    counts as a failure."""
    resize_seconds: float = Field(default=60, gt=0)
    """How often a training with a range of workers looks for room for more. To grow, it starts again at its latest
    checkpoint."""

    @field_validator("num_workers", mode="plain")
    @classmethod
    def _is_number_or_range(cls, value: object) -> int | tuple[int, int]:
        """By hand: of a union pydantic tells what is wrong with each of its types."""
        match value:
            case int() if value > 0 and value is not True:
                return value
            case [int() as fewest, int() as most] if 0 < fewest <= most:
                return fewest, most
            case [int(), int()] if min(value) > 0:
                raise ValueError(f"num_workers {list(value)} is no range: give [fewest, most]")
        raise ValueError(f"{value!r} is neither a number greater than 0 nor [fewest, most]")

    @property
    def worker_range(self) -> tuple[int, int]:
        return self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)

    @property
    def min_workers(self) -> int:
        return self.worker_range[0]

    @property
    def max_workers(self) -> int:
        return self.worker_range[1]

    @property
    def is_elastic(self) -> bool:
        return self.min_workers < self.max_workers


class Tracking(Block):
    experiment: str = "medsynth"
    artifact_location: str | None = None
    """Where MLflow keeps artifacts; none leaves it to the MLflow server."""
    register_as: str | None = None
    """Name of the registered model that the result becomes a version of."""

    @field_validator("experiment")
    @classmethod
    def _is_experiment(cls, name: str) -> str:
        if fault := experiment_name_fault(name):
            raise ValueError(f"{name!r} cannot name an experiment: {fault}")
        return name

    @field_validator("register_as")
    @classmethod
    def _can_be_registered(cls, name: str | None) -> str | None:
        """Now, and not when the training has ended."""
        if name is not None and (fault := registered_name_fault(name)):
            raise ValueError(f"{name!r} cannot name a registered model: {fault}")
        return name


class Fidelity(Block):
    """How good the checkpoints of the last stage are, measured beside the training, which does not wait for it."""

    every_steps: int = Field(gt=0)
    """Steps between the checkpoints measured, a multiple of the stage's checkpoint_every_steps; the last step's is
    measured too. Checkpoints wait for their turn and are kept until then: leave time for one before the next."""
    num_samples: int = Field(default=256, ge=16)
    """Images drawn, each from the caption of a real one."""
    extractor: Extractor = "random-vgg:64"
    """What turns images into features, by URI."""
    splits: tuple[str, ...] = Field(default=("validation",), min_length=1)
    """Splits whose images are the reference."""
    num_inference_steps: int | None = Field(default=None, gt=0)
    """Sampling steps; none takes those of `sampling`."""
    batch_size: int = Field(default=8, gt=0)
    """Images drawn at a time."""
    use_gpu: bool = False
    """Measure on a GPU, one more than those that train."""


class BaseRecipe(Block):
    """What every experiment has; each family adds its models and how they are trained."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    seed: int = Field(default=0, ge=0)
    cluster: Cluster = Cluster()
    tracking: Tracking = Tracking()
    fidelity: Fidelity | None = None

    def check_batches(self, training: Training) -> None:
        """Raise ValueError unless the global batch can be dealt out to all workers in whole micro-batches.

        Of a range of workers, most is a number that it must be possible to deal out to evenly; numbers in between make
        do with ranks that wait.
        """
        per_pass = training.micro_batch_size * self.cluster.max_workers
        if training.global_batch_size % per_pass:
            raise ValueError(
                f"global_batch_size {training.global_batch_size} is not a multiple of micro_batch_size "
                f"{training.micro_batch_size} x {self.cluster.max_workers} workers"
            )

    def check_fidelity(self, training: Training) -> None:
        """Raise ValueError unless the last stage, trained as `training` says, saves the checkpoints to be measured."""
        if self.fidelity is not None and self.fidelity.every_steps % training.checkpoint_every_steps:
            raise ValueError(
                f"fidelity.every_steps {self.fidelity.every_steps} is not a multiple of "
                f"checkpoint_every_steps {training.checkpoint_every_steps}"
            )
