"""Any folder of images with a table beside it: CSV, TSV, JSON Lines or Parquet, one row an image or a caption."""

import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, NamedTuple, TypeVar

import pyarrow
import pyarrow.parquet

from cluster.documents import read_small
from cluster.errors import UserError, did_you_mean
from data_shards.names import ENDINGS, normal, split_name, without_ending
from data_shards.sample import Record
from data_shards.sources.values import BadValueError, label, text, texts

T = TypeVar("T")
MAX_TABLE_BYTES = 2**30  # some five million captions; all are held in memory
PARQUET_ROWS = 10_000  # read at a time
ROW_BYTES = 256  # that Python takes for a row beside its values
HEADER = re.compile(r"[\r\n ]*([^\r\n]*)")
SEPARATOR = re.compile(r'"?sep=([^"\r\n])"?(?:\r\n|\n|\r|$)', re.IGNORECASE)
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
REMEDY = "save it as UTF-8 ('CSV UTF-8' in spreadsheets), or convert it, such as with iconv -f WINDOWS-1252 -t UTF-8"


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


class Row(dict[str, Any]):
    """What a table says in each column."""

    place: int | None = None
    """Its line or number, in the words of `Table.places`."""
    fault: str | None = None
    """Why it cannot be read: its kind, a colon, and the particulars."""


class Table(list[Row]):
    """Rows, at least one."""

    columns: Sequence[str] = ()
    """Their names, as often as they are there."""
    places: str = "row"


class Reading(NamedTuple):
    """What a row says of an image; empty where it says nothing."""

    name: str
    captions: tuple[str, ...]
    group: str
    licence: str
    split: str


@dataclass(slots=True)
class Gathered:
    """What all rows of one image say of it."""

    captions: dict[str, None] = field(default_factory=dict)
    group: str = ""
    licence: str = ""
    split: str = ""
    fault: str | None = None

    def add(self, row: Reading) -> None:
        self.captions.update(dict.fromkeys(row.captions))
        for what in ("group", "licence", "split"):
            known, said = getattr(self, what), getattr(row, what)
            if known and said and known != said:
                self.fault = f"two {what}s: its rows say '{known}' and '{said}'"
            setattr(self, what, known or said)

    def record(self, source_id: str, folder: str, part: tuple[int, int] | None = None) -> Record:
        return Record(
            source_id=source_id,
            folder=folder,
            captions=tuple(self.captions),
            group=self.group or None,
            licence=self.licence or None,
            split=self.split or None,
            part=part,
            fault=self.fault,
        )


def table_records(table_uri: str, images_uri: str, columns: Columns) -> Iterator[Record]:
    """Records of a table. Rows that name the same image are its captions.

    Raises UserError if the table cannot be read or lacks a column.
    """
    table = read_rows(table_uri)
    check_columns(columns.used, table.columns, table_uri)
    return records_of(table, images_uri, columns)


def records_of(rows: Sequence[Mapping[str, Any]], images_uri: str, columns: Columns) -> Iterator[Record]:
    """Join the rows of each image, in the order in which images first appear; then the rows that cannot be used.

    Tables sometimes name an image with its ending in one row and without it in another.
    """
    readings: list[Reading] = []
    faulty: list[Record] = []
    for number, row in enumerate(rows, start=1):
        try:
            reading = read_row(row, columns.image, columns)
            name = normal(reading.name, images_uri)
            if not name:
                raise BadValueError(f"no file name: column '{columns.image}' is empty")
            readings.append(reading._replace(name=name))
        except BadValueError as problem:
            place = f"{getattr(rows, 'places', 'row')} {getattr(row, 'place', None) or number}"
            named = row.get(columns.image)
            source_id = named if isinstance(named, str) and named.strip() else place
            faulty.append(Record(source_id, images_uri, (), fault=f"{problem} ({place})"))
    with_ending: dict[str, set[str]] = {}
    for reading in readings:
        if (stem := without_ending(reading.name)) != reading.name:
            with_ending.setdefault(stem, set()).add(reading.name)
    images: dict[str, Gathered] = {}
    for reading in readings:
        fuller = with_ending.get(reading.name, set())
        images.setdefault(min(fuller) if len(fuller) == 1 else reading.name, Gathered()).add(reading)
    for name, image in images.items():
        yield image.record(name, images_uri)
    yield from faulty


def read_row(row: Mapping[str, Any], name_column: str | None, columns: Columns) -> Reading:
    """What a row says, its image's name in `name_column`. Raises BadValueError, which names the column."""

    def read(column: str | None, meaning: Callable[[Any], T], nothing: T) -> T:
        if column is None:
            return nothing
        try:
            return meaning(row.get(column))
        except BadValueError as error:
            raise BadValueError(f"unusable value: column '{column}' holds {error}") from None

    if fault := getattr(row, "fault", None):
        raise BadValueError(fault)
    return Reading(
        name=read(name_column, text, ""),
        captions=read(columns.caption, texts, ()),
        group=read(columns.group, label, ""),
        licence=read(columns.licence, text, ""),
        split=split_name(read(columns.split, label, "")),
    )


