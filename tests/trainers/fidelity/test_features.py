"""Features of real images: in the manifest's order, computed once, whoever computes them, and never half."""

import logging
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cluster import storage
from cluster.errors import UserError
from data_shards import Manifest, ShardStream
from data_shards.manifest import read_index
from tests.data_shards.test_stream import shards_with_an_undecodable_sample
from trainers.fidelity import features as features_module
from trainers.fidelity.encoders import ImageEncoder
from trainers.fidelity.evaluation import ExtractorRecord
from trainers.fidelity.extractors import Extractor
from trainers.fidelity.features import (
    ReferenceFeatures,
    Share,
    extract_share,
    reference_features,
    shares_of,
)
from trainers.fidelity.preprocessing import SquareResize

RESOLUTION = 16
SPLITS = ("train", "validation")


class MeanColours(ImageEncoder):
    """Mean colours of the four quarters; notes the sizes of its batches."""

    dim = 12

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.batch_sizes: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.batch_sizes.append(len(images))
        pooled: Tensor = self.pool(images)
        return pooled.flatten(1)


@dataclass
class Counting:
    """An extractor and what it was asked for."""

    digest: str = "d"
    network: MeanColours = field(default_factory=MeanColours)

    @property
    def extractor(self) -> Extractor:
        resize = SquareResize(RESOLUTION, mean=(127.5,) * 3, std=(127.5,) * 3)
        record = ExtractorRecord(uri="mean-colours", digest=self.digest, dim=12, resize=resize.resize)
        return Extractor("mean_colours", record, self.network, resize, "cpu")


@pytest.fixture
def counting() -> Counting:
    return Counting()


def extract(shards: str, extractor: Extractor, cache: str | None = None, **settings: object) -> ReferenceFeatures:
    return reference_features(shards, SPLITS, extractor, resolution=RESOLUTION, cache=cache, **settings)  # type: ignore[arg-type]


def assert_same(found: ReferenceFeatures, expected: ReferenceFeatures) -> None:
    assert (found.keys, found.captions, found.num_left_out) == (
        expected.keys,
        expected.captions,
        expected.num_left_out,
    )
    np.testing.assert_array_equal(found.features, expected.features)


def test_features_are_of_the_images_that_training_sees_in_the_manifests_order(shards: str, counting: Counting) -> None:
    found = extract(shards, counting.extractor, batch_size=3)
    manifest = Manifest.load(shards)
    entries = [entry for split in SPLITS for shard in manifest.split(split) for entry in read_index(shards, shard)]
    assert found.keys == tuple(entry.key for entry in entries)
    assert found.features.dtype == np.float32
    assert max(counting.network.batch_sizes) == 3, "no more pixels in memory than one batch"
    batches = [batch for split in SPLITS for batch in one_pass(shards, split)]
    images = torch.cat([images for _, images in batches])
    assert found.keys == tuple(key for keys, _ in batches for key in keys)
    with torch.inference_mode():
        np.testing.assert_allclose(found.features, MeanColours()(images).numpy(), atol=1e-5)


def one_pass(shards: str, split: str) -> list[tuple[list[str], Tensor]]:
    stream = ShardStream(
        shards,
        split=split,
        resolution=RESOLUTION,
        global_batch_size=1,
        micro_batch_size=1,
        seed=0,
        rank=0,
        world_size=1,
    )
    return [(batch.keys, batch.images) for batch in stream.one_pass(4)]


def test_shares_put_together_are_the_whole_whoever_takes_them(
    shards: str, counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = extract(shards, counting.extractor)
    monkeypatch.setattr(features_module, "SHARE_SIZE", 2)
    shares = shares_of(shards, Manifest.load(shards), SPLITS)
    assert len(shares) > len({share.shard.name for share in shares}), "shards are divided"

    def by_workers(shares: Sequence[Share]) -> Iterable[ReferenceFeatures]:
        done = {
            number: extract_share(share, Counting().extractor, shards_uri=shards, resolution=RESOLUTION)
            for number, share in reversed(list(enumerate(pickle.loads(pickle.dumps(shares)))))
        }
        return [done[number] for number in range(len(shares))]

    assert_same(extract(shards, counting.extractor, extract_shares=by_workers), whole)


@pytest.mark.parametrize("place", ["folder", "s3"])
def test_the_real_set_is_computed_once(
    place: str, shards: str, counting: Counting, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    cache = str(tmp_path / "cache") if place == "folder" else f"{request.getfixturevalue('bucket')}/cache"
    first = extract(shards, counting.extractor, cache)
    computed = len(counting.network.batch_sizes)
    assert_same(extract(shards, counting.extractor, cache), first)
    assert len(counting.network.batch_sizes) == computed
    assert len(storage.list_files(cache)) == 1


def test_what_features_depend_on_tells_them_apart(shards: str, counting: Counting, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    extract(shards, counting.extractor, cache)
    extract(shards, Counting(digest="other").extractor, cache)
    reference_features(shards, ("train",), counting.extractor, resolution=RESOLUTION, cache=cache)
    reference_features(shards, SPLITS, counting.extractor, resolution=8, cache=cache)
    assert len(storage.list_files(cache)) == 4


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign"])
def test_a_damaged_cache_is_computed_again_with_a_notice(
    damage: str, shards: str, counting: Counting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    first = extract(shards, counting.extractor, str(cache))
    (file,) = cache.iterdir()
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    damaged = {"truncated": bytes(data[:-20]), "flipped": bytes(data), "foreign": b"not a file of tensors"}
    file.write_bytes(damaged[damage])
    with caplog.at_level(logging.WARNING):
        assert_same(extract(shards, counting.extractor, str(cache)), first)
    assert f"{file} are damaged and computed again" in caplog.text
    assert file.read_bytes() not in damaged.values()


def test_an_extraction_that_fails_leaves_nothing_in_the_cache(shards: str, counting: Counting, tmp_path: Path) -> None:
    def dies(shares: Sequence[Share]) -> Iterable[ReferenceFeatures]:
        yield extract_share(shares[0], counting.extractor, shards_uri=shards, resolution=RESOLUTION)
        raise RuntimeError("worker lost")

    with pytest.raises(RuntimeError, match="worker lost"):
        extract(shards, counting.extractor, str(tmp_path / "cache"), extract_shares=dies)
    assert storage.list_files(str(tmp_path)) == []


def test_an_image_that_cannot_be_decoded_is_left_out_and_counted(tmp_path: Path, counting: Counting) -> None:
    shards = shards_with_an_undecodable_sample(tmp_path)
    found = reference_features(
        shards, ("train",), counting.extractor, resolution=RESOLUTION, cache=str(tmp_path / "cache"), batch_size=1
    )
    assert found.num_left_out == 1
    assert len(found.keys) == len(found.captions) == len(found.features) == 7
    assert "bad" not in found.keys
    again = reference_features(
        shards, ("train",), counting.extractor, resolution=RESOLUTION, cache=str(tmp_path / "cache")
    )
    assert_same(again, found)


def test_latents_are_no_reference(precomputed: str, counting: Counting) -> None:
    with pytest.raises(UserError, match=r"holds latents, not images: name the shards that it was precomputed from"):
        extract(precomputed, counting.extractor)


def test_an_unknown_split_is_named(shards: str, counting: Counting) -> None:
    with pytest.raises(UserError, match=r"no split 'trian'.*did you mean 'train'"):
        reference_features(shards, ("trian",), counting.extractor, resolution=RESOLUTION, cache=None)
