"""The writer: nothing lost, nothing leaked, the same bytes again; and what any WebDataset reader makes of it."""

import io
import json
import os
import re
import shutil
import tarfile
import unicodedata
import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cluster import storage
from cluster.errors import UserError
from data_shards import Manifest, Settings, write_shards, writer
from data_shards.manifest import read_index
from data_shards.names import find, key_of, listing, normal, without_ending
from data_shards.reader import ShardReader
from data_shards.sample import Record, derive_seed
from data_shards.sources import Columns, medvqa_records, roco_records, table_records
from tests.conftest import DATA

EXAMPLES = hypothesis.settings(deadline=None)
NFC, NFD = (unicodedata.normalize(form, "röntgen.png") for form in ("NFC", "NFD"))
PLACES = (("a", "train"), ("b", "test"))
SPLITS = {"train": 0.6, "validation": 0.2, "test": 0.2}


def settings(**changes: Any) -> Settings:
    return replace(Settings(name="set", splits=SPLITS, samples_per_shard=7), **changes)


def write(source: Path, out: str, **changes: Any) -> Manifest:
    options = {name: changes.pop(name) for name in ("overwrite", "num_workers") if name in changes}
    return write_shards(medvqa_records(str(source)), out, settings(**changes), source={"uri": str(source)}, **options)


def files(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def test_every_image_is_in_one_shard_with_all_its_captions(small_source: Path, tmp_path: Path) -> None:
    manifest = write(small_source, str(tmp_path / "out"))
    expected = {record.source_id: record for record in medvqa_records(str(small_source))}
    found = {}
    for shard in manifest.shards:
        with tarfile.open(tmp_path / "out" / shard.name) as tar:
            assert [Path(name).suffix for name in tar.getnames()] == [".jpg", ".json"] * shard.num_samples
            for member in tar.getmembers():
                data = tar.extractfile(member)
                assert data is not None
                if member.name.endswith(".json"):
                    about = json.load(data)
                    assert about["source_id"] not in found
                    found[about["source_id"]] = about
                else:
                    assert data.read() == (small_source / "images" / member.name).read_bytes()
    assert found.keys() == expected.keys()
    assert all(tuple(about["captions"]) == expected[name].captions for name, about in found.items())


def test_any_webdataset_reader_opens_the_shards(small_source: Path, tmp_path: Path) -> None:
    manifest = write(small_source, str(tmp_path / "out"))
    paths = [str(tmp_path / "out" / shard.name) for shard in manifest.split("train")]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode("pil").to_tuple("jpg", "json"))
    assert len(samples) == sum(shard.num_samples for shard in manifest.split("train"))
    assert all(image.size == (352, 352) and about["captions"] for image, about in samples)


def test_offsets_in_the_index_are_those_of_the_tar(small_source: Path, tmp_path: Path) -> None:
    manifest = write(small_source, str(tmp_path / "out"))
    shard = manifest.shards[0]
    data = (tmp_path / "out" / shard.name).read_bytes()
    for entry in read_index(str(tmp_path / "out"), shard):
        part = io.BytesIO(data[entry.offset : entry.offset + entry.length])
        with tarfile.open(fileobj=part) as tar:
            assert {Path(name).stem for name in tar.getnames()} == {entry.key}


def test_a_group_never_crosses_splits(tmp_path: Path) -> None:
    manifest = write_shards(
        roco_records(str(DATA / "radiology")), str(tmp_path / "out"), settings(), source={"uri": "radiology"}
    )
    groups: dict[str, set[str]] = {}
    for shard in manifest.shards:
        with tarfile.open(tmp_path / "out" / shard.name) as tar:
            for name in tar.getnames():
                if name.endswith(".json"):
                    about = json.loads(tar.extractfile(name).read())  # type: ignore[union-attr]
                    groups.setdefault(shard.split, set()).add(about["group"])
    assert groups.keys() == SPLITS.keys()
    assert sum(len(names) for names in groups.values()) == len(set.union(*groups.values())) == 14
    assert manifest.groups == {split: len(names) for split, names in groups.items()}


