"""Any folder of images with a table beside it: CSV, TSV, JSON Lines or Parquet, one row an image or a caption."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow
import pyarrow.parquet

from cluster import storage
from cluster.errors import UserError, did_you_mean
from data_shards.sample import Record

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Columns:
    """Names of the columns; the optional ones may be None."""

    image: str = "image"
    caption: str = "caption"
    group: str | None = None
    licence: str | None = None
    split: str | None = None


def table_records(table_uri: str, images_uri: str, columns: Columns) -> Iterator[Record]:
    """Records of a table. Rows that name the same image are its captions.

    Raises UserError if the table cannot be read or lacks a column.
    """
    rows = read_rows(table_uri)
    for column in (columns.image, columns.caption, columns.group, columns.licence, columns.split):
        if column is not None:
            _check_column(rows, column, table_uri)
    return records_of(rows, images_uri, columns)


def records_of(rows: Sequence[Row], images_uri: str, columns: Columns) -> Iterator[Record]:
    """Join the rows of each image, in the order in which images first appear.

    Tables sometimes name an image with its ending in one row and without it in another.
    """
    with_ending: dict[str, set[str]] = {}
    for row in rows:
        name = _text(row, columns.image)
        with_ending.setdefault(name.rpartition(".")[0], set()).add(name)
    by_image: dict[str, list[Row]] = {}
    for row in rows:
        name = _text(row, columns.image)
        fuller = with_ending.get(name, set())
        by_image.setdefault(min(fuller) if len(fuller) == 1 else name, []).append(row)
    for image, its_rows in by_image.items():
        captions = dict.fromkeys(_text(row, columns.caption) for row in its_rows)
        yield Record(
            source_id=image,
            folder=images_uri,
            captions=tuple(caption for caption in captions if caption),
            group=_text(its_rows[0], columns.group) or None,
            licence=_text(its_rows[0], columns.licence) or None,
            split=_text(its_rows[0], columns.split) or None,
        )


def read_rows(uri: str, delimiter: str | None = None) -> list[Row]:
    """All rows of a table, by the ending of its name. Raises UserError if it has none or cannot be read."""
    data = storage.read_bytes(uri)
    ending = PurePosixPath(uri).suffix.lower()
    try:
        if ending == ".parquet":
            rows: list[Row] = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
        elif ending in (".jsonl", ".ndjson"):
            rows = [json.loads(line) for line in data.decode("utf-8-sig").splitlines() if line.strip()]
        elif ending in (".csv", ".tsv", ".txt"):
            text = data.decode("utf-8-sig")
            header = text.partition("\n")[0]
            likely = max(",;\t", key=header.count)
            rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter or likely))
        else:
            raise UserError(f"{uri}: a table must end in .csv, .tsv, .jsonl or .parquet")
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{uri} cannot be read as {ending[1:]}: {str(error).splitlines()[0]}") from None
    if not rows:
        raise UserError(f"{uri} has no rows")
    return rows


def _check_column(rows: list[Row], column: str, uri: str) -> None:
    there = [str(name) for name in rows[0]]
    if column not in there:
        hint = did_you_mean(column, there)
        raise UserError(f"{uri} has no column '{column}': {hint}it has {', '.join(there)}")


def _text(row: Row, column: str | None) -> str:
    value = row.get(column) if column else None
    return "" if value is None else str(value).strip()
