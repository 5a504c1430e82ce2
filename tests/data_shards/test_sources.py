"""Sources: the formats of the two data sets, any table, and what is wrong with a table in words."""

import csv
import io
import json
import shutil
import unicodedata
from contextlib import suppress
from datetime import date
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory

import hypothesis
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import storage
from cluster.errors import UserError
from data_shards import Settings, write_shards
from data_shards.manifest import read_index
from data_shards.sample import Record
from data_shards.sources import Columns, medvqa_records, roco_records, table_records
from data_shards.sources.table import read_rows
from data_shards.sources.values import BadValueError, label, text, texts
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


# --- what a value means ---


MISSING_VALUES: tuple[object, ...] = (
    *(None, float("nan"), np.float32("nan"), np.datetime64("NaT"), Decimal("NaN")),
    *("", " \t", "\u200b", []),
)


@pytest.mark.parametrize(
    ("value", "means"),
    [
        *((missing, ()) for missing in MISSING_VALUES),
        *((word, ()) for word in ("nan", "NaN", "NA", "N/A", "None", "null", "<NA>")),
        *(([missing], ()) for missing in (None, float("nan"), " ", "nan")),
        ("  a polyp ", ("a polyp",)),
        ("nan cells", ("nan cells",)),
        ("Natrium", ("Natrium",)),
        ("[sic] a polyp", ("[sic] a polyp",)),
        (12, ("12",)),
        (12.0, ("12",)),
        (np.int64(3), ("3",)),
        (Decimal("5.00"), ("5",)),
        (0.5, ("0.5",)),
        (b"caf\xc3\xa9", ("café",)),
        (["one", " two ", None, float("nan"), 3.0], ("one", "two", "3")),
        (np.array(["one", "two"], dtype=object), ("one", "two")),
        ("", ()),
    ],
    ids=repr,
)
def test_a_value_of_a_caption_column_has_one_meaning(value: object, means: tuple[str, ...]) -> None:
    assert texts(value) == means


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (True, "true or false"),
        (np.bool_(False), "true or false"),
        ({"en": "a polyp"}, "an object"),
        ([["nested"]], "a list"),
        ([{"en": "x"}], "an object"),
        (float("inf"), "infinity"),
        (b"\xff\xfe", "bytes that are no text"),
        (date(2024, 1, 2), "a date"),
        ("['one', 'two']", "a list written as text"),
        ('["one"]', "a list written as text"),
        ("['one' 'two']", "a list written as text"),
        ("{'en': 'x'}", "a list written as text"),
    ],
    ids=repr,
)
def test_what_is_neither_text_nor_number_is_refused(value: object, said: str) -> None:
    with pytest.raises(BadValueError, match=said):
        texts(value)


EXAMPLES = hypothesis.settings(deadline=None, max_examples=50)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.dates(), st.decimals()
)


@EXAMPLES
@given(st.recursive(SCALARS, lambda some: st.lists(some) | st.dictionaries(st.text(), some)))
def test_every_value_is_missing_or_text_or_refused(value: object) -> None:
    """And means the same in a column of captions as anywhere else, and again when it is read as text."""
    with suppress(BadValueError):
        assert all(found == found.strip() != "" for found in texts(value))
    try:
        found = text(value)
    except BadValueError:
        return
    assert text(found) == found
    with suppress(BadValueError):  # of a list written as text
        assert texts(value) == ((found,) if found else ())
    assert label(label(value)) == label(value)


def table_of(folder: Path, ending: str, rows: list[dict[str, object]]) -> str:
    path = folder / f"t.{ending}"
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_typed_tables_are_read_by_their_types(tmp_path: Path, ending: str) -> None:
    rows: list[dict[str, object]] = [
        {"image": "a.png", "caption": ["one", "two"], "patient": 1.0},
        {"image": "b.png", "caption": [None], "patient": None},
        {"image": "c.png", "caption": ["three"], "patient": float("nan")},
    ]
    found = list(table_records(table_of(tmp_path, ending, rows), str(tmp_path), Columns(group="patient")))
    assert [(r.source_id, r.captions, r.group) for r in found] == [
        ("a.png", ("one", "two"), "1"),
        ("b.png", (), None),
        ("c.png", ("three",), None),
    ]