def test_more_images_leave_the_split_of_the_others_as_it_was(small_source: Path, tmp_path: Path) -> None:
    """A group's split is its own hash, so a data set may grow without moving test images into training."""
    records = list(medvqa_records(str(small_source)))

    def splits(some: list[Any], out: str) -> dict[str, str]:
        manifest = write_shards(some, str(tmp_path / out), settings(), source={"uri": "x"})
        folder = str(tmp_path / out)
        return {entry.key: shard.split for shard in manifest.shards for entry in read_index(folder, shard)}

    fewer, all_of_them = splits(records[:16], "fewer"), splits(records, "all")
    assert len(fewer) == 16
    assert fewer.items() <= all_of_them.items()


def test_a_second_run_writes_nothing_and_a_fresh_one_the_same_bytes(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(small_source, str(tmp_path / "one"))
    write(small_source, str(tmp_path / "other"), num_workers=1)
    assert files(tmp_path / "one") == files(tmp_path / "other")

    def refuse(piece: object, out: str, resize: int | None) -> None:
        raise AssertionError("nothing is to be written")

    monkeypatch.setattr(writer, "write_shard", refuse)
    write(small_source, str(tmp_path / "one"))


@pytest.mark.parametrize("finished_shards", [0, 1, 3])
def test_a_broken_off_run_is_completed_to_the_same_bytes(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished_shards: int
) -> None:
    write(small_source, str(tmp_path / "whole"))
    upload = storage.upload_file
    uploaded: list[str] = []

    def break_off(path: Path, uri: str) -> None:
        if len(uploaded) == finished_shards:
            raise KeyboardInterrupt
        uploaded.append(uri)
        upload(path, uri)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "upload_file", break_off)
        with pytest.raises(KeyboardInterrupt):
            write(small_source, str(tmp_path / "broken"), num_workers=1)
    left = files(tmp_path / "broken")
    assert sum(name.endswith(".tar") for name in left) == finished_shards
    assert left.items() <= files(tmp_path / "whole").items()
    with pytest.raises(UserError, match=r"manifest.json is not there"):
        Manifest.load(str(tmp_path / "broken"))
    write(small_source, str(tmp_path / "broken"))
    assert files(tmp_path / "broken") == files(tmp_path / "whole")


def test_shards_of_other_input_are_not_overwritten_unasked(small_source: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    first = write(small_source, out)
    with pytest.raises(UserError, match="--overwrite"):
        write(small_source, out, samples_per_shard=3)
    assert Manifest.load(out) == first
    second = write(small_source, out, samples_per_shard=3, overwrite=True)
    assert len(second.shards) > len(first.shards)
    names = {name for shard in second.shards for name in (shard.name, shard.index_name)}
    assert files(out).keys() == names | {"manifest.json", "quarantine.jsonl", "duplicates.jsonl"}


def test_the_digest_follows_the_content(small_source: Path, tmp_path: Path) -> None:
    first = write(small_source, str(tmp_path / "a")).digest
    assert write(small_source, str(tmp_path / "elsewhere")).digest == first
    assert write(small_source, str(tmp_path / "b"), seed=1).digest != first


def test_resize_reduces_the_shorter_side_and_never_enlarges(tmp_path: Path) -> None:
    folder = source_of(tmp_path, {"wide.png": (90, 60), "small.png": (20, 30)})
    manifest = write(folder, str(tmp_path / "out"), resize=30, splits={"train": 1})
    sizes = {}
    with tarfile.open(tmp_path / "out" / manifest.shards[0].name) as tar:
        for name in tar.getnames():
            if name.endswith(".png"):
                sizes[name] = Image.open(tar.extractfile(name)).size  # type: ignore[arg-type]
    assert sizes == {"wide.png": (45, 30), "small.png": (20, 30)}


# --- bad input ---


def source_of(tmp_path: Path, images: dict[str, tuple[int, int]]) -> Path:
    folder = tmp_path / "source"
    (folder / "images").mkdir(parents=True)
    for name, size in images.items():
        noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "images" / name)
    lines = [f"{name};a polyp\n" for name in images]
    (folder / "prompt-gt.csv").write_text("Filename;Prompt\n" + "".join(lines))
    return folder


