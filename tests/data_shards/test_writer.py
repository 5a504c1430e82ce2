"""The writer: nothing lost, nothing leaked, the same bytes again; and what any WebDataset reader makes of it."""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from cluster import storage
from cluster.errors import UserError
from data_shards import Manifest, Settings, write_shards, writer
from data_shards.manifest import read_index
from data_shards.reader import ShardReader
from data_shards.sources import Columns, medvqa_records, roco_records, table_records
from tests.conftest import DATA

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