def test_one_patient_as_a_number_and_as_text_is_one_group(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"image": f"{number}.png", "caption": "x", "patient": patient}
        for number, patient in enumerate((1, 1.0, "1", "1.0", " 1 "))
    ]
    found = list(table_records(table_of(tmp_path, "jsonl", rows), str(tmp_path), Columns(group="patient")))
    assert {record.group for record in found} == {"1"}


def test_a_row_that_cannot_be_used_is_named_with_its_column(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"image": "a.png", "caption": {"en": "x"}},
        {"image": "b.png", "caption": "y"},
        {"image": None, "caption": "z"},
        {"image": ["c.png"], "caption": "z"},
    ]
    found = list(table_records(table_of(tmp_path, "jsonl", rows), str(tmp_path), Columns()))
    assert [(record.source_id, record.fault) for record in found] == [
        ("b.png", None),
        ("a.png", "unusable value: column 'caption' holds an object, neither text nor a number (line 1)"),
        ("line 3", "no file name: column 'image' is empty (line 3)"),
        ("line 4", "unusable value: column 'image' holds a list, neither text nor a number (line 4)"),
    ]


def test_rows_of_one_image_that_contradict_each_other_are_no_one_image(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        "image,caption,who,part\na.png,x,p1,\na.png,y,p2,\nb.png,x,,train\nb.png,y,p1,Train\nc.png,x,,val\nc.png,x,,test\n"
    )
    found = list(table_records(str(tmp_path / "t.csv"), str(tmp_path), Columns(group="who", split="part")))
    assert [(r.source_id, r.group, r.split, r.fault) for r in found] == [
        ("a.png", "p1", None, "two groups: its rows say 'p1' and 'p2'"),
        ("b.png", "p1", "train", None),
        ("c.png", None, "validation", "two splits: its rows say 'validation' and 'test'"),
    ]


# --- CSV, strictly ---