def add(folder: Path, name: str, caption: str = "a polyp") -> Path:
    with (folder / "prompt-gt.csv").open("a") as file:
        file.write(f"{name};{caption}\n")
    return folder / "images" / name


def missing(folder: Path) -> None:
    add(folder, "gone.jpg")


def zero_bytes(folder: Path) -> None:
    add(folder, "empty.jpg").touch()


def truncated(folder: Path) -> None:
    whole = (folder / "images" / "good0.jpg").read_bytes()
    add(folder, "cut.jpg").write_bytes(whole[: len(whole) // 2])


def not_an_image(folder: Path) -> None:
    add(folder, "text.jpg").write_text("hello")


def without_caption(folder: Path) -> None:
    shutil.copy(folder / "images" / "good0.jpg", add(folder, "silent.jpg", "   "))


def outside(folder: Path) -> None:
    shutil.copy(folder / "images" / "good0.jpg", folder / "secret.jpg")
    add(folder, "../secret.jpg")


def linked_outside(folder: Path) -> None:
    shutil.copy(folder / "images" / "good0.jpg", folder / "secret.jpg")
    add(folder, "link.jpg").symlink_to(folder / "secret.jpg")


def absolute_path(folder: Path) -> None:
    add(folder, "/etc/passwd")


def same_key(folder: Path) -> None:
    shutil.copy(folder / "images" / "good0.jpg", add(folder, "good0.jpeg"))


BAD_INPUTS: dict[Callable[[Path], None], str] = {
    missing: "file not found",
    zero_bytes: "empty file",
    truncated: "unreadable",
    not_an_image: "unreadable",
    without_caption: "empty caption",
    outside: "path leaves the image folder",
    linked_outside: "path leaves the image folder",
    absolute_path: "path leaves the image folder",
    same_key: "duplicate key",
}


@pytest.mark.parametrize("spoil", BAD_INPUTS, ids=lambda spoil: spoil.__name__)
def test_a_bad_input_is_quarantined_by_name_and_the_rest_is_written(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    folder = source_of(tmp_path, {f"good{i}.jpg": (32, 32) for i in range(4)})
    spoil(folder)
    manifest = write(folder, str(tmp_path / "out"), splits={"train": 1})
    assert sum(shard.num_samples for shard in manifest.shards) == 4
    assert manifest.quarantined == {BAD_INPUTS[spoil]: 1}
    (line,) = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    named = json.loads(line)
    assert named["kind"] == BAD_INPUTS[spoil]
    assert named["source_id"] not in {f"good{i}.jpg" for i in range(4)}


@pytest.mark.parametrize("column", ["image", "caption", "group", "licence", "split"])
def test_half_a_character_in_a_table_is_quarantined(tmp_path: Path, column: str) -> None:
    """Python reads it from a table's JSON, and can write it into no shard."""
    source_of(tmp_path, {"good.jpg": (32, 32), "bad.jpg": (32, 32)})
    good = {"image": "good.jpg", "caption": "a 👍", "group": "p1", "licence": "CC0", "split": "train"}
    bad = {**good, "image": "bad.jpg", "group": "p2"}
    table = tmp_path / "t.jsonl"
    table.write_text("\n".join(json.dumps(row) for row in (good, bad | {column: f"{bad[column]}\ud800"})))
    columns = Columns(group="group", licence="licence", split="split")
    records = table_records(str(table), str(tmp_path / "source" / "images"), columns)
    manifest = write_shards(records, str(tmp_path / "out"), settings(splits={}), source={"uri": "t"})
    assert manifest.quarantined == {"unreadable text": 1}
    [shard] = manifest.shards
    [sample] = ShardReader(str(tmp_path / "out")).read(shard)
    assert (sample.key, sample.captions) == ("good", ["a 👍"])
    [named] = map(json.loads, (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines())
    assert named["source_id"].startswith("bad.jpg")
    told = {"image": "file name"}.get(column, column)
    assert named["reason"] == f"unreadable text: its {told} holds half of a character"


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "JPEG"), ("L", "JPEG"), ("I;16", "PNG"), ("P", "PNG")])
def test_unusual_images_are_kept_and_counted(tmp_path: Path, mode: str, kind: str) -> None:
    folder = source_of(tmp_path, {"plain.png": (32, 32)})
    if mode == "I;16":
        image = Image.fromarray(np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 40)
    else:
        image = Image.open(folder / "images" / "plain.png").convert(mode)
    image.save(add(folder, "unusual.jpg"), kind)
    manifest = write(folder, str(tmp_path / "out"), splits={"train": 1})
    assert not manifest.quarantined
    told = {"CMYK": "CMYK", "I;16": "16-bit grey", "P": "palette"}
    assert manifest.conversions == ({told[mode]: 1} if mode in told else {})
    with tarfile.open(tmp_path / "out" / manifest.shards[0].name) as tar:
        names = [name for name in tar.getnames() if name.startswith("unusual") and not name.endswith("json")]
        stored = Image.open(tar.extractfile(names[0]))  # type: ignore[arg-type]
        assert stored.mode == ("L" if mode == "L" else "RGB")


def test_a_caption_of_two_thousand_words_is_kept_whole(tmp_path: Path) -> None:
    folder = source_of(tmp_path, {"a.jpg": (32, 32)})
    shutil.copy(folder / "images" / "a.jpg", add(folder, "long.jpg", "polyp " * 2000))
    manifest = write(folder, str(tmp_path / "out"), splits={"train": 1})
    with tarfile.open(tmp_path / "out" / manifest.shards[0].name) as tar:
        about = json.loads(tar.extractfile("long.json").read())  # type: ignore[union-attr]
    assert len(about["captions"][0].split()) == 2000


def test_too_many_bad_inputs_stop_the_job_before_anything_is_written(tmp_path: Path) -> None:
    folder = source_of(tmp_path, {f"good{i}.jpg": (32, 32) for i in range(3)})
    missing(folder)
    with pytest.raises(UserError, match=r"1 of 4 inputs are bad.*gone.jpg: file not found"):
        write(folder, str(tmp_path / "out"), splits={"train": 1}, max_quarantined=0.1)
    assert not list((tmp_path / "out").iterdir())


def test_an_empty_split_is_refused_with_the_counts(tmp_path: Path) -> None:
    folder = source_of(tmp_path, {"one.jpg": (32, 32)})
    with pytest.raises(UserError, match=r"split '\w+' is empty \(train \d, validation \d, test \d samples\)"):
        write(folder, str(tmp_path / "out"))


def test_a_file_in_the_way_is_refused(small_source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/out/.*: Not a directory"):
        write(small_source, str(tmp_path / "file" / "out"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder_is_refused(small_source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot write"):
        write(small_source, str(tmp_path / "out"))


def test_stated_splits_are_kept(tmp_path: Path) -> None:
    source_of(tmp_path, {f"{name}.jpg": (32, 32) for name in "abc"})
    (tmp_path / "t.csv").write_text("image,caption,split\na,x,train\nb,x,validation\nc,x,validation\n")
    columns = Columns(split="split")
    records = table_records(str(tmp_path / "t.csv"), str(tmp_path / "source" / "images"), columns)
    manifest = write_shards(records, str(tmp_path / "out"), settings(splits={}), source={"uri": "t"})
    assert {shard.split: shard.num_samples for shard in manifest.shards} == {"train": 1, "validation": 2}
    assert manifest.split_rule == "as stated by the data set"


def test_a_group_stated_in_two_splits_is_refused(tmp_path: Path) -> None:
    source_of(tmp_path, {f"{name}.jpg": (32, 32) for name in "ab"})
    (tmp_path / "t.csv").write_text("image,caption,split,group\na,x,train,p1\nb,x,test,p1\n")
    columns = Columns(split="split", group="group")
    records = table_records(str(tmp_path / "t.csv"), str(tmp_path / "source" / "images"), columns)
    with pytest.raises(UserError, match="group 'p1' stands in the splits test and train"):
        write_shards(records, str(tmp_path / "out"), settings(splits={}), source={"uri": "t"})


# --- names, keys and splits ---


def keys_of(names: list[str], tmp_path: Path, out: str, **options: Any) -> dict[str, str]:
    """Of a table that lists these files, by source id; each file has content of its own."""
    folder = tmp_path / "images"
    for name in names:
        if not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shade = zlib.crc32(name.encode())
            Image.new("RGB", (8, 8), (shade & 255, shade >> 8 & 255, shade >> 16 & 255)).save(folder / name, "PNG")
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"image": name, "caption": "x"}) for name in names))
    return written_keys(
        table_records(str(tmp_path / "t.jsonl"), str(folder), Columns()), str(tmp_path / out), **options
    )


def written_keys(records: Iterable[Record], out: str, **options: Any) -> dict[str, str]:
    manifest = write_shards(records, out, settings(splits={"train": 1}, **options), source={"uri": "t"})
    samples = [sample for shard in manifest.shards for sample in ShardReader(out).read(shard)]
    return {json.loads(bytes(sample.members["json"]))["source_id"]: sample.key for sample in samples}


def test_names_that_differ_keep_their_images_in_any_order(tmp_path: Path) -> None:
    names = ["a b.png", "a_b.png", "a.b.png", "a.png", "a.jpg", "a.PNG", "p1/001.png", "p1_001.png", "p2/001.png"]
    names += ["scan1.png", "scan1.1.png", "x" * 240 + ".png", "x" * 239 + "y.png", "böse.png", "[b].png", "é\x1b.png"]
    found = keys_of(names, tmp_path, "out")
    assert found.keys() == set(names)
    assert len(set(found.values())) == len(names)
    assert all(re.fullmatch(r"[\w-]{1,200}", key) for key in found.values())
    kept = {"a_b.png": "a_b", "p1_001.png": "p1_001", "scan1.png": "scan1", "böse.png": "böse"}
    assert {name: found[name] for name in kept} == kept
    assert keys_of(names[::-1], tmp_path, "reversed") == found
    alone = keys_of(["p1/001.png", "a b.png"], tmp_path, "alone")
    assert alone == {name: found[name] for name in alone}


@EXAMPLES
@given(st.sets(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)))
def test_a_key_is_a_name_that_no_other_name_has(names: set[str]) -> None:
    stems = {without_ending(name) for name in names}
    keys = {key_of(name) for name in names}
    assert len(keys) == len(stems)
    assert all(re.fullmatch(r"[^./\\\x00-\x20]+", key) and len(key.encode()) <= 255 for key in keys)


