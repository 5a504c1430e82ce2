"""What travels: a record before writing, a batch after reading, and the source of all randomness."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # records are read without torch, which takes seconds to import
    from torch import Tensor

# Members of a sample by their ending, after KEY and a dot. Precomputed members are NumPy arrays of float32 [2C, h, w],
# which WebDataset's own decoder reads.
IMAGE_MEMBERS = ("jpg", "png")
ABOUT_MEMBER = "json"
MOMENTS_MEMBER = "moments.npy"
MIRRORED_MOMENTS_MEMBER = "mirrored.npy"


@dataclass(frozen=True)
class Record:
    """One image with its captions, as a source names it; the image has not been opened yet."""

    source_id: str
    """The image's file name in its data set; the ending may be missing."""
    folder: str
    """Folder or s3:// prefix of the images; with `part`, the one file that holds them."""
    captions: tuple[str, ...]
    group: str | None = None
    """Patient, video or the like: one group never crosses splits. None: a group of its own."""
    licence: str | None = None
    split: str | None = None
    """The split that the data set itself puts this image in, if it does."""
    part: tuple[int, int] | None = None
    """(offset, length) of the image's bytes in its file; None: the whole file `source_id` in `folder`."""
    fault: str | None = None
    """Why its source gives it up: its kind, a colon, and the particulars."""


@dataclass(frozen=True)
class Batch:
    """Decoded samples, in the order of the plan."""

    inputs: "Tensor"
    """float32 [B, ...]: `images` of plain shards, `moments` of a precomputed set."""
    captions: list[str]
    """One for each sample, drawn from its captions."""
    keys: list[str]
    """Names of the samples, unique in their set of shards."""
    flipped: list[bool]
    """Which images are mirrored."""
    seeds: list[int]
    """A 63-bit seed for each sample and epoch, from which all its random draws follow."""
    is_precomputed: bool = False
    prompts: Mapping[str, "Tensor"] = field(default_factory=dict)
    """Of a precomputed set, the embeddings of the captions, bfloat16 [B, ...] by name."""
    weight: float = 1.0
    """What its mean loss counts for in its rank's sum, whose mean over ranks is the mean over the global batch; 0 for
    one that only keeps step with ranks that have more."""

    @property
    def images(self) -> "Tensor":
        """float32 [B, 3, H, W] in [-1, 1]."""
        assert not self.is_precomputed, "a precomputed set holds no images, only their moments"
        return self.inputs

    @property
    def moments(self) -> "Tensor":
        """float32 [B, 2C, h, w]: the VAE posterior's means, then its log-variances."""
        assert self.is_precomputed, "plain shards hold no moments: precompute them"
        return self.inputs


def derive_seed(*parts: int | str) -> int:
    """A well-mixed 63-bit seed from `parts`: the only source of randomness in a run.

    Seeds of different parts are unrelated, so 'noise' of sample 3 tells nothing of 'timestep' of sample 4.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
