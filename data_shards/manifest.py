"""The manifest: what is in a set of shards, and how to know that it still is."""

import hashlib
import json
from functools import cached_property
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster import storage
from cluster.documents import read_small
from cluster.errors import UserError, nearest

MANIFEST = "manifest.json"
MAX_BYTES = 2**30  # some ten million samples
FileName = Annotated[str, Field(pattern=r"^[^./\\\x00][^/\\\x00]*$")]
"""Of a file beside the document that names it: what it says is read, and at times deleted."""


class SampleEntry(NamedTuple):
    """Where one sample is in its shard: the bytes of all its members, tar headers included."""

    key: str
    offset: int
    length: int
    crc32: int


class ShardEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: FileName
    split: str
    num_bytes: int
    sha256: str
    samples: tuple[SampleEntry, ...]

    @model_validator(mode="after")
    def _samples_lie_within(self) -> Self:
        for sample in self.samples:
            if sample.offset < 0 or sample.length <= 0 or sample.offset + sample.length > self.num_bytes:
                raise ValueError(f"sample '{sample.key}' lies outside its shard")
        return self

    @property
    def num_samples(self) -> int:
        return len(self.samples)


class Precomputed(BaseModel):
    """What a set of encoder outputs was made of. If any of it changes, the set is stale."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source_digest: str
    """Digest of the shards of images, whose samples and order this set keeps."""
    components: dict[str, str]
    """Digests of the VAE, the text encoders and the tokenizers, by their names in the diffusers layout."""
    resolution: int
    max_tokens: int
    horizontal_flip: bool
    """Whether each image's mirror image was encoded too."""
    dtypes: dict[str, str]
    """How moments and prompt embeddings are stored, and in what the text encoders computed."""


class Manifest(BaseModel):
    """Written last, so shards with a manifest are whole."""

    model_config = ConfigDict(extra="forbid", frozen=True, ignored_types=(cached_property,))

    format_version: Literal[1] = 1
    name: str
    source: dict[str, str]
    """Format, place and settings that the shards were made from."""
    split_rule: str
    groups: dict[str, int]
    """Number of groups in each split."""
    captions: dict[str, int]
    """Number of captions in each split."""
    licences: dict[str, int]
    """Number of samples under each licence."""
    quarantined: dict[str, int]
    """Number of inputs left out, by reason; each is named in quarantine.jsonl."""
    conversions: dict[str, int]
    """Number of images that were converted, by what they had been."""
    near_duplicates: dict[str, int] = {}
    """Number of samples of one split with a near-duplicate in another, as `test-train`; duplicates.jsonl names them."""
    shards: tuple[ShardEntry, ...]
    precomputed: Precomputed | None = None
    """Present if the shards hold latent moments instead of images."""

    @classmethod
    def load(cls, shards_uri: str) -> "Manifest":
        """Read the manifest of the shards at `shards_uri`. Raises UserError if it is missing or damaged."""
        uri = storage.join(shards_uri, MANIFEST)
        try:
            return cls.model_validate_json(read_small(uri, MAX_BYTES))
        except storage.NotFoundError:
            raise UserError(
                f"no shards at {shards_uri}: {MANIFEST} is not there; write them with 'medsynth shards write'"
            ) from None
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise UserError(f"{uri} is damaged or of another version: {where}: {problem['msg']}") from None

    def save(self, shards_uri: str) -> None:
        storage.write_bytes(storage.join(shards_uri, MANIFEST), self.model_dump_json(indent=1).encode())

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the shards' names, splits and SHA-256: equal for equal samples in equal order."""
        content = [[shard.name, shard.split, shard.sha256] for shard in self.shards]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def order_digest(self) -> str:
        """What the order of samples follows from: a precomputed set is read in the order of its source."""
        return self.precomputed.source_digest if self.precomputed else self.digest

    @property
    def splits(self) -> list[str]:
        return list(dict.fromkeys(shard.split for shard in self.shards))

    def split(self, name: str) -> list[ShardEntry]:
        """The shards of a split, in order. Raises UserError if the split is empty or unknown."""
        shards = [shard for shard in self.shards if shard.split == name]
        if not shards:
            guess = nearest(name, self.splits)
            hint = f"; did you mean '{guess}'?" if guess else ""
            raise UserError(f"shards '{self.name}' have no split '{name}', only {', '.join(self.splits)}{hint}")
        return shards