def test_an_image_keeps_its_split_whatever_key_it_gets(tmp_path: Path) -> None:
    """Shards that were written before keys had digests, and written again, must not leak."""
    names = [f"p{n}/a b.png" for n in range(20)]
    keys_of(names, tmp_path, "all")
    records = list(table_records(str(tmp_path / "t.jsonl"), str(tmp_path / "images"), Columns()))
    out = str(tmp_path / "out")
    manifest = write_shards(records, out, settings(splits={"train": 0.5, "test": 0.5}), source={"uri": "t"})
    in_test = [s for shard in manifest.split("test") for s in ShardReader(out).read(shard)]
    found = {json.loads(bytes(sample.members["json"]))["source_id"] for sample in in_test}
    assert found == {
        n for n in names if derive_seed("split", 0, f"image {n[:-4].translate({32: '_', 47: '_'})}") >= 2**62
    }


SPELLINGS = [
    *(("a.JPG", name) for name in ("a", "a.jpg", "a.JPG", "./a.jpg")),
    *((f"a{ending}", "a") for ending in (".tif", ".TIFF", ".dcm", ".webp", ".bmp", ".jp2", ".png", ".Jpeg")),
    ("p1/a.png", "p1\\a.PNG"),
    ("scan1.1.png", "scan1.1"),
    *((NFD, name) for name in (NFC, NFC.removesuffix(".png"), f"{NFC[:-3]}PNG")),
    (NFC, NFD),
    (f"{NFD[:-4]}/{NFD}", f"{NFC[:-4]}/{NFC}"),
    ("~lock.png", "~lock.png"),
]


