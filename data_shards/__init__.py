"""From a source data set to a stream of batches: sources, writer, manifest, precompute, plan, stream."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_MODULES = {
    "Batch": "sample",
    "Manifest": "manifest",
    "PromptStore": "prompts",
    "Record": "sample",
    "Settings": "writer",
    "ShardStream": "stream",
    "check_precomputed": "precompute",
    "derive_seed": "sample",
    "write_shards": "writer",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, and no more: a stream needs torch, and a manifest does not."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
