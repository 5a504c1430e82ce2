"""What travels: a record before writing, a batch after reading, and the source of all randomness."""

import hashlib
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Record:
    """One image with its captions, as a source names it; the image has not been opened yet."""

    source_id: str
    """The image's file name in its data set; the ending may be missing."""
    folder: str
    """Folder or s3:// prefix of the images."""
    captions: tuple[str, ...]
    group: str | None = None
    """Patient, video or the like: one group never crosses splits. None: a group of its own."""
    licence: str | None = None
    split: str | None = None
    """The split that the data set itself puts this image in, if it does."""


@dataclass(frozen=True)
class Batch:
    """Decoded samples, in the order of the plan."""

    images: Tensor
    """float32 [B, 3, H, W] in [-1, 1]."""
    captions: list[str]
    """One for each sample, drawn from its captions."""
    keys: list[str]
    """Names of the samples, unique in their set of shards."""
    flipped: list[bool]
    """Which images are mirrored."""
    seeds: list[int]
    """A 63-bit seed for each sample and epoch, from which all its random draws follow."""


def derive_seed(*parts: int | str) -> int:
    """A well-mixed 63-bit seed from `parts`: the only source of randomness in a run.

    Seeds of different parts are unrelated, so 'noise' of sample 3 tells nothing of 'timestep' of sample 4.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
