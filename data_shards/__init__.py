"""From a source data set to a stream of batches: sources, writer, manifest, precompute, plan, stream."""

from data_shards.manifest import Manifest
from data_shards.precompute import check_precomputed
from data_shards.prompts import PromptStore
from data_shards.sample import Batch, Record, derive_seed
from data_shards.stream import ShardStream
from data_shards.writer import Settings, write_shards

__all__ = [
    "Batch",
    "Manifest",
    "PromptStore",
    "Record",
    "Settings",
    "ShardStream",
    "check_precomputed",
    "derive_seed",
    "write_shards",
]
