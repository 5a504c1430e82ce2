"""The manifest: what is in a set of shards, and how to know that it still is.

It says what each shard is; where each sample is, an index beside the shard says, so that a manifest of ten thousand
shards is a few megabytes however many samples they hold.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster import storage
from cluster.documents import read_small
from cluster.errors import UserError, nearest

MANIFEST = "manifest.json"
MAX_BYTES = 2**30  # for the manifest some million shards, for an index some ten million samples
FileName = Annotated[str, Field(pattern=r"^[^./\\\x00][^/\\\x00]*$")]
"""Of a file beside the document that names it: what it says is read, and at times deleted."""


Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""Of a file, which blocks of it in a cache are named by."""


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
    num_samples: int = Field(gt=0)
    num_bytes: int
    sha256: Sha256
    index_sha256: str

    @property
    def index_name(self) -> str:
        return index_name(self.name)


def index_name(shard_name: str) -> str:
    return f"{shard_name}.index.json"


class ShardIndex(BaseModel):
    """Where the samples of a shard are. Written after the shard, so a shard with an index is whole."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    made_of: str
    """Digest of what the shard was made of: one made of the same need not be written again."""
    num_bytes: int
    sha256: str
    """Of the shard."""
    samples: tuple[SampleEntry, ...]

    @model_validator(mode="after")
    def _samples_lie_within(self) -> Self:
        end = 0
        for sample in self.samples:
            if sample.offset < end or sample.length <= 0 or sample.offset + sample.length > self.num_bytes:
                raise ValueError(f"sample '{sample.key}' lies outside its shard")
            end = sample.offset + sample.length
        return self

    def save(self, shards_uri: str, *, name: str, split: str) -> ShardEntry:
        """Write it beside the shard `name`, and describe that shard for the manifest."""
        data = self._encoded()
        storage.write_bytes(storage.join(shards_uri, index_name(name)), data)
        return self._entry(data, name, split)

    def _encoded(self) -> bytes:
        return self.model_dump_json().encode()

    def _entry(self, data: bytes, name: str, split: str) -> ShardEntry:
        return ShardEntry(
            name=name,
            split=split,
            num_samples=len(self.samples),
            num_bytes=self.num_bytes,
            sha256=self.sha256,
            index_sha256=hashlib.sha256(data).hexdigest(),
        )

    @classmethod
    def finished(cls, shards_uri: str, *, name: str, split: str, made_of: str) -> ShardEntry | None:
        """The shard `name` if it is there, whole, and made of the same."""
        try:
            data = read_small(storage.join(shards_uri, index_name(name)), MAX_BYTES)
            index = cls.model_validate_json(data)
            is_same = index.made_of == made_of and storage.size(storage.join(shards_uri, name)) == index.num_bytes
        except (storage.NotFoundError, ValidationError):
            return None
        return index._entry(data, name, split) if is_same else None


def read_index(shards_uri: str, shard: ShardEntry) -> tuple[SampleEntry, ...]:
    """Where the samples of a shard are. Raises UserError if its index is missing or not the manifest's."""
    uri = storage.join(shards_uri, shard.index_name)
    data = read_small(uri, MAX_BYTES)
    if (found := hashlib.sha256(data).hexdigest()) != shard.index_sha256:
        raise UserError(
            f"{uri} is damaged: SHA-256 {found}, the manifest says {shard.index_sha256}; write the shards again, or "
            "fetch them again"
        )
    try:
        index = ShardIndex.model_validate_json(data)
    except ValidationError as error:
        raise UserError(f"{uri} is not an index of samples: {error.errors()[0]['msg']}") from None
    if (len(index.samples), index.num_bytes) != (shard.num_samples, shard.num_bytes):
        raise UserError(f"{uri} describes another shard than the manifest does: write the shards again")
    return index.samples


def check_present(shards_uri: str, shards: Sequence[ShardEntry]) -> None:
    """Raises UserError if a shard is not there, or not as long as it was. One listing, no request a shard."""
    found = storage.list_sizes(shards_uri)
    for shard in shards:
        if (size := found.get(shard.name)) is None:
            raise UserError(f"{storage.join(shards_uri, shard.name)} is missing: write the shards again, or fetch it")
        if size != shard.num_bytes:
            raise UserError(
                f"{storage.join(shards_uri, shard.name)} has {size} bytes, the manifest says {shard.num_bytes}: "
                "write the shards again, or fetch it again"
            )


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

    format_version: Literal[2] = 2
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
            raise UserError(
                f"{uri} is damaged or of another version: {where}: {problem['msg']}; remove it and write the shards "
                "again"
            ) from None

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
