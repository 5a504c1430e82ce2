"""Sources: the formats of the two data sets, any table, and what is wrong with a table in words."""

import json
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from cluster import storage
from cluster.errors import UserError
from data_shards import Settings, write_shards
from data_shards.manifest import read_index
from data_shards.sources import Columns, medvqa_records, roco_records, table_records
from tests.conftest import DATA


def test_the_real_colonoscopy_set() -> None:
    records = list(medvqa_records(str(DATA / "colonoscopy")))
    assert len(records) == 802
    assert sum(len(record.captions) for record in records) == 3208
    assert all(record.group and record.licence for record in records)
    assert len({record.group for record in records}) < 802


def test_the_real_radiology_set() -> None:
    records = list(roco_records(str(DATA / "radiology")))
    assert len(records) == 23
    assert {record.licence for record in records} == {"CC BY 3.0", "CC BY 4.0", "CC BY", "CC BY-SA"}
    assert len({record.group for record in records}) == 14
    assert all(storage.exists(f"{record.folder}/{record.source_id}.jpg") for record in records)


@pytest.mark.parametrize("folders", ["{part}", "{part}_images", "{part}_images/{part}"])
def test_rocov2_as_it_is_published(tmp_path: Path, folders: str) -> None:
    """Three captions files and their archives unpacked: its own splits, and the licence of each image."""
    real = [*roco_records(str(DATA / "radiology"))][:5]
    parts = {"train": real[:2], "valid": real[2:3], "test": real[3:]}
    licences = "ID, PMCID ,Attribution,Link\n"
    for part, records in parts.items():
        folder = tmp_path / folders.format(part=part)
        folder.mkdir(parents=True)
        lines = ["ID,Caption"]
        for record in records:
            shutil.copy(f"{record.folder}/{record.source_id}.jpg", folder)
            lines.append(f'{record.source_id},"{record.captions[0]}"')
            licences += f"{record.source_id},PMC1,© 2020 Someone et al. (CC BY-NC 4.0),https://example.org/1\n"
        (tmp_path / f"{part}_captions.csv").write_text("\n".join(lines))
        (tmp_path / f"{part}_concepts.csv").write_text("ID,CUIs\n")
    (tmp_path / "license_information.csv").write_text(licences)
    settings = Settings(name="roco", splits={"train": 0.8, "validation": 0.1, "test": 0.1})
    manifest = write_shards(roco_records(str(tmp_path)), str(tmp_path / "out"), settings, source={"uri": "x"})
    found = {e.key: s.split for s in manifest.shards for e in read_index(str(tmp_path / "out"), s)}
    assert found == {r.source_id: {"valid": "validation"}.get(p, p) for p, rs in parts.items() for r in rs}
    assert (manifest.split_rule, manifest.licences) == ("as stated by the data set", {"CC BY-NC 4.0": 5})
    # A part whose archive was not downloaded is no mistake if its captions are not there either.
    (tmp_path / "test_captions.csv").unlink()
    part_of_it = write_shards(roco_records(str(tmp_path)), str(tmp_path / "less"), settings, source={"uri": "x"})
    assert part_of_it.splits == ["train", "validation"]


@pytest.mark.parametrize(
    ("header", "value", "licence"),
    [
        ("ID,License", "cc-by-4.0", "CC BY-4.0"),
        ("id,Licence,Attribution", "CC0 1.0,A", "CC0"),
        ("ID,Attribution", "all rights reserved", None),
        ("Name,License", "CC BY", None),
    ],
)
def test_licences_are_read_leniently(tmp_path: Path, header: str, value: str, licence: str | None) -> None:
    (tmp_path / "captions.csv").write_text("ID,Caption\na,x\n")
    (tmp_path / "license_information.csv").write_text(f"{header}\na,{value}\n")
    assert [record.licence for record in roco_records(str(tmp_path))] == [licence]


def test_captions_of_rocov2_without_their_images_or_with_others(tmp_path: Path) -> None:
    for part in ("train", "valid"):
        (tmp_path / f"{part}_captions.csv").write_text("ID,Caption\na,x\n")
    with pytest.raises(UserError, match=r"none of its images: unpack train_images.zip to train_images/"):
        list(roco_records(str(tmp_path)))
    (tmp_path / "my_captions.csv").write_text("ID,Caption\na,x\n")
    with pytest.raises(UserError, match=r"found my_captions.csv, train_captions.csv, valid_captions.csv"):
        list(roco_records(str(tmp_path)))


def test_rows_of_one_image_are_its_captions(tmp_path: Path) -> None:
    (tmp_path / "prompt-gt.csv").write_text("Filename;Prompt\na.jpg;one\nb;two\na.jpg;three\na;four\nb;two\n")
    first, second = medvqa_records(str(tmp_path))
    assert (first.source_id, first.captions) == ("a.jpg", ("one", "three", "four"))
    assert (second.source_id, second.captions) == ("b", ("two",))


def test_images_of_two_endings_stay_two_images(tmp_path: Path) -> None:
    (tmp_path / "prompt-gt.csv").write_text("Filename;Prompt\na.jpg;one\na.png;two\n")
    assert [record.source_id for record in medvqa_records(str(tmp_path))] == ["a.jpg", "a.png"]


ROWS = [
    {"file": "x.png", "text": 'says "hello", twice', "who": "p1", "may": "CC0", "part": "train"},
    {"file": "y.png", "text": "Überweisung: Röntgen\nzweite\u2028dritte", "who": "p2", "may": "CC0", "part": "test"},
]
COLUMNS = Columns(image="file", caption="text", group="who", licence="may", split="part")


def write_table(path: Path) -> None:
    names = list(ROWS[0])
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8")
    else:
        delimiter = {".csv": ",", ".tsv": "\t", ".txt": ";"}[path.suffix]
        quoted = [['"' + row[name].replace('"', '""') + '"' for name in names] for row in ROWS]
        lines = [delimiter.join(cells) for cells in [names, *quoted]]
        path.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.txt", "t.jsonl", "t.parquet"])
def test_any_table_gives_the_same_records(tmp_path: Path, name: str) -> None:
    write_table(tmp_path / name)
    records = list(table_records(str(tmp_path / name), str(tmp_path), COLUMNS))
    assert [record.source_id for record in records] == ["x.png", "y.png"]
    assert [record.captions for record in records] == [(row["text"],) for row in ROWS]
    assert [(r.group, r.licence, r.split) for r in records] == [("p1", "CC0", "train"), ("p2", "CC0", "test")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.csv", "image,captoin\na,b\n", "no column 'caption': did you mean 'captoin'"),
        ("t.csv", "image,caption\n", "no rows"),
        ("t.csv", b"image,caption\na,\xff\xfe\n", "cannot be read as csv"),
        ("t.jsonl", "{not json}\n", "cannot be read as jsonl"),
        ("t.parquet", b"no parquet", "cannot be read as parquet"),
        ("t.xlsx", b"", "must end in .csv"),
    ],
)
def test_a_bad_table_is_explained(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=said) as error:
        list(table_records(str(path), str(tmp_path), Columns()))
    assert name in str(error.value)


def test_folders_of_another_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prompt-gt.csv is not there"):
        list(medvqa_records(str(tmp_path)))
    with pytest.raises(UserError, match="found none"):
        list(roco_records(str(tmp_path)))