def found_over_spellings(folder: str, out: str) -> None:
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    for number, (file, name) in enumerate(SPELLINGS):
        where = f"{folder}/{number}"
        storage.write_bytes(f"{where}/{file}", image.getvalue())
        for spelled in (name, f"{where}/{name}"):
            listing.cache_clear()
            assert find(where, normal(spelled, where)) == f"{where}/{file}", (file, spelled)
    records = [Record(name, f"{folder}/{number}", ("x",)) for number, (_, name) in enumerate(SPELLINGS)]
    assert len(written_keys(records[-2:], out)) == 2


def test_a_file_is_found_over_the_spellings_of_its_name(tmp_path: Path) -> None:
    found_over_spellings(str(tmp_path / "images"), str(tmp_path / "out"))


def test_an_object_is_found_over_the_spellings_of_its_name(bucket: str, tmp_path: Path) -> None:
    found_over_spellings(f"{bucket}/images", str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("A.jpg", "file not found: there is 'a.jpg'"),
        ("a.png", "file not found: there is 'a.jpg'"),
        ("sub/B.png", "file not found: there is 'sub/b.png'"),
        ("images/a.jpg", "file not found: there is 'a.jpg'"),
        ("gone", "file not found"),
        ("gone/gone.png", "file not found"),
        ("sub", "file not found"),
        ("c", "ambiguous name: it may be c.jpg or c.png; give the whole name"),
        ("https://example.org/a.jpg", "file not found: it is a URL; download the images and name their files"),
        ("s3://elsewhere/a.jpg", "file not found: it is a URL; download the images and name their files"),
        ("x" * 300 + ".jpg", "file not found: its name is too long for a file's"),
        *((name, "path leaves the image folder: 'a.jpg'") for name in ("C:\\images\\a.jpg", "~/a.jpg", "/else/a.jpg")),
        *((name, "path leaves the image folder: name files relative") for name in ("..", "../gone.jpg", "/gone.jpg")),
        ("a.jpg\0", "unreadable text: its file name holds a NUL character"),
    ],
)
def test_a_file_that_is_not_found_is_told_with_the_near_miss(tmp_path: Path, name: str, reason: str) -> None:
    good = [Record(n, str(tmp_path / "images"), ("x",)) for n in ("a.jpg", "sub/b.png", "c.png", "c.jpg")]
    keys_of([record.source_id for record in good], tmp_path, "good")
    records = [*good, Record(name, str(tmp_path / "images"), ("x",))]
    write_shards(records, str(tmp_path / "out"), settings(splits={"train": 1}), source={"uri": "t"})
    [line] = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"].startswith(reason)


