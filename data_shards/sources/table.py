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

from cluster.documents import read_small
from cluster.errors import UserError, did_you_mean
from data_shards.sample import Record

Row = Mapping[str, Any]
MAX_TABLE_BYTES = 2**30  # some five million captions; all are held in memory
PARQUET_ROWS = 10_000  # read at a time
ROW_BYTES = 256  # that Python takes for a row beside its values


@dataclass(frozen=True)
class Columns:
    """Names of the columns; the optional ones may be None."""

    image: str = "image"
    caption: str = "caption"
    group: str | None = None
    licence: str | None = None
    split: str | None = None
    id: str | None = None
    """Of images within rows: what names an image, where a row does not stand for one of its own."""

    @property
    def used(self) -> list[str]:
        """The names that are not None, each once."""
        names = (self.image, self.caption, self.group, self.licence, self.split, self.id)
        return list(dict.fromkeys(name for name in names if name is not None))


def table_records(table_uri: str, images_uri: str, columns: Columns) -> Iterator[Record]:
    """Records of a table. Rows that name the same image are its captions.

    Raises UserError if the table cannot be read or lacks a column.
    """
    rows = read_rows(table_uri)
    check_columns(columns, [str(name) for name in rows[0]], table_uri)
    return records_of(rows, images_uri, columns)


def records_of(rows: Sequence[Row], images_uri: str, columns: Columns) -> Iterator[Record]:
    """Join the rows of each image, in the order in which images first appear.

    Tables sometimes name an image with its ending in one row and without it in another.
    """
    with_ending: dict[str, set[str]] = {}
    for row in rows:
        name = text_of(row, columns.image)
        with_ending.setdefault(name.rpartition(".")[0], set()).add(name)
    by_image: dict[str, list[Row]] = {}
    for row in rows:
        name = text_of(row, columns.image)
        fuller = with_ending.get(name, set())
        by_image.setdefault(min(fuller) if len(fuller) == 1 else name, []).append(row)
    for image, its_rows in by_image.items():
        captions = dict.fromkeys(text_of(row, columns.caption) for row in its_rows)
        yield Record(
            source_id=image,
            folder=images_uri,
            captions=tuple(caption for caption in captions if caption),
            group=text_of(its_rows[0], columns.group) or None,
            licence=text_of(its_rows[0], columns.licence) or None,
            split=text_of(its_rows[0], columns.split) or None,
        )


def read_rows(uri: str, delimiter: str | None = None) -> list[Row]:
    """All rows of a table, by the ending of its name. Raises UserError if it has none or cannot be read."""
    ending = PurePosixPath(uri).suffix.lower()
    data = read_small(uri, MAX_TABLE_BYTES)
    try:
        if ending == ".parquet":
            rows: list[Row] = list(_parquet_rows(data))
        elif ending in (".jsonl", ".ndjson"):
            rows = [json.loads(line) for line in io.StringIO(data.decode("utf-8-sig")) if line.strip()]
        elif ending in (".csv", ".tsv", ".txt"):
            text = data.decode("utf-8-sig")
            header = text.partition("\n")[0]
            likely = max(",;\t", key=header.count)
            rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter or likely))
        else:
            raise UserError(f"{uri}: a table must end in .csv, .tsv, .jsonl or .parquet")
    except UserError:
        raise
    except Exception as error:  # such as Arrow's own, and RecursionError for JSON that is too deep
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{uri} cannot be read as {ending[1:]}: {reason}") from None
    if not rows:
        raise UserError(f"{uri} has no rows")
    if not all(isinstance(row, Mapping) for row in rows):
        raise UserError(f"{uri} cannot be read as {ending[1:]}: a row of it is not {{column: value, ...}}")
    return rows


def _parquet_rows(data: bytes) -> Iterator[Row]:
    """Raises ValueError when they grow beyond MAX_TABLE_BYTES: encoded, a million equal values take a few bytes."""
    left = MAX_TABLE_BYTES
    for batch in pyarrow.parquet.ParquetFile(io.BytesIO(data)).iter_batches(PARQUET_ROWS):
        left -= batch.nbytes + batch.num_rows * ROW_BYTES
        if left < 0:
            raise ValueError(f"its values take more than {MAX_TABLE_BYTES} bytes")
        yield from batch.to_pylist()


def check_columns(columns: Columns, there: Sequence[str], uri: str) -> None:
    """Raise UserError for a column that is not there."""
    for column in columns.used:
        if column not in there:
            hint = did_you_mean(column, there)
            raise UserError(f"{uri} has no column '{column}': {hint}it has {', '.join(there)}")


def text_of(row: Row, column: str | None) -> str:
    value = row.get(column) if column else None
    return "" if value is None else str(value).strip()