def csv_records(folder: Path, content: str | bytes, columns: Columns = Columns()) -> list[Record]:  # noqa: B008
    (folder / "t.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(table_records(str(folder / "t.csv"), str(folder), columns))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('image,caption\n0.png,x\n1.png,"a polyp\n2.png,y\n3.png,z\n', "line 3: a quote is opened there and never"),
        ('image,caption\n0.png,"a polyp\n1.png,y\n2.png,z"\n', "line 2: a quoted field holds what look like rows"),
        ('image,caption\n0.png,"5" polyp"\n', "line 2: a quoted field goes on behind its closing quote"),
        ('image,caption\n0.png,"a\nb"\n1.png,"5" polyp\n', "line 4: a quoted field goes on"),
        ('image,caption\n0.png,"a polyp\n' + "1.png,y\n" * 20_000, "line 2: a field of more than 131072 characters"),
        ("sep=;\nimage;caption\n0.png;x\n1.png;'y\n2.png;\"z\n", "line 5: a quote is opened"),
        ("image,caption\na,caf\xe9\n".encode("cp1252"), "line 2 is not UTF-8: save it as UTF-8 .*iconv"),
        (b"image,caption\na,x\x00y\n", "line 2 has a NUL character"),
        ("image,caption\na,x\n".encode("utf-16-le"), "line 1 has a NUL character: it is damaged, or UTF-16"),
        ("image,caption\na,x\n".encode("utf-16")[:-1], "is not UTF-16"),
        ("image,caption,caption\na,x,y\n", "has the column 'caption' twice"),
        ("\n\n", "has no rows"),
    ],
)
def test_a_csv_file_that_is_none_is_an_error_with_the_line(tmp_path: Path, content: str | bytes, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        csv_records(tmp_path, content)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        'image,caption\na.png,"x, y\nz"\n',
        'image,caption\r\na.png,"x, y\nz"\r\n',
        'image,caption\ra.png,"x, y\nz"\r',
        '\ufeffimage,caption\n\n  \n,\na.png,"x, y\nz"\n\n',
        'sep=;\nimage;caption\na.png;"x, y\nz"\n',
        '\ufeffsep=;\r\nimage;caption\r\na.png;"x, y\nz"\r\n',
        ' image , "caption"\na.png, "x, y\nz"\n',
        'image\tcaption\na.png\t"x, y\nz"\n',
        'image\t"caption, text, or none"\tcaption\na.png\t\t"x, y\nz"\n',
        'image,caption\na.png,"x, y\nz"\n'.encode("utf-16"),
        'image,caption\na.png,"x, y\nz"\n'.encode("utf-32"),
    ],
    ids=repr,
)
def test_a_csv_file_is_read_whoever_wrote_it(tmp_path: Path, content: str | bytes) -> None:
    [record] = csv_records(tmp_path, content)
    assert (record.source_id, record.captions, record.fault) == ("a.png", ("x, y\nz",), None)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("0.png,a large polyp, in the lower left,", "malformed row: 4 fields, the table has 2 columns (line 3)"),
        ("0.png", "malformed row: 1 field, the table has 2 columns (line 3)"),
        ("0.png,x,", "malformed row: 3 fields, the table has 2 columns (line 3)"),
    ],
)
def test_a_row_of_more_or_fewer_fields_is_left_out_alone(tmp_path: Path, row: str, fault: str) -> None:
    found = csv_records(tmp_path, f"image,caption\n\n{row}\n0.png,kept\n1.png,kept\n")
    assert [(record.source_id, record.captions, record.fault) for record in found] == [
        ("0.png", ("kept",), None),
        ("1.png", ("kept",), None),
        ("0.png", (), fault),
    ]


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0."), min_size=1)


@EXAMPLES
@given(st.lists(st.tuples(TEXT, TEXT)))
def test_what_a_csv_writer_writes_is_what_is_read(rows: list[tuple[str, str]]) -> None:
    rows = [*rows, ("a.png", "x")]
    file = io.StringIO(newline="")
    csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("image", "caption"), *rows])
    with TemporaryDirectory() as folder:
        (Path(folder) / "t.csv").write_bytes(file.getvalue().encode())
        table = read_rows(f"{folder}/t.csv")
    assert [(row["image"], row["caption"]) for row in table] == [row for row in rows if any(map(str.strip, row))]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"image": "a", "caption": "x"}\n{"image": "b", "caption": x}\n', "line 2: Expecting value"),
        ('{"image": "a", "caption": "x", "caption": "y"}\n', "line 1: it names 'caption' twice"),
        ('\n["a", "x"]\n', "line 2: a row of it is not"),
    ],
)
def test_a_bad_line_of_jsonl_is_named(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(UserError, match=said):
        list(table_records(str(tmp_path / "t.jsonl"), str(tmp_path), Columns()))


def test_a_column_that_the_first_line_lacks_is_there(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"image": "a", "caption": "x"}, {"image": "b", "caption": "y", "who": "p"}]
    found = table_records(table_of(tmp_path, "jsonl", rows), str(tmp_path), Columns(group="who"))
    assert [record.group for record in found] == [None, "p"]


# --- names ---


def test_what_follows_a_dot_is_an_ending_only_if_it_is_an_images(tmp_path: Path) -> None:
    found = csv_records(tmp_path, "image,caption\nscan1,one\nscan1.1,two\na,three\na.JPG,four\nb.tif,five\nb,six\n")
    assert [(record.source_id, record.captions) for record in found] == [
        ("scan1", ("one",)),
        ("scan1.1", ("two",)),
        ("a.JPG", ("three", "four")),
        ("b.tif", ("five", "six")),
    ]