def check_columns(columns: Sequence[str], there: Sequence[str], uri: str) -> None:
    """Raise UserError for a column that is not there, or that is there twice."""
    for column in columns:
        if column not in there:
            hint = did_you_mean(column, there)
            raise UserError(f"{uri} has no column '{column}': {hint}it has {', '.join(there)}")
        if list(there).count(column) > 1:
            raise UserError(f"{uri} has the column '{column}' twice: rename one of them")


# --- reading ---


def read_rows(uri: str) -> Table:
    """All rows of a table, by the ending of its name. Raises UserError if it has none or cannot be read."""
    ending = PurePosixPath(uri).suffix.lower()
    if ending not in READERS:
        raise UserError(f"{uri}: a table must end in .csv, .tsv, .jsonl or .parquet")
    data = read_small(uri, MAX_TABLE_BYTES)
    try:
        table = READERS[ending](data)
    except Exception as error:  # such as Arrow's own, and RecursionError for JSON that is too deep
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{uri} cannot be read as {ending[1:]}: {reason}") from None
    if not table:
        raise UserError(f"{uri} has no rows")
    return table


def _read_parquet(data: bytes) -> Table:
    """Raises ValueError when they grow beyond MAX_TABLE_BYTES: encoded, a million equal values take a few bytes."""
    table, left = Table(), MAX_TABLE_BYTES
    file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
    table.columns = file.schema_arrow.names
    for batch in file.iter_batches(PARQUET_ROWS):
        left -= batch.nbytes + batch.num_rows * ROW_BYTES
        if left < 0:
            raise ValueError(f"its values take more than {MAX_TABLE_BYTES} bytes")
        table.extend(map(Row, batch.to_pylist()))
    return table


def _read_jsonl(data: bytes) -> Table:
    table, columns = Table(), dict[str, None]()
    table.places = "line"
    for number, line in enumerate(io.StringIO(_decoded(data)), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: {getattr(error, 'msg', error)}") from None
        if not isinstance(document, dict):
            raise ValueError(f"line {number}: a row of it is not {{column: value, ...}}")
        row = Row(document)
        row.place = number
        columns |= dict.fromkeys(row)
        table.append(row)
    table.columns = list(columns)
    return table


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError(f"it names '{Counter(name for name, _ in pairs).most_common(1)[0][0]}' twice")
    return found


def _read_csv(data: bytes) -> Table:
    """RFC 4180, and nothing more lenient: what does not fit would be cut, moved or joined without a word."""
    content = _decoded(data)
    stated = SEPARATOR.match(content)  # which Excel writes and reads
    start = stated.end() if stated else 0
    delimiter = stated[1] if stated else _delimiter(content)
    stream = io.StringIO(content, newline="")
    stream.seek(start)
    lines = csv.reader(stream, delimiter=delimiter, strict=True, skipinitialspace=True)
    swallowed = re.compile(
        rf"[\r\n][^\r\n]*({'|'.join(map(re.escape, ENDINGS))})\"?{re.escape(delimiter)}", re.IGNORECASE
    )
    table, columns = Table(), list[str]()
    table.places = "line"
    while True:
        line = lines.line_num + 1 + bool(stated)
        try:
            fields = next(lines)
        except StopIteration:
            break
        except csv.Error as error:
            raise ValueError(f"line {line}: {_explained(error)}") from None
        if not any(field.strip() for field in fields):
            continue
        if not columns:
            table.columns = columns = [name.strip() for name in fields]
            continue
        spans_lines = lines.line_num + bool(stated) > line
        if spans_lines and any(map(swallowed.search, fields)):
            raise ValueError(f"line {line}: a quoted field holds what look like rows: its quote is not closed, or late")
        row = Row(zip(columns, fields, strict=False))
        row.place = line
        if len(fields) != len(columns):
            row.fault = f"malformed row: {_count(len(fields), 'field')}, the table has {_count(len(columns), 'column')}"
        table.append(row)
    return table


def _delimiter(content: str) -> str:
    """By the header, outside its quotes."""
    header = re.sub(r'"[^"]*"', "", HEADER.match(content)[1])  # type: ignore[index]
    return "\t" if "\t" in header else max(",;", key=header.count)


READERS = {
    **dict.fromkeys((".csv", ".tsv", ".txt"), _read_csv),
    **dict.fromkeys((".jsonl", ".ndjson"), _read_jsonl),
    ".parquet": _read_parquet,
}


def _explained(error: csv.Error) -> str:
    said = str(error)
    if "unexpected end of data" in said:
        return "a quote is opened there and never closed"
    if "field limit" in said:
        return f"a field of more than {csv.field_size_limit()} characters: is a quote there not closed?"
    if "expected after" in said:
        return "a quoted field goes on behind its closing quote: write a quote within a field twice"
    return said


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _decoded(data: bytes) -> str:
    """Text of UTF-8, or of what its first bytes say. Raises ValueError, with the line and the remedy."""
    encoding = next((name for mark, name in MARKS if data.startswith(mark)), "utf-8")
    try:
        content = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line} is not {encoding.upper()}: {REMEDY}") from None
    content = content.removeprefix("\ufeff")
    if (nul := content.find("\0")) >= 0:
        line = content.count("\n", 0, nul) + 1
        raise ValueError(f"line {line} has a NUL character: it is damaged, or UTF-16 that does not say so; {REMEDY}")
    return content
