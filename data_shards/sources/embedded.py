"""Images within rows: Parquet files and data sets that Hugging Face `datasets` saved to disk.

The writer shuffles samples, and rows can only be read in order. So one pass over each file, a batch of rows at a time,
unpacks its encoded images into one plain file, from which each is then read by its offset.
"""

import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from cluster import storage
from cluster.documents import parsing, read_json
from cluster.errors import UserError
from data_shards.names import split_name
from data_shards.sample import Record
from data_shards.sources.table import Columns, Gathered, check_columns, read_row
from data_shards.sources.values import BadValueError

ROWS = 64  # of a Parquet file held at a time; Arrow files hold rows in batches of their own
PARQUET_NAME = re.compile(r"(?P<split>[A-Za-z]+)([-_.].*)?\.parquet")  # such as train-00000-of-00012.parquet


@dataclass(frozen=True)
class RowFile:
    """A file of rows."""

    uri: str
    name: str
    """What its rows' images are named by: its path in the data set, less its ending."""
    split: str | None
    """What its name, or its data set, says that its rows belong to."""


@dataclass
class Image:
    """What is known of one image when all its rows were seen."""

    source_id: str
    folder: str
    part: tuple[int, int] | None
    checksum: int | None
    said: Gathered = field(default_factory=Gathered)


@contextmanager
def embedded_records(
    source: str, out: str, columns: Columns, *, images: str | None = None, split_by_file: bool = False
) -> Iterator[Iterator[Record]]:
    """Records of a Parquet file, a folder of them, or a data set saved to disk; for as long as the block lasts.

    Their images are unpacked below `out`, and removed at the end. Without `columns.id` each row is an image, named by
    its file and number. Rows that have no bytes but a path name a file in `images` (default: beside the rows' file).
    With `split_by_file`, the name of the file or of the saved split says which split its rows belong to.

    Raises UserError if nothing of the kind is at `source`, if it cannot be read, or lacks a column.
    """
    if not (files := row_files(source)):
        raise UserError(f"{source} has no rows")
    if split_by_file and (nameless := [file.uri for file in files if file.split is None]):
        raise UserError(f"{nameless[0]} names no split: call it such as train-00000.parquet, or leave --split-by-file")
    unpacked = storage.join(out, "unpacked")
    try:
        yield _records(files, unpacked, columns, images, split_by_file)
    finally:
        for name in storage.list_files(unpacked):
            storage.delete(storage.join(unpacked, name))
        if not storage.is_remote(unpacked):
            shutil.rmtree(storage.local_path(unpacked), ignore_errors=True)


def row_files(source: str) -> list[RowFile]:
    """The files of rows at `source`, in order."""
    folder, _, name = source.rpartition("/")
    if name.endswith(".parquet"):
        return [replace(_row_file(folder, name), uri=source)]
    names = storage.list_files(source)
    if "dataset_dict.json" in names:
        splits = _listed(storage.join(source, "dataset_dict.json"), "splits")
        return [replace(f, name=f"{split}/{f.name}") for split in splits for f in _saved(source, split)]
    if "state.json" in names:
        return _saved(source)
    if found := [name for name in names if name.endswith(".parquet") and not name.startswith(".")]:
        return [_row_file(source, name) for name in found]
    raise UserError(f"{source} holds no rows: expected *.parquet, or a data set saved by save_to_disk")


def _row_file(folder: str, name: str, split: str | None = None) -> RowFile:
    if split is None and (stated := PARQUET_NAME.fullmatch(PurePosixPath(name).name)):
        split = stated["split"]
    return RowFile(
        storage.join(folder, name), str(PurePosixPath(name).with_suffix("")), split_name(split) if split else None
    )


def _saved(source: str, split: str | None = None) -> list[RowFile]:
    folder = storage.join(source, split) if split else source
    uri = storage.join(folder, "state.json")
    state = read_json(uri)
    with parsing(uri):
        if state.get("_indices_data_files"):
            raise UserError(f"{folder} is a selection saved by an old version of datasets: load it and save it again")
        files = [_inside(str(file["filename"]), uri) for file in state["_data_files"]]
        return [_row_file(folder, name, split or state.get("_split")) for name in files]


def _listed(uri: str, key: str) -> list[str]:
    document = read_json(uri)
    with parsing(uri):
        return [_inside(str(name), uri) for name in document[key]]


def _inside(name: str, uri: str) -> str:
    if not name or name.startswith(".") or "/" in name or "\\" in name:
        raise UserError(f"{uri} is damaged, or of another kind: '{name}' is no name of a file beside it")
    return name


