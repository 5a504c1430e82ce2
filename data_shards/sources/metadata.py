"""Groups and licences from a metadata.csv beside a data set."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import PurePosixPath

from cluster import storage
from data_shards.sample import Record
from data_shards.sources.table import read_rows


def with_metadata(records: Iterator[Record], folder: str) -> Iterator[Record]:
    """Records with the `group` and `license` that FOLDER/metadata.csv gives for their file names, if it is there."""
    table = storage.join(folder, "metadata.csv")
    rows = read_rows(table) if storage.exists(table) else []
    known = {PurePosixPath(str(row.get("Filename"))).stem: row for row in rows}
    for record in records:
        row = known.get(PurePosixPath(record.source_id).stem, {})
        yield replace(record, group=row.get("group") or record.group, licence=row.get("license") or record.licence)
