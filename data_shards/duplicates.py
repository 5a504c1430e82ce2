"""Near-duplicates across splits: a picture stored anew, reduced or brightened, which leaks from one split to another.

image -> two perceptual hashes -> pairs of other splits that share a band of the short one and are near in both
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image
from scipy.fft import dctn

SIDE = 32
SHORT, LONG = 8, 16  # lowest frequencies each way: hashes of 64 and of 256 bits
NEAR_SHORT, NEAR_LONG = 4, 32
"""Bits that may differ. docs/data.md says what was measured: copies lie within, all other pairs far beyond."""
PAIRS_AT_ONCE = 2**22


@dataclass(frozen=True)
class Duplicate:
    """A sample and the one of another split that is most like it."""

    key: str
    split: str
    other_key: str
    other_split: str
    distance: int
    """Bits of 64 that differ."""


def perceptual_hash(image: Image.Image) -> bytes:
    """Two hashes, of 64 and of 256 bits, that stay nearly the same when an image is stored anew, resized or brightened.

    Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions" (2010), 3.2.1: grey, reduced to
    32 x 32, discrete cosine transform (DCT-II), and of its lowest frequencies which lie above their median.
    """
    grey = image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    frequencies = np.round(dctn(np.asarray(grey, dtype=np.float64), norm="ortho"), 6)  # or a flat image's are noise
    return b"".join(_bits(frequencies[:side, :side]) for side in (SHORT, LONG))


def _bits(frequencies: np.ndarray) -> bytes:
    return np.packbits(frequencies > np.median(frequencies)).tobytes()


def find_duplicates(keys: Sequence[str], splits: Sequence[str], hashes: Sequence[bytes]) -> list[Duplicate]:
    """For each two splits, the samples of the smaller one that have a near-duplicate in the other, with the nearest."""
    if len(set(splits)) < 2:
        return []
    # Equal hashes of one split are looked at once: a thousand black frames would be a million pairs.
    alike: dict[tuple[str, bytes], list[int]] = {}
    for number, what in enumerate(zip(splits, hashes, strict=True)):
        alike.setdefault(what, []).append(number)
    groups = list(alike.values())
    sizes = {split: splits.count(split) for split in set(splits)}
    nearest: dict[tuple[int, str], tuple[int, str, str]] = {}  # of a sample and another split
    for first, second, distance in _pairs([split for split, _ in alike], [digest for _, digest in alike]):
        one, other = groups[first], groups[second]
        if _rank(splits[one[0]], sizes) > _rank(splits[other[0]], sizes):
            one, other = other, one
        found = (distance, min(keys[number] for number in other), splits[other[0]])
        for number in one:
            nearest[number, found[2]] = min(nearest.get((number, found[2]), found), found)
    duplicates = [Duplicate(keys[n], splits[n], key, split, bits) for (n, _), (bits, key, split) in nearest.items()]
    return sorted(duplicates, key=lambda found: (found.split, found.other_split, found.key))


def _rank(split: str, sizes: dict[str, int]) -> tuple[int, str]:
    return sizes[split], split


def _pairs(splits: Sequence[str], hashes: Sequence[bytes]) -> Iterator[tuple[int, int, int]]:
    """(first, second, distance) of the pairs of different splits that are near.

    Two hashes that differ in NEAR_SHORT bits at most are equal in one of NEAR_SHORT + 1 bands of bits at least, so only
    those that share a band are compared.
    """
    words = np.frombuffer(b"".join(hashes), dtype=">u8").reshape(len(hashes), -1).astype(np.uint64)
    of_split = np.unique(np.array(splits), return_inverse=True)[1]
    edges = np.linspace(0, SHORT * SHORT, NEAR_SHORT + 2).astype(int)
    seen = np.zeros(0, dtype=np.int64)
    for low, high in pairwise(edges):
        band = (words[:, 0] >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        for same in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
            rows = max(1, PAIRS_AT_ONCE // len(same))
            for start in range(0, len(same) if len(same) > 1 else 0, rows):
                part = same[start : start + rows]
                near = np.bitwise_count(words[part, None, 0] ^ words[None, same, 0]) <= NEAR_SHORT
                near &= of_split[part, None] < of_split[None, same]
                first, second = part[near.nonzero()[0]], same[near.nonzero()[1]]
                is_near = np.bitwise_count(words[first, 1:] ^ words[second, 1:]).sum(axis=1) <= NEAR_LONG
                seen = np.append(seen, first[is_near] * len(hashes) + second[is_near])
    for pair in np.unique(seen).tolist():
        first, second = divmod(pair, len(hashes))
        yield first, second, int(np.bitwise_count(words[first, 0] ^ words[second, 0]))
