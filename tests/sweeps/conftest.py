"""A tiny model on disk, real images and an extractor, as evaluations have them."""

from tests.trainers.conftest import pipeline
from tests.trainers.test_evaluate import extractor, real_shards

__all__ = ["extractor", "pipeline", "real_shards"]