@pytest.mark.parametrize("is_there", [False, True])
def test_a_missing_folder_is_one_mistake_not_many_bad_rows(tmp_path: Path, is_there: bool) -> None:
    if is_there:
        (tmp_path / "gone").mkdir()
    records = [Record(f"{n}.png", str(tmp_path / "gone"), ("x",)) for n in range(3)]
    with pytest.raises(UserError, match=r"no folder of images at .*gone, or nothing in it: name theirs with --images"):
        write_shards(records, str(tmp_path / "out"), settings(), source={"uri": "t"})


@pytest.mark.parametrize("split", ["fold 1/2", "../../up", "a\nb", "a\x1b[31m", "s" * 300, ".", "a.b", "train test"])
def test_a_split_that_cannot_name_files_is_refused_before_anything_is_written(tmp_path: Path, split: str) -> None:
    source_of(tmp_path, {"a.jpg": (32, 32), "b.jpg": (32, 32)})
    rows = [{"image": "a", "caption": "x", "split": "train"}, {"image": "b", "caption": "x", "split": split}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records = table_records(str(tmp_path / "t.jsonl"), str(tmp_path / "source" / "images"), Columns(split="split"))
    with pytest.raises(UserError, match="cannot name files"):
        write_shards(records, str(tmp_path / "out"), settings(splits={}), source={"uri": "t"})
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(UserError, match="cannot name files"):
        settings(splits={split: 1})


@pytest.mark.parametrize("name", ["../../x", "a/b", "a\\b", ".hidden", "", "a\nb", "a\udce9", "n" * 250])
def test_a_set_that_cannot_name_files_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="--name"):
        settings(name=name)


