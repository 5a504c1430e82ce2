"""Images within rows: the same shards as from files, whatever held them, and nothing left of what was unpacked."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from cluster import storage
from cluster.errors import UserError
from data_shards import Manifest, Settings, write_shards
from data_shards.cli import app
from data_shards.reader import ShardReader, encoded_image
from data_shards.sources import Columns, embedded_records, medvqa_records
from tests.conftest import DATA
from tests.data_shards.test_writer import files

SETTINGS = Settings(name="set", splits={"train": 0.7, "test": 0.3}, samples_per_shard=7)
COLUMNS = Columns(caption="text", id="name")
HUGGING_FACE = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})

Row = dict[str, Any]
Hold = Callable[[list[Row], pyarrow.DataType, Path], str]


def rows_of(source: Path, *, with_bytes: bool = True) -> list[Row]:
    """One row a caption, as Kvasir-VQA is published: an image comes several times."""

    def image(name: str) -> Row:
        return {"bytes": (source / "images" / name).read_bytes() if with_bytes else None, "path": name}

    with (source / "prompt-gt.csv").open() as file:
        return [
            {"image": image(row["Filename"]), "text": row["Prompt"], "name": Path(row["Filename"]).stem}
            for row in csv.DictReader(file, delimiter=";")
        ]


def table(rows: list[Row], image: pyarrow.DataType) -> pyarrow.Table:
    if image != HUGGING_FACE:
        rows = [row | {"image": row["image"]["bytes"]} for row in rows]
    schema = pyarrow.schema({"image": image, **{name: pyarrow.string() for name in rows[0] if name != "image"}})
    return pyarrow.Table.from_pylist(rows, schema)


def as_parquet(rows: list[Row], image: pyarrow.DataType, folder: Path) -> str:
    pyarrow.parquet.write_table(table(rows, image), folder / "set.parquet", row_group_size=10)
    return str(folder / "set.parquet")


def as_parquet_files(rows: list[Row], image: pyarrow.DataType, folder: Path) -> str:
    for number, part in enumerate(batched_rows(rows)):
        path = folder / "data" / f"train-{number:05d}-of-00003.parquet"
        path.parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(table(part, image), path)
    return str(folder)


def as_saved(rows: list[Row], image: pyarrow.DataType, folder: Path) -> str:
    """What save_to_disk writes, by its own layout; a set that it wrote itself is read below."""
    names = []
    for number, part in enumerate(batched_rows(rows)):
        names.append({"filename": f"data-{number:05d}-of-00003.arrow"})
        stream = table(part, image)
        with pyarrow.ipc.new_stream(folder / names[-1]["filename"], stream.schema) as file:
            file.write_table(stream, max_chunksize=10)
    (folder / "state.json").write_text(json.dumps({"_data_files": names, "_split": "train"}))
    return str(folder)


def batched_rows(rows: list[Row]) -> list[list[Row]]:
    third = len(rows) // 3 + 1
    return [rows[:third], rows[third : 2 * third], rows[2 * third :]]


def write(source: str, out: str, columns: Columns = COLUMNS, settings: Settings = SETTINGS, **how: Any) -> Manifest:
    with embedded_records(source, out, columns, **how) as records:
        return write_shards(records, out, settings, source={"uri": source})


@pytest.fixture(scope="module")
def from_files(small_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    out = str(tmp_path_factory.mktemp("from-files"))
    return write_shards(medvqa_records(str(small_source)), out, SETTINGS, source={"uri": "files"})


def content(uri: str, manifest: Manifest) -> dict[str, tuple[str, bytes, list[str]]]:
    samples = [(shard.split, sample) for shard in manifest.shards for sample in ShardReader(uri).read(shard)]
    return {sample.key: (split, encoded_image(sample), sample.captions) for split, sample in samples}


@pytest.mark.parametrize("image", [HUGGING_FACE, pyarrow.binary(), pyarrow.large_binary()], ids=str)
@pytest.mark.parametrize("hold", [as_parquet, as_parquet_files, as_saved])
def test_the_samples_are_those_of_the_files(
    small_source: Path, from_files: Manifest, tmp_path: Path, hold: Hold, image: pyarrow.DataType
) -> None:
    (tmp_path / "source").mkdir()
    source = hold(rows_of(small_source), image, tmp_path / "source")
    out = str(tmp_path / "out")
    manifest = write(source, out)
    found = content(out, manifest)
    assert len(found) == 24
    for record in medvqa_records(str(small_source)):
        key = Path(record.source_id).stem
        assert found[key][1:] == ((small_source / "images" / record.source_id).read_bytes(), list(record.captions))
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".tar", ".json", ".jsonl"}
    assert sorted(s.num_samples for s in manifest.shards) == sorted(s.num_samples for s in from_files.shards)


def test_from_s3_to_s3(small_source: Path, bucket: str, tmp_path: Path) -> None:
    source = as_parquet_files(rows_of(small_source), HUGGING_FACE, tmp_path)
    storage.upload_folder(tmp_path, f"{bucket}/source")
    remote = write(f"{bucket}/source", f"{bucket}/out")
    assert remote.digest == write(source, str(tmp_path / "out")).digest
    assert not storage.list_files(f"{bucket}/out/unpacked")


def test_what_hugging_face_itself_saved() -> None:
    """Two splits of two real images each, saved by datasets 5.2; see README.md there."""
    with embedded_records(str(DATA / "saved-dataset"), "out", Columns(group="patient"), split_by_file=True) as records:
        found = list(records)
        assert [(r.source_id, r.split, r.group, r.captions) for r in found] == [
            ("train/data-00000-of-00001-000000", "train", "g0", ("frame 0",)),
            ("train/data-00000-of-00001-000001", "train", "g0", ("frame 1",)),
            ("validation/data-00000-of-00001-000000", "validation", "g1", ("frame 2",)),
            ("validation/data-00000-of-00001-000001", "validation", "g1", ("frame 3",)),
        ]
        manifest = write_shards(found, "out", SETTINGS, source={"uri": "saved"})
        assert {shard.split: shard.num_samples for shard in manifest.shards} == {"train": 2, "validation": 2}
        for number, record in enumerate(found):
            assert record.part is not None
            image = storage.read_bytes(record.folder, *record.part)
            assert image == (DATA / "saved-dataset" / "images" / f"{number}.png").read_bytes()


def test_rows_without_bytes_name_files(small_source: Path, tmp_path: Path) -> None:
    rows = [*rows_of(small_source)[:8], *rows_of(small_source, with_bytes=False)[8:]]
    out = str(tmp_path / "out")
    (tmp_path / "source").mkdir()
    source = as_parquet(rows, HUGGING_FACE, tmp_path / "source")
    found = content(out, write(source, out, images=str(small_source / "images")))
    assert len(found) == 24
    for record in medvqa_records(str(small_source)):
        assert found[Path(record.source_id).stem][1] == (small_source / "images" / record.source_id).read_bytes()
    # Never outside the folder of images, whatever a row says.
    rows[9]["image"]["path"] = "../../etc/passwd"
    rows[9]["name"] = "elsewhere"
    source = as_parquet(rows, HUGGING_FACE, tmp_path / "source")
    manifest = write(source, str(tmp_path / "other"), images=str(small_source / "images"))
    assert manifest.quarantined == {"path leaves the image folder": 1}


def test_without_an_id_column_each_row_is_an_image(small_source: Path, tmp_path: Path) -> None:
    rows = rows_of(small_source)[:6]
    with embedded_records(as_parquet(rows, HUGGING_FACE, tmp_path), "out", Columns(caption="text")) as records:
        found = list(records)
    assert [record.source_id for record in found] == [f"set-{number:06d}" for number in range(6)]
    assert [record.captions for record in found] == [(row["text"],) for row in rows]


def test_files_state_splits_when_asked(small_source: Path, tmp_path: Path) -> None:
    rows = rows_of(small_source)
    names = sorted({row["name"] for row in rows})
    (tmp_path / "source").mkdir()
    for start, file in ((0, "train-00000-of-00002"), (10, "train-00001-of-00002"), (20, "val"), (22, "test-00000")):
        part = [row for row in rows if row["name"] in names[start : {0: 10, 10: 20, 20: 22, 22: 24}[start]]]
        pyarrow.parquet.write_table(table(part, HUGGING_FACE), tmp_path / "source" / f"{file}.parquet")
    result = CliRunner().invoke(
        app,
        [
            *("write", str(tmp_path / "source"), "--format", "parquet", "--out", str(tmp_path / "out")),
            *("--caption-column", "text", "--id-column", "name", "--split-by-file"),
        ],
    )
    assert result.exit_code == 0, result.output
    manifest = Manifest.load(str(tmp_path / "out"))
    assert {shard.split: shard.num_samples for shard in manifest.shards} == {"train": 20, "validation": 2, "test": 2}
    assert manifest.split_rule == "as stated by the data set"
    assert not (tmp_path / "out" / "unpacked").exists()


def test_one_column_may_say_several_things_and_a_row_without_a_name_is_bad_alone(
    small_source: Path, tmp_path: Path
) -> None:
    rows = rows_of(small_source)
    for row in rows[:2]:
        row["name"] = ""
    source = as_parquet(rows, HUGGING_FACE, tmp_path)
    manifest = write(source, str(tmp_path / "out"), Columns(caption="text", id="name", group="name"))
    assert sum(manifest.groups.values()) == sum(shard.num_samples for shard in manifest.shards) == 24
    assert manifest.quarantined == {"no file name": 2}


def test_several_captions_in_one_row(tmp_path: Path, small_source: Path) -> None:
    image = rows_of(small_source)[0]["image"]
    rows = pyarrow.Table.from_pylist([{"image": image, "text": ["one", " two ", None, "one"]}])
    pyarrow.parquet.write_table(rows, tmp_path / "t.parquet")
    with embedded_records(str(tmp_path / "t.parquet"), "out", Columns(caption="text")) as records:
        assert next(records).captions == ("one", "two")


def test_values_within_rows_mean_what_they_do_in_tables(tmp_path: Path, small_source: Path) -> None:
    images = [row["image"]["bytes"] for row in rows_of(small_source)[::4]]
    rows = [
        {"image": images[0], "text": ["one", "nan"], "name": 1, "who": 7.0},
        {"image": images[0], "text": ["two"], "name": 1, "who": None},
        {"image": images[1], "text": None, "name": 2, "who": float("nan")},
        {"image": images[2], "text": ["x"], "name": 3, "who": 1.0},
        {"image": images[2], "text": ["y"], "name": 3, "who": 2.0},
        {"image": images[3], "text": ["z"], "name": None, "who": 1.0},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    columns = Columns(caption="text", id="name", group="who")
    with embedded_records(str(tmp_path / "t.parquet"), "out", columns) as records:
        found = [(record.source_id, record.captions, record.group, record.fault) for record in records]
    assert found == [
        ("1", ("one", "two"), "7", None),
        ("2", (), None, None),
        ("3", ("x", "y"), "1", "two groups: its rows say '1' and '2'"),
        ("", ("z",), "1", None),
    ]


def test_a_row_whose_values_cannot_be_used_is_left_out_alone(tmp_path: Path, small_source: Path) -> None:
    image = rows_of(small_source)[0]["image"]
    schema = pyarrow.schema({"image": HUGGING_FACE, "text": pyarrow.string(), "who": pyarrow.list_(pyarrow.string())})
    rows = [{"image": image, "text": "x", "who": ["p"]}, {"image": image, "text": "y", "who": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), tmp_path / "t.parquet")
    manifest = write(
        str(tmp_path / "t.parquet"),
        str(tmp_path / "out"),
        Columns(caption="text", group="who"),
        Settings("s", {"a": 1}),
    )
    assert manifest.quarantined == {"unusable value": 1}
    [line] = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["source_id"] == "t-000000"
    assert "column 'who' holds a list, neither text nor a number" in line


def test_what_is_unpacked_goes_also_when_writing_fails(small_source: Path, tmp_path: Path) -> None:
    source = as_parquet(rows_of(small_source), HUGGING_FACE, tmp_path)
    with pytest.raises(UserError, match="split 'never' is empty"):
        write(source, str(tmp_path / "out"), settings=Settings("set", {"train": 1, "never": 1e-9}))
    assert not list((tmp_path / "out").iterdir())


def test_what_a_killed_run_unpacked_goes_with_the_next(small_source: Path, tmp_path: Path) -> None:
    source = as_parquet(rows_of(small_source), HUGGING_FACE, tmp_path)
    write(source, str(tmp_path / "whole"))
    (tmp_path / "out" / "unpacked").mkdir(parents=True)
    for name in ("000000.images", ".000001.images.abcd1234"):
        (tmp_path / "out" / "unpacked" / name).write_bytes(b"half")
    write(source, str(tmp_path / "out"))
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("option", [("--id-column", "x"), ("--split-by-file",)])
def test_options_for_rows_go_with_rows(tmp_path: Path, option: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, ["write", "t.csv", "--out", "out", *option])
    assert isinstance(result.exception, UserError)
    assert str(result.exception).startswith(f"{option[0]} is for images within rows")


def one_name_for_two(rows: list[Row], folder: Path) -> str:
    for row in rows:
        row["name"] = "same"
    return as_parquet(rows, HUGGING_FACE, folder)


def no_images(rows: list[Row], folder: Path) -> str:
    return as_parquet([row | {"image": {"bytes": b"a.jpg"}} for row in rows], pyarrow.string(), folder)


def renamed(rows: list[Row], folder: Path) -> str:
    return as_parquet([row | {"txt": row.pop("text")} for row in rows], HUGGING_FACE, folder)


def damaged(rows: list[Row], folder: Path) -> str:
    uri = as_saved(rows, HUGGING_FACE, folder)
    path = folder / "data-00001-of-00003.arrow"
    path.write_bytes(path.read_bytes()[:-5000])
    return uri


def empty(rows: list[Row], folder: Path) -> str:
    pyarrow.parquet.write_table(table(rows, HUGGING_FACE).slice(0, 0), folder / "empty.parquet")
    return str(folder)


def pointing_outside(rows: list[Row], folder: Path) -> str:
    uri = as_saved(rows, HUGGING_FACE, folder)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../x.arrow"}]}))
    return uri


def nothing_saved(rows: list[Row], folder: Path) -> str:
    (folder / "dataset_dict.json").write_text('{"splits": []}')
    return str(folder)


MISTAKES: dict[Callable[[list[Row], Path], str], str] = {
    one_name_for_two: "'same' in column 'name' names two different images",
    no_images: "column 'image' holds string, no images: .*--format table",
    renamed: "has no column 'text': did you mean 'txt'",
    damaged: r"data-00001-of-00003.arrow is damaged",
    empty: "has no rows",
    nothing_saved: "has no rows",
    pointing_outside: r"'../x.arrow' is no name of a file beside it",
    lambda rows, folder: str(folder): "holds no rows: expected",
    lambda rows, folder: str(folder / "gone.parquet"): "it is not there",
}


@pytest.mark.parametrize("spoil", MISTAKES)
def test_a_mistake_is_explained(small_source: Path, tmp_path: Path, spoil: Callable[[list[Row], Path], str]) -> None:
    source = spoil(rows_of(small_source)[:30], tmp_path)
    with pytest.raises(UserError, match=MISTAKES[spoil]):
        write(source, str(tmp_path / "out"))


def test_files_that_name_no_split_cannot_state_one(small_source: Path, tmp_path: Path) -> None:
    rows = rows_of(small_source)[:3]
    pyarrow.parquet.write_table(table(rows, HUGGING_FACE), tmp_path / "0000.parquet")
    with pytest.raises(UserError, match=r"0000.parquet names no split"):
        write(str(tmp_path), str(tmp_path / "out"), split_by_file=True)
