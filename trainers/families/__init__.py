"""Families of models: all that the loop and its launch need to know of one, as the functions of one module each.

A module is read only when its family is trained: MSDM does not need DeepSpeed.
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from cluster import storage
from cluster.nodes import Node
from cluster.progress import OnProgress
from data_shards import Manifest
from data_shards.manifest import check_present
from trainers.recipe import Recipe, Training
from trainers.recipe.blocks import Cache
from trainers.run_folder import RunFolder

if TYPE_CHECKING:  # to know what a family trains, nobody need wait for torch
    import torch

    from data_shards import ShardStream
    from data_shards.block_cache import BlockCache
    from trainers.engines import Engine
    from trainers.stage import Stage


class Family(Protocol):
    """What `trainers/families/NAME.py` provides; `recipe` is that family's own."""

    STAGES: tuple[str, ...]
    """What is trained, in this order; the last one's export is the model."""

    def training_of(self, recipe: Any, stage: str) -> Training:
        """How a stage is trained."""
        ...

    def check(self, recipe: Any) -> Manifest:
        """The manifest of the data. Raises UserError now, not after minutes, for what training will lack."""
        ...

    def check_fits(self, recipe: Any, nodes: Sequence[Node]) -> None:
        """Raises UserError, before a worker starts, if the cluster's machines could never hold the training."""
        ...

    def prepare(self, recipe: Any, stage: str, run: RunFolder, on_progress: OnProgress) -> None:
        """Make, once, what a stage reads besides the recipe's data; or its model, if that is taken from elsewhere.

        Raises UserError if it cannot be made.
        """
        ...

    def open_stream(
        self, recipe: Any, stage: str, run: RunFolder, split: str, *, rank: int = 0, world_size: int = 1
    ) -> "ShardStream":
        """What a stage reads."""
        ...

    def build(self, recipe: Any, stage: str, run: RunFolder, device: "torch.device") -> "tuple[Stage, Engine]":
        """A stage and the engine that trains it, on this rank of the default process group."""
        ...

    def export(self, recipe: Any, stage: str, run: RunFolder, checkpoint: Path, out: Path) -> None:
        """Write a finished stage's checkpoint to `out` as a model in the diffusers layout."""
        ...


def check_shards(recipe: Recipe) -> None:
    """Raises UserError if the data is not there: a part of what `check` finds, but without a family's imports."""
    manifest = Manifest.load(recipe.data.shards)
    if recipe.family == "msdm":  # FLUX reads the precomputed set alone
        check_splits(recipe.data.shards, manifest)


def check_splits(shards_uri: str, manifest: Manifest) -> None:
    """Raises UserError if a shard of what training and validation read is not there."""
    for split in ("train", "validation"):
        check_present(shards_uri, manifest.split(split))


def block_cache(cache: Cache | None) -> "BlockCache | None":
    if cache is None:
        return None
    from data_shards.block_cache import BlockCache

    return BlockCache(storage.local_path(cache.folder), int(cache.max_gigabytes * 1e9))


def stream_from(
    shards_uri: str, recipe: Recipe, training: Training, split: str, *, rank: int, world_size: int
) -> "ShardStream":
    """A split of `shards_uri`, dealt out as `training` says; what else there is to say of data, the recipe does."""
    from data_shards import ShardStream

    return ShardStream(
        shards_uri,
        split=split,
        resolution=recipe.data.resolution,
        global_batch_size=training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
        seed=recipe.seed,
        rank=rank,
        world_size=world_size,
        horizontal_flip=recipe.data.horizontal_flip,
        num_workers=recipe.data.num_workers,
        cache=block_cache(recipe.data.cache),
    )


def family_of(recipe: Recipe) -> Family:
    return cast(Family, import_module(f"trainers.families.{recipe.family}"))
