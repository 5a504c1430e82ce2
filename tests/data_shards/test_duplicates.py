"""Near-duplicates: copies are found however they were stored, other images are not, and nothing is missed."""

import io
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from typer.testing import CliRunner

from data_shards import Manifest, Settings, write_shards
from data_shards.cli import app
from data_shards.duplicates import NEAR_LONG, NEAR_SHORT, Duplicate, find_duplicates, perceptual_hash
from data_shards.sources import medvqa_records, roco_records
from tests.conftest import DATA


def bits(data: bytes) -> np.ndarray:
    return np.unpackbits(np.frombuffer(data, np.uint8))


def distances(one: bytes, other: bytes) -> tuple[int, int]:
    differ = bits(one) != bits(other)
    return int(differ[:64].sum()), int(differ[64:].sum())


def is_near(one: bytes, other: bytes) -> bool:
    short, long = distances(one, other)
    return short <= NEAR_SHORT and long <= NEAR_LONG


@pytest.fixture(scope="module")
def images() -> list[tuple[str, Image.Image]]:
    """(group, image): radiographs and every tenth of the frames."""
    records = [*roco_records(str(DATA / "radiology")), *list(medvqa_records(str(DATA / "colonoscopy")))[::10]]
    endings = ("", ".jpg")
    paths = [next(p for e in endings if (p := Path(f"{r.folder}/{r.source_id}{e}")).is_file()) for r in records]
    return [(record.group or "", Image.open(path).convert("RGB")) for record, path in zip(records, paths, strict=True)]


@pytest.fixture(scope="module")
def hashes(images: list[tuple[str, Image.Image]]) -> list[bytes]:
    return [perceptual_hash(image) for _, image in images]


def test_the_hash_is_that_of_the_cosine_transform_by_its_definition(images: list[tuple[str, Image.Image]]) -> None:
    for _, image in images[::20]:
        grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS, reducing_gap=3.0), np.float64)
        frequencies = np.zeros((16, 16))
        for v, u in itertools.product(range(16), repeat=2):
            down = np.array([math.cos(math.pi * (2 * y + 1) * v / 64) for y in range(32)])
            across = np.array([math.cos(math.pi * (2 * x + 1) * u / 64) for x in range(32)])
            scale = (math.sqrt(0.5) if v == 0 else 1) * (math.sqrt(0.5) if u == 0 else 1) / 16
            frequencies[v, u] = scale * float(down @ grey @ across)
        expected = [
            value > float(np.median(frequencies[:side, :side]))
            for side in (8, 16)
            for value in frequencies[:side, :side].ravel()
        ]
        assert bits(perceptual_hash(image)).astype(bool).tolist() == expected


def stored_as_jpeg(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=30)
    return Image.open(file)


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS),
    "made square": lambda image: image.resize((224, 224)),
    "JPEG of quality 30": stored_as_jpeg,
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.85),
}


@pytest.mark.parametrize("kind", COPIES)
def test_copies_are_found(images: list[tuple[str, Image.Image]], hashes: list[bytes], kind: str) -> None:
    copies = [perceptual_hash(COPIES[kind](image)) for _, image in images]
    found = sum(is_near(copy, original) for copy, original in zip(copies, hashes, strict=True))
    assert found >= 0.98 * len(images) > 90


def test_images_of_other_patients_are_not_taken_for_copies(
    images: list[tuple[str, Image.Image]], hashes: list[bytes]
) -> None:
    pairs = [
        distances(one, other)
        for ((group, _), one), ((other_group, _), other) in itertools.combinations(zip(images, hashes, strict=True), 2)
        if group != other_group
    ]
    assert len(pairs) > 5000
    assert not [pair for pair in pairs if pair[0] <= NEAR_SHORT and pair[1] <= NEAR_LONG]
    assert min(long for _, long in pairs) > NEAR_LONG + 8  # far from the limit, not just beyond it


