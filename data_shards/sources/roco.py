"""ROCOv2: a captions CSV with `ID,Caption` and a folder of images named ID.jpg.

The CSV may be called captions.csv or *_captions.csv, as published; the images are in images/ or beside the CSV. If
there is a metadata.csv with a `group` or `license` column for each `Filename`, it is used.
"""

from collections.abc import Iterator

from cluster import storage
from cluster.errors import UserError
from data_shards.sample import Record
from data_shards.sources.metadata import with_metadata
from data_shards.sources.table import Columns, table_records


def roco_records(folder: str) -> Iterator[Record]:
    """Records of a ROCOv2 folder. Raises UserError if there is not exactly one captions CSV."""
    names = storage.list_files(folder)
    tables = [name for name in names if "/" not in name and name.lower().endswith("captions.csv")]
    if len(tables) != 1:
        found = ", ".join(tables) or "none"
        raise UserError(f"{folder} is not in the ROCOv2 format: expected one *captions.csv, found {found}")
    images = storage.join(folder, "images") if any(name.startswith("images/") for name in names) else folder
    records = table_records(storage.join(folder, tables[0]), images, Columns(image="ID", caption="Caption"))
    return with_metadata(records, folder)