# --- rows ---


def _records(
    files: list[RowFile], unpacked: str, columns: Columns, images: str | None, split_by_file: bool
) -> Iterator[Record]:
    found: dict[tuple[str, str], Image] = {}
    faulty: list[Record] = []
    for number, file in enumerate(files):
        uri = storage.join(unpacked, f"{number:06d}.images")
        with tempfile.NamedTemporaryFile() as blob:
            for row_number, (row, encoded, path) in enumerate(_rows(file, columns)):
                try:
                    said = read_row(row, columns.id, columns)
                except BadValueError as problem:
                    place = f"{file.name}-{row_number:06d}"
                    faulty.append(Record(place, uri, (), fault=f"{problem} (row {row_number} of {file.uri})"))
                    continue
                if split_by_file:
                    said = said._replace(split=file.split or "")
                name = said.name if columns.id else f"{file.name}-{row_number:06d}"
                checksum = None if encoded is None else zlib.crc32(encoded)
                identity = (said.split, name or f"row {row_number} of {file.uri}")  # each nameless one is bad by itself
                image = found.get(identity)
                if image is None:
                    if encoded is None:
                        folder = images or file.uri.rpartition("/")[0]
                        image = Image(path or name, folder, None, checksum)
                    else:
                        image = Image(name, uri, _append(blob, encoded), checksum)
                    found[identity] = image
                elif image.checksum != checksum:
                    raise UserError(
                        f"{file.uri}, row {row_number}: '{name}' in column '{columns.id}' names two different images; "
                        "give the column that names one each with --id-column"
                    )
                image.said.add(said)
            blob.flush()
            storage.upload_file(Path(blob.name), uri)
    if not found and not faulty:
        raise UserError(f"{files[0].uri} has no rows")
    for image in found.values():
        yield image.said.record(image.source_id, image.folder, image.part)
    yield from faulty


def _append(blob: Any, encoded: memoryview) -> tuple[int, int]:
    offset = blob.tell()
    blob.write(encoded)
    return offset, len(encoded)


def _rows(file: RowFile, columns: Columns) -> Iterator[tuple[Mapping[str, Any], memoryview | None, str]]:
    """Each row's values, its encoded image and the path that it gives for it."""
    filesystem, path = storage.arrow_filesystem(file.uri)
    storage.size(file.uri)  # which explains better than Arrow why it cannot be read
    with parsing(file.uri):
        reads = _parquet_batches if file.uri.endswith(".parquet") else _arrow_batches
        with filesystem.open_input_file(path) as opened:
            for batch in reads(opened, columns, file.uri):
                batch.validate(full=True)  # or what a damaged file says of offsets would be believed
                values = batch.select([name for name in columns.used if name != columns.image]).to_pylist()
                yield from zip(values, *_images(batch.column(columns.image), columns.image, file.uri), strict=True)


def _parquet_batches(file: Any, columns: Columns, uri: str) -> Iterator[pyarrow.RecordBatch]:
    parquet = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**20)
    check_columns(columns.used, parquet.schema_arrow.names, uri)
    yield from parquet.iter_batches(ROWS, columns=columns.used, use_threads=False)


def _arrow_batches(file: BinaryIO, columns: Columns, uri: str) -> Iterator[pyarrow.RecordBatch]:
    with pyarrow.ipc.open_stream(file) as stream:
        check_columns(columns.used, stream.schema.names, uri)
        for batch in stream:
            yield batch.select(columns.used)


def _images(column: pyarrow.Array, name: str, uri: str) -> tuple[list[memoryview | None], list[str]]:
    """Encoded images and paths of a column, as Hugging Face stores them {bytes, path}, or of bytes alone."""
    encoded, paths = column, [""] * len(column)
    if pyarrow.types.is_struct(column.type):
        parts = dict(zip([part.name for part in column.type], column.flatten(), strict=True))
        if "bytes" in parts:
            encoded = parts["bytes"]
        if "path" in parts:
            paths = [str(path or "") for path in parts["path"].to_pylist()]
    if not (pyarrow.types.is_binary(encoded.type) or pyarrow.types.is_large_binary(encoded.type)):
        raise UserError(
            f"{uri}: column '{name}' holds {column.type}, no images: name the column of images with --image-column, "
            "or read file names with --format table"
        )
    return [None if image is None else memoryview(image) for image in map(_buffer, encoded)], paths


def _buffer(scalar: Any) -> Any:
    return scalar.as_buffer()  # without copying; None for null