def test_nothing_is_missed_that_comparing_all_pairs_finds() -> None:
    rng = np.random.default_rng(0)
    seeds = rng.integers(0, 256, (40, 40), dtype=np.uint8)
    noisy = np.unpackbits(np.repeat(seeds, 12, axis=0), axis=1)
    flips = np.concatenate([rng.random((480, 64)) < 0.05, rng.random((480, 256)) < 0.07], axis=1)
    hashes = [row.tobytes() for row in np.packbits(noisy ^ flips, axis=1)]
    splits = [str(split) for split in rng.choice(["train", "validation", "test"], 480, p=[0.7, 0.2, 0.1])]
    keys = [f"k{number:03d}" for number in range(480)]

    size = {split: splits.count(split) for split in splits}
    expected = []
    for number in range(480):
        for other_split in {"train", "validation", "test"} - {splits[number]}:
            if (size[splits[number]], splits[number]) < (size[other_split], other_split):
                near = [
                    (distances(hashes[number], hashes[other])[0], keys[other])
                    for other in range(480)
                    if splits[other] == other_split and is_near(hashes[number], hashes[other])
                ]
                if near:
                    bits_of_nearest, key = min(near)
                    expected.append(Duplicate(keys[number], splits[number], key, other_split, bits_of_nearest))
    assert len(expected) > 50
    assert find_duplicates(keys, splits, hashes) == sorted(expected, key=lambda d: (d.split, d.other_split, d.key))


def test_thousands_of_equal_images_take_no_time() -> None:
    count = 20_000
    keys, splits = [f"{n:05d}" for n in range(count)], ["test", "train", "train", "train"] * (count // 4)
    found = find_duplicates(keys, splits, [bytes(40)] * count)
    assert len(found) == count // 4
    assert {duplicate.other_key for duplicate in found} == {"00001"}


def test_one_split_has_no_duplicates_across_splits() -> None:
    assert find_duplicates(["a", "b"], ["train", "train"], [bytes(40)] * 2) == []


def test_what_leaks_is_counted_named_and_said(small_source: Path, tmp_path: Path) -> None:
    """A copy in another split, exact or reduced, and none within one."""
    folder = tmp_path / "source"
    folder.mkdir()
    real = sorted((small_source / "images").iterdir())[:4]
    lines = ["image,caption,split"]
    for path, split in zip(real, ("train", "train", "test", "validation"), strict=True):
        (folder / path.name).write_bytes(path.read_bytes())
        lines.append(f"{path.name},a polyp,{split}")
    (folder / "exact.jpg").write_bytes(real[0].read_bytes())
    Image.open(real[1]).resize((170, 170)).save(folder / "reduced.png")
    Image.open(real[1]).save(folder / "within.png")
    lines += ["exact.jpg,a polyp,test", "reduced.png,a polyp,test", "within.png,a polyp,train"]
    (folder / "t.csv").write_text("\n".join(lines))
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["write", str(folder / "t.csv"), "--split-column", "split", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert Manifest.load(str(out)).near_duplicates == {"test-train": 2}
    exact, reduced = [json.loads(line) for line in (out / "duplicates.jsonl").read_text().splitlines()]
    assert exact == asdict(Duplicate("exact", "test", real[0].stem, "train", 0))
    assert (reduced["key"], reduced["other_key"]) == ("reduced", min(real[1].stem, "within"))
    assert "Near-duplicates across splits: test-train 2." in result.output
    assert "--group-column" in result.output


def test_real_sets_split_by_group_have_none(small_source: Path, tmp_path: Path) -> None:
    settings = Settings("set", {"train": 0.6, "test": 0.4})
    manifest = write_shards(medvqa_records(str(small_source)), str(tmp_path / "out"), settings, source={"uri": "x"})
    assert manifest.near_duplicates == {}
    assert (tmp_path / "out" / "duplicates.jsonl").read_bytes() == b""
