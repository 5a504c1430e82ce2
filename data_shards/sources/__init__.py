"""Sources: one module for each kind of data set, each a generator of records."""

from data_shards.sources.embedded import embedded_records
from data_shards.sources.medvqa import medvqa_records
from data_shards.sources.roco import roco_records
from data_shards.sources.table import Columns, table_records

__all__ = ["Columns", "embedded_records", "medvqa_records", "roco_records", "table_records"]
