"""What an evaluation found, as a document: EVALUATION/evaluation.json.

EVALUATION/evaluation.json     this document; written last, so an evaluation that has it is whole
EVALUATION/samples/            the generated images, 000000.png, ...
EVALUATION/features/           what each extractor saw, in order: LABEL.safetensors, `features` float32 [N, D]
EVALUATION/scores.safetensors  of each sample, float64 [N] by the name of their mean; NaN where it was not judged
EVALUATION/report.html         the page for people
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster import storage
from cluster.errors import UserError

EVALUATION = "evaluation.json"
SCORES = "scores.safetensors"
REPORT = "report.html"
# Metrics published with one extractor bear their plain name only with that one.
STANDARD_EXTRACTORS = {
    "fid": "inception",
    "fid_infinity": "inception",
    "kid": "inception",
    "inception_score": "inception",
    "cmmd": "clip",
    "clip_score": "clip",
}


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def parse(cls, document: str | bytes, uri: str) -> Self:
        """What a document, read at `uri`, holds. Raises UserError if it is damaged."""
        try:
            return cls.model_validate_json(document)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise UserError(f"{uri} is damaged or of another version: {where}: {problem['msg']}") from None


class Measure(Record):
    """One figure, with what it was taken on."""

    value: float
    interval: tuple[float, float] | None = None
    """95 %; none where the metric has no such interval."""
    interval_by: str | None = None
    """How the interval was taken, in a few words."""
    better: Literal["lower", "higher"] | None = None
    chance: float | None = None
    """The value of an honest model, one that learnt the images' distribution and no image by heart, where that is
    known; where neither lower nor higher is better, the best there is."""
    extractor: str | None = None
    """Label of the features, a key of Evaluation.extractors; none where pixels are compared."""
    num_generated: int
    num_real: int = 0
    about: str
    """What it is, in a few words, with its source."""


class ExtractorRecord(Record):
    """What turned images into features."""

    uri: str
    digest: str
    """SHA-256 over weights and preprocessing."""
    dim: int
    resize: str
    """How images are brought to the extractor's size."""


class ModelRecord(Record):
    """What was evaluated."""

    uri: str
    """As the user named it."""
    name: str
    """For headings: the registered model and version, the run, or the folder."""
    digest: str
    """SHA-256 over the model's files; of a folder of images, over its images."""
    family: str | None = None
    """None for a folder of images."""
    num_parameters: int | None = None
    run_id: str | None = None
    """The MLflow run that trained it."""


class Reference(Record):
    """The real images that the generated ones were compared with."""

    shards: str
    name: str
    digest: str
    splits: tuple[str, ...]
    num_images: int
    num_training_images: int
    """Of the train split, in which copies were looked for; 0 if none was."""


class Generation(Record):
    """How the images were drawn."""

    seed: int
    settings: dict[str, Any]
    """guidance_scale, num_inference_steps and what else the model was drawn with."""
    images_per_prompt: int
    batch_size: int
    """Images drawn at a time: another batch size rounds another way."""
    compiled: bool = False
    """Whether the denoiser was: it draws faster, and rounds another way."""
    resolution: int
    device: str
    seconds_per_image: float


class SampleRecord(Record):
    """One generated image: samples/NUMBER.png."""

    prompt: str
    prompt_key: str | None = None
    """Key of the real image whose caption the prompt is."""


class ClassMeasure(Record):
    """Precision and recall among the images of one caption."""

    caption: str
    num_generated: int
    num_real: int
    precision: float
    recall: float


class Neighbour(Record):
    """A generated image and the training image nearest to it."""

    sample: int
    key: str
    """Of the training image."""
    distance: float
    is_suspicious: bool
    """Nearer than real held-out images come to the training set."""


class TrainingCost(Record):
    """What the model took to train, as far as its run tells."""

    gpu_hours: float | None = None
    """Device-hours: ranks x hours."""
    device: str | None = None
    """Of each rank: a GPU's name, or `CPU process`."""
    energy_kwh: float | None = None

    @property
    def is_on_gpus(self) -> bool:
        return self.device is None or not self.device.startswith("CPU")


class Evaluation(Record):
    format_version: Literal[1] = 1
    created: str
    """ISO 8601, UTC."""
    medsynth_version: str
    git_commit: str
    model: ModelRecord
    reference: Reference
    generation: Generation | None = None
    """None for a folder of images."""
    samples: tuple[SampleRecord, ...]
    measures: dict[str, Measure]
    missing: dict[str, str] = {}
    """Why a measure that others have is not there, by its name."""
    classes: tuple[ClassMeasure, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    """The nearest pairs first; at most 64, and every suspicious one of those."""
    extractors: dict[str, ExtractorRecord]
    training: TrainingCost = TrainingCost()

    @classmethod
    def load(cls, folder: str) -> "Evaluation":
        """Read an evaluation's document. Raises UserError if there is none or it is damaged."""
        uri = storage.join(folder, EVALUATION)
        try:
            document = storage.read_bytes(uri)
        except storage.NotFoundError:
            raise UserError(f"no evaluation at {folder}: {EVALUATION} is not there") from None
        return cls.parse(document, uri)

    def save(self, folder: str) -> None:
        storage.write_bytes(storage.join(folder, EVALUATION), self.model_dump_json(indent=1).encode())


def measure_name(metric: str, extractor: str) -> str:
    """`fid` only with the extractor it was published with; else the extractor's label follows: `fid_random_vgg`."""
    return metric if STANDARD_EXTRACTORS.get(metric) == extractor else f"{metric}_{extractor}"


def features_uri(folder: str, label: str) -> str:
    """Where the evaluation in `folder` keeps what an extractor saw in the generated images."""
    return storage.join(folder, "features", f"{label}.safetensors")