def test_one_split_may_be_written_in_several_ways(tmp_path: Path) -> None:
    ways = ["train", "Train", " TRAIN ", "val", "valid", "Validation", "dev", "test", "fold_1", "Fold_1"]
    source_of(tmp_path, {f"{number}.jpg": (8 + number, 8) for number in range(len(ways))})
    rows = [{"image": number, "caption": "x", "split": way} for number, way in enumerate(ways)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records = table_records(str(tmp_path / "t.jsonl"), str(tmp_path / "source" / "images"), Columns(split="split"))
    manifest = write_shards(records, str(tmp_path / "out"), settings(splits={}), source={"uri": "t"})
    assert {s.split: s.num_samples for s in manifest.shards} == {"train": 3, "validation": 4, "test": 1, "fold_1": 2}


def test_one_id_in_two_splits_names_two_images_or_one(tmp_path: Path) -> None:
    keys_of(["a/1.png", "b/1.png"], tmp_path, "images-only")
    records = [Record("1.png", str(tmp_path / "images" / folder), ("x",), split=split) for folder, split in PLACES]
    manifest = write_shards(records, str(tmp_path / "out"), settings(splits={}), source={"uri": "t"})
    assert {shard.split: shard.num_samples for shard in manifest.shards} == {"train": 1, "test": 1}
    same = [replace(record, folder=records[0].folder) for record in records]
    manifest = write_shards(same, str(tmp_path / "same"), settings(splits={}), source={"uri": "t"})
    assert manifest.quarantined == {"duplicate key": 1}


def test_what_was_left_out_is_named_also_when_a_split_is_empty(tmp_path: Path) -> None:
    folder = source_of(tmp_path, {"one.jpg": (32, 32)})
    missing(folder)
    with pytest.raises(UserError, match="is empty"):
        write(folder, str(tmp_path / "out"))
    [line] = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["source_id"] == "gone.jpg"
    (folder / "images" / "one.jpg").write_bytes(b"none")
    with pytest.raises(UserError, match="none of 2 inputs can be used: "):
        write(folder, str(tmp_path / "out"))
    assert len((tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()) == 2


def test_the_list_of_finished_shards_is_not_replaced_by_a_failure(tmp_path: Path) -> None:
    folder = source_of(tmp_path, {f"good{i}.jpg": (32 + i, 32) for i in range(4)})
    write(folder, str(tmp_path / "out"), splits={"train": 1})
    before = files(tmp_path / "out")
    missing(folder)
    with pytest.raises(UserError, match="is empty"):
        write(folder, str(tmp_path / "out"), splits={"train": 1, "never": 1e-9})
    assert files(tmp_path / "out") == before


def test_bad_rows_are_left_out_with_their_reason(tmp_path: Path) -> None:
    source_of(tmp_path, {f"{n}.png": (32 + n, 32) for n in range(3)})
    (tmp_path / "t.csv").write_text("image,caption\n0.png,a large polyp, in the lower left\n1.png,x\n2.png,nan\n")
    records = table_records(str(tmp_path / "t.csv"), str(tmp_path / "source" / "images"), Columns())
    manifest = write_shards(records, str(tmp_path / "out"), settings(splits={"train": 1}), source={"uri": "t"})
    assert manifest.quarantined == {"malformed row": 1, "empty caption": 1}
    assert "3 fields, the table has 2 columns (line 2)" in (tmp_path / "out" / "quarantine.jsonl").read_text()


# --- object storage ---


def test_shards_on_s3_are_those_on_disk(small_source: Path, bucket: str, tmp_path: Path) -> None:
    write(small_source, str(tmp_path / "out"))
    write(small_source, f"{bucket}/out")
    names = storage.list_files(f"{bucket}/out")
    assert {name: storage.read_bytes(f"{bucket}/out/{name}") for name in names} == files(tmp_path / "out")


def test_a_source_on_s3(small_source: Path, bucket: str, tmp_path: Path) -> None:
    storage.upload_folder(small_source, f"{bucket}/source")
    records = medvqa_records(f"{bucket}/source")
    remote = write_shards(records, str(tmp_path / "remote"), settings(), source={"uri": bucket})
    assert remote.digest == write(small_source, str(tmp_path / "local")).digest