def test_one_file_named_in_several_ways_is_one_image(tmp_path: Path) -> None:
    ways = ["p1/röntgen.png", "./p1//röntgen.png", "p1\\röntgen.png", f"{tmp_path}/p1/röntgen.png", "p1/röntgen"]
    ways += [unicodedata.normalize("NFD", ways[0]), f"file://{tmp_path}/p1/röntgen.png"]
    [record] = csv_records(tmp_path, "image,caption\n" + "".join(f"{way},{n}\n" for n, way in enumerate(ways)))
    assert (record.source_id, len(record.captions)) == ("p1/röntgen.png", len(ways))


METADATA = "Filename,group,license\np1/001.jpg,g1,CC0\np2/001.jpg,g2,CC BY-NC\np3/002.jpg,g3,CC BY\n"


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["p1/001.jpg", "p2/001.jpg", "p3/002.jpg"], ["g1", "g2", "g3"]),
        (["p1/001", "p2\\001.jpg", "002"], ["g1", "g2", "g3"]),
        (["001.jpg", "images/p3/002.jpg"], [None, "g3"]),
        (["p4/001.jpg", "p4/002.jpg"], [None, None]),
        (["002.jpg", "p4/002.jpg"], [None, None]),
        (["p1/001.png"], ["g1"]),
        (["p1/001.png", "p1/001.jpg"], [None, "g1"]),
    ],
)
def test_metadata_is_that_of_the_very_image(tmp_path: Path, names: list[str], groups: list[str | None]) -> None:
    (tmp_path / "metadata.csv").write_text(METADATA)
    (tmp_path / "prompt-gt.csv").write_text("Filename;Prompt\n" + "".join(f"{name};x\n" for name in names))
    assert [record.group for record in medvqa_records(str(tmp_path))] == groups


def test_of_one_base_name_in_metadata_only_one_image_takes_it(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("Filename,group\n001.jpg,g1\n")
    (tmp_path / "prompt-gt.csv").write_text("Filename;Prompt\np1/001.jpg;x\np2/001.jpg;x\n")
    assert [record.group for record in medvqa_records(str(tmp_path))] == [None, None]


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ("Filename,group\na.jpg,g1\na.jpg,g2\n", r"metadata.csv, line 3: .*'a.jpg'"),
        ("Filename,group\na.jpg,g1,x\n", r"metadata.csv, line 2: malformed row: 3 fields"),
        ("filename,group\na.jpg,g1\n", r"no column 'Filename': did you mean 'filename'"),
        ("Filename,group,group\na.jpg,g1,g2\n", r"'group' twice"),
    ],
)
def test_metadata_that_is_not_clear_is_an_error(tmp_path: Path, metadata: str, said: str) -> None:
    """A group that is lost would be a leak."""
    (tmp_path / "metadata.csv").write_text(metadata)
    (tmp_path / "prompt-gt.csv").write_text("Filename;Prompt\na.jpg;x\n")
    with pytest.raises(UserError, match=said):
        list(medvqa_records(str(tmp_path)))


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ("Filename,licence\na.jpg,CC0\n", "CC0"),
        ("file_name,text\na.jpg,x\n", None),
        ("Filename,license\na.jpg,nan\n", None),
    ],
)
def test_metadata_states_what_its_columns_are(tmp_path: Path, metadata: str, licence: str | None) -> None:
    (tmp_path / "metadata.csv").write_text(metadata)
    (tmp_path / "prompt-gt.csv").write_text("Filename;Prompt\na.jpg;x\n")
    assert [record.licence for record in medvqa_records(str(tmp_path))] == [licence]


def test_an_id_with_two_licences_has_none(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text("ID,Caption\na,x\nb,x\n")
    (tmp_path / "license_information.csv").write_text("ID,License\na,CC BY\na,CC0\nb,CC0\nc,CC0,x\n")
    assert [record.licence for record in roco_records(str(tmp_path))] == [None, "CC0"]
