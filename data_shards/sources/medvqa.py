"""MEDVQA-GI (ImageCLEFmed 2024): prompt-gt.csv with `Filename;Prompt`, several prompts an image; images/ beside it.

File names sometimes lack their ending. If there is a metadata.csv with a `group` or `license` column for each
`Filename`, it is used.
"""

from collections.abc import Iterator

from cluster import storage
from cluster.errors import UserError
from data_shards.sample import Record
from data_shards.sources.metadata import with_metadata
from data_shards.sources.table import Columns, table_records

TABLE = "prompt-gt.csv"


def medvqa_records(folder: str) -> Iterator[Record]:
    """Records of a MEDVQA-GI folder. Raises UserError if prompt-gt.csv is missing or lacks its columns."""
    table = storage.join(folder, TABLE)
    if not storage.exists(table):
        raise UserError(f"{folder} is not in the MEDVQA-GI format: {TABLE} is not there")
    records = table_records(table, storage.join(folder, "images"), Columns(image="Filename", caption="Prompt"))
    return with_metadata(records, folder)
