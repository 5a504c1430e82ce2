"""Features of real images: read from shards in shares that any number of workers can take, kept in a cache."""

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from cluster import storage
from cluster.errors import UserError
from data_shards.decode import ImageError, decode
from data_shards.manifest import Manifest, ShardEntry
from data_shards.reader import ShardReader, encoded_image
from trainers.fidelity.extractors import Extractor, kept_extractor
from trainers.pictures import to_pixels

logger = logging.getLogger(__name__)

SHARE_SIZE = 512  # images; what is lost when a worker dies
BATCH_SIZE = 32


@dataclass(frozen=True)
class Share:
    """Samples [start, stop) of a shard."""

    shard: ShardEntry
    start: int
    stop: int


@dataclass(frozen=True)
class ReferenceFeatures:
    """What an extractor saw of real images, in the manifest's order."""

    keys: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    """All captions of each image."""
    features: NDArray[np.float32]
    """[N, D]"""
    num_left_out: int
    """Images that could not be decoded."""

    @classmethod
    def concatenated(cls, parts: Iterable["ReferenceFeatures"]) -> "ReferenceFeatures":
        parts = list(parts)
        return cls(
            keys=tuple(key for part in parts for key in part.keys),
            captions=tuple(caption for part in parts for caption in part.captions),
            features=np.concatenate([part.features for part in parts]),
            num_left_out=sum(part.num_left_out for part in parts),
        )


ExtractShares = Callable[[Sequence[Share]], Iterable[ReferenceFeatures]]
"""Runs extract_share on each share, wherever; results come in the shares' order."""


def reference_features(
    shards_uri: str,
    splits: Sequence[str],
    extractor: Extractor,
    *,
    resolution: int,
    cache: str | None,
    batch_size: int = BATCH_SIZE,
    extract_shares: ExtractShares | None = None,
) -> ReferenceFeatures:
    """Features of all images of `splits`, brought to `resolution` as for training.

    Kept below `cache`, a folder or s3:// prefix, under a digest of data, splits, resolution and extractor; what is
    found there is checked, and computed again if it is damaged. By default computed here, one batch of pixels in
    memory at a time. Raises UserError if the shards hold no images, or a split none that can be decoded.
    """
    manifest = Manifest.load(shards_uri)
    place = cache and storage.join(
        cache, f"{_digest(manifest, splits, extractor.record.digest, resolution)}.safetensors"
    )
    found = _cached(place) if place else None
    if found:
        return found

    def extract_here(shares: Sequence[Share]) -> Iterator[ReferenceFeatures]:
        for share in shares:
            yield extract_share(share, extractor, shards_uri=shards_uri, resolution=resolution, batch_size=batch_size)

    extract = extract_shares or extract_here
    features = ReferenceFeatures.concatenated(extract(shares_of(shards_uri, manifest, splits)))
    if not features.keys:
        raise UserError(f"no image can be read from splits {', '.join(splits)} of {shards_uri}: are these images?")
    if place:
        _keep(features, place)
    return features


def shares_of(shards_uri: str, manifest: Manifest, splits: Sequence[str]) -> list[Share]:
    """All samples of `splits` in the manifest's order. Raises UserError if there is no such split, or are no images."""
    if manifest.precomputed:
        raise UserError(
            f"{shards_uri} holds latents, not images: name the shards that it was precomputed from "
            f"(their digest is {manifest.precomputed.source_digest[:12]}…)"
        )
    return [
        Share(shard, start, min(start + SHARE_SIZE, shard.num_samples))
        for split in splits
        for shard in manifest.split(split)
        for start in range(0, shard.num_samples, SHARE_SIZE)
    ]


def extract_share(
    share: Share, extractor: Extractor, *, shards_uri: str, resolution: int, batch_size: int = BATCH_SIZE
) -> ReferenceFeatures:
    """Features of a share's images, of which `batch_size` are in memory at a time.

    Images that cannot be decoded are left out, with a warning. Raises UserError naming the shard and the sample if
    the bytes are not those of the manifest.
    """
    keys: list[str] = []
    captions: list[tuple[str, ...]] = []
    batches: list[Tensor] = [torch.empty(0, extractor.record.dim)]
    reader = ShardReader(shards_uri)
    for start in range(share.start, share.stop, batch_size):
        images: list[Tensor] = []
        for sample in reader.read(share.shard, start, min(start + batch_size, share.stop)):
            try:
                images.append(decode(encoded_image(sample), resolution))
            except ImageError as error:
                logger.warning("sample %s of %s left out: %s", sample.key, shards_uri, error)
                continue
            keys.append(sample.key)
            captions.append(tuple(sample.captions))
        if images:
            batches.append(extractor.features(to_pixels(torch.stack(images))))
    features = torch.cat(batches).numpy()
    return ReferenceFeatures(tuple(keys), tuple(captions), features, share.stop - share.start - len(keys))


@dataclass(frozen=True)
class ReferenceWorker:
    """Makes a worker that extracts shares, in whichever process it is called."""

    extractor: str
    """URI."""
    device: str
    shards_uri: str
    resolution: int

    def __call__(self) -> Callable[[Share], ReferenceFeatures]:
        extractor = kept_extractor(self.extractor, self.device)
        return partial(extract_share, extractor=extractor, shards_uri=self.shards_uri, resolution=self.resolution)


# --- the cache: one file, so that it is whole or not there ---


def _digest(manifest: Manifest, splits: Sequence[str], extractor_digest: str, resolution: int) -> str:
    made_of = [manifest.digest, list(splits), extractor_digest, resolution]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def _keep(found: ReferenceFeatures, place: str) -> None:
    about = json.dumps([found.keys, found.captions, found.num_left_out]).encode()
    # As tensors, for a header of safetensors may not hold so much text.
    tensors = {
        "features": torch.from_numpy(found.features),
        "about": torch.frombuffer(bytearray(about), dtype=torch.uint8),
    }
    tensors["sha256"] = _sha256(tensors)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "features.safetensors"
        safetensors.torch.save_file(tensors, path)
        storage.upload_file(path, place)


def _cached(place: str) -> ReferenceFeatures | None:
    try:
        tensors = safetensors.torch.load(storage.read_bytes(place))
        if not torch.equal(tensors.pop("sha256"), _sha256(tensors)):
            raise ValueError("its checksum is another")
        keys, captions, num_left_out = json.loads(tensors["about"].numpy().tobytes())
    except storage.NotFoundError:
        return None
    except (SafetensorError, ValueError, KeyError) as error:
        logger.warning("features at %s are damaged and computed again: %s", place, error)
        return None
    return ReferenceFeatures(tuple(keys), tuple(map(tuple, captions)), tensors["features"].numpy(), num_left_out)


def _sha256(tensors: dict[str, Tensor]) -> Tensor:
    digest = hashlib.sha256()
    for name in ("features", "about"):
        digest.update(tensors[name].contiguous().view(-1).numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
