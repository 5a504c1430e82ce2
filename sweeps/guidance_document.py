"""What a guidance sweep found, as a document: SWEEP/sweep.json."""

from typing import Any, Literal

from cluster import storage
from cluster.errors import UserError
from trainers.fidelity.evaluation import ExtractorRecord, Measure, ModelRecord, Record, Reference, SampleRecord

SWEEP, FRONT, GRID = "sweep.json", "front.png", "grid.png"


class SettingResult(Record):
    """What was found with one setting."""

    name: str
    """Of its folder below settings/."""
    setting: dict[str, Any]
    measures: dict[str, Measure]
    seconds_per_image: float


class GuidanceSweep(Record):
    """The document of a sweep."""

    format_version: Literal[1] = 1
    created: str
    """ISO 8601, UTC."""
    medsynth_version: str
    git_commit: str
    model: ModelRecord
    pinned_model: str
    """Its URI with the version, where it was named by an alias."""
    reference: Reference
    seed: int
    images_per_prompt: int
    batch_size: int
    resolution: int
    device: str
    extractors: dict[str, ExtractorRecord]
    samples: tuple[SampleRecord, ...]
    """Drawn with every setting."""
    fidelity: str
    """Name of the measure that the front has beside alignment."""
    alignment: str
    settings: tuple[SettingResult, ...]
    front: tuple[str, ...]
    """Names of the settings that no other one beats in both, the most faithful first."""
    recommended: str
    rule: str
    """How that one was chosen."""

    @classmethod
    def load(cls, folder: str) -> "GuidanceSweep":
        """Read a sweep's document. Raises UserError if there is none or it is damaged."""
        uri = storage.join(folder, SWEEP)
        try:
            document = storage.read_bytes(uri)
        except storage.NotFoundError:
            raise UserError(f"no guidance sweep at {folder}: {SWEEP} is not there") from None
        return cls.parse(document, uri)

    def result(self, name: str) -> SettingResult:
        return next(result for result in self.settings if result.name == name)

    @property
    def best(self) -> SettingResult:
        """The recommended setting's."""
        return self.result(self.recommended)
