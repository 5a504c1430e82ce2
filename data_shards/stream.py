"""From shards to batches: a chain of small stages, each a generator or a plain function.

plan -> windows (one ranged read for each stretch) -> samples (checked, expanded) -> decoded -> batches
"""

import io
import json
import logging
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor
from webdataset.tariterators import group_by_keys, tar_file_expander

from cluster import storage
from cluster.errors import UserError
from data_shards.decode import ImageError, decode
from data_shards.manifest import Manifest, ShardEntry
from data_shards.plan import Place, Plan, Stretch
from data_shards.sample import Batch, derive_seed

T = TypeVar("T")
logger = logging.getLogger(__name__)

WINDOW_SIZE = 64  # samples; a rank holds two windows for each sample of its share of a global batch
STEPS_AHEAD = 2
FETCH_THREADS = 4
MAX_BAD_IN_A_ROW = 16
IMAGE_MEMBERS = ("jpg", "png")


@dataclass(frozen=True)
class Encoded:
    """A sample as it is in its shard."""

    index: int
    key: str
    image: bytes
    captions: list[str]


class ShardStream:
    """The batches of one rank, in the planned order, the same whatever the number of ranks and threads.

    Raises UserError when the batch sizes do not divide or the split does not exist.
    """

    def __init__(
        self,
        shards_uri: str,
        *,
        split: str,
        resolution: int,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        horizontal_flip: bool = False,
        num_workers: int = 1,
    ) -> None:
        if global_batch_size % (micro_batch_size * world_size):
            raise UserError(
                f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} "
                f"x {world_size} workers"
            )
        manifest = Manifest.load(shards_uri)
        self.manifest_digest = manifest.digest
        self.replaced = 0
        """Samples that could not be decoded and gave their place to another."""
        self._uri = shards_uri
        self._shards = manifest.split(split)
        self._first_index = [0]
        for shard in self._shards:
            self._first_index.append(self._first_index[-1] + shard.num_samples)
        self._plan = Plan(
            counts=tuple(shard.num_samples for shard in self._shards),
            digest=manifest.digest,
            seed=seed,
            global_batch_size=global_batch_size,
            window_size=WINDOW_SIZE,
        )
        self._resolution = resolution
        self._micro_batch_size = micro_batch_size
        self._seed = seed
        self._rank, self._world_size = rank, world_size
        self._horizontal_flip = horizontal_flip
        self._num_workers = num_workers

    @property
    def num_samples(self) -> int:
        return self._first_index[-1]

    def batches(self, start_step: int = 0) -> Iterator[list[Batch]]:
        """For each step from `start_step` on, without end: this rank's micro-batches."""
        steps = self._steps(start_step)
        return prefetched(steps, STEPS_AHEAD) if self._num_workers else steps

    def one_pass(self, micro_batch_size: int) -> Iterator[Batch]:
        """This rank's share of the split, each sample once, in the manifest's order and never mirrored.

        Seeds are the same in every pass. Samples that cannot be decoded are left out.
        """
        first, last = (self.num_samples * rank // self._world_size for rank in (self._rank, self._rank + 1))
        for start in range(first, last, micro_batch_size):
            decoded = []
            for stretch in self._stretches(start, min(start + micro_batch_size, last)):
                for sample in self.read(stretch):
                    with suppress(ImageError):
                        decoded.append((sample, decode(sample.image, self._resolution)))
            if decoded:
                seeds = [derive_seed(self._seed, "one pass", sample.index) for sample, _ in decoded]
                yield _batch(decoded, seeds, flip=False)

    def _steps(self, start_step: int) -> Iterator[list[Batch]]:
        share = self._plan.global_batch_size // self._world_size
        slots = range(self._rank * share, (self._rank + 1) * share)
        with (
            ThreadPoolExecutor(FETCH_THREADS) as fetchers,
            ThreadPoolExecutor(max(1, self._num_workers)) as decoders,
        ):
            windows = _Windows(self, fetchers)
            decode_all = decoders.map if self._num_workers else map
            for step in count(start_step):
                places = [self._plan.place(step, slot) for slot in slots]
                samples = [windows.sample_at(place) for place in places]
                seeds = [
                    derive_seed(self._seed, place.epoch, sample.index)
                    for place, sample in zip(places, samples, strict=True)
                ]
                decoded = list(decode_all(self._decode, samples))
                size = self._micro_batch_size
                yield [
                    _batch(decoded[at : at + size], seeds[at : at + size], flip=self._horizontal_flip)
                    for at in range(0, share, size)
                ]

    def _decode(self, sample: Encoded) -> tuple[Encoded, Tensor]:
        """The sample with its image, or the next one of its shard that can be decoded in its place.

        Raises UserError if MAX_BAD_IN_A_ROW samples cannot.
        """
        for candidate in self._from(sample):
            try:
                return candidate, decode(candidate.image, self._resolution)
            except ImageError as error:
                self.replaced += 1
                logger.warning("sample %s of %s left out: %s", candidate.key, self._uri, error)
        raise UserError(f"no image can be read from sample '{sample.key}' of {self._uri} on: are these images?")

    def _from(self, sample: Encoded) -> Iterator[Encoded]:
        """The sample and those that follow it in its shard, whose end is followed by its beginning."""
        yield sample
        number = bisect_right(self._first_index, sample.index) - 1
        start, length = sample.index - self._first_index[number], self._shards[number].num_samples
        for distance in range(1, min(length, MAX_BAD_IN_A_ROW)):
            at = (start + distance) % length
            yield from self.read(Stretch(number, at, at + 1))

    # --- reading ---

    @property
    def plan(self) -> Plan:
        return self._plan

    def read(self, stretch: Stretch) -> list[Encoded]:
        """Consecutive samples of a shard, by one ranged read.

        Raises UserError naming the shard and the sample if the bytes are not those of the manifest.
        """
        shard = self._shards[stretch.shard]
        entries = shard.samples[stretch.start : stretch.stop]
        uri = storage.join(self._uri, shard.name)
        begin = entries[0].offset
        data = storage.read_bytes(uri, begin, entries[-1].offset + entries[-1].length - begin)
        for entry in entries:
            found = zlib.crc32(data[entry.offset - begin : entry.offset - begin + entry.length])
            if found != entry.crc32:
                raise UserError(
                    f"{uri} is damaged at sample '{entry.key}': CRC-32 {found:08x}, the manifest says "
                    f"{entry.crc32:08x}; write the shards again, or fetch them again"
                )
        first = self._first_index[stretch.shard] + stretch.start
        return [_encoded(first + i, members) for i, members in enumerate(_expand(data, uri))]

    def _stretches(self, start: int, stop: int) -> Iterator[Stretch]:
        """The stretches of shards under samples [start, stop) in the manifest's order."""
        for number, shard in enumerate(self._shards):
            first = self._first_index[number]
            begin, end = max(start - first, 0), min(stop - first, shard.num_samples)
            if begin < end:
                yield Stretch(number, begin, end)


class _Windows:
    """The windows in use, and of each lane the next one already on its way."""

    def __init__(self, stream: ShardStream, fetchers: ThreadPoolExecutor) -> None:
        self._stream = stream
        self._fetchers = fetchers
        self._fetched: dict[Place, Future[list[Encoded]]] = {}

    def sample_at(self, place: Place) -> Encoded:
        first = replace(place, k=0)
        samples = self._fetch(first).result()
        if place.lane >= 0:
            self._start_next(first)
        if place.k == len(samples) - 1:
            del self._fetched[first]
        return samples[place.k]

    def _fetch(self, first: Place) -> Future[list[Encoded]]:
        if first not in self._fetched:
            # What other ranks used up of a window at the seam of two epochs never comes to its end here.
            for old in [place for place in self._fetched if place.epoch < first.epoch - 1]:
                del self._fetched[old]
            self._fetched[first] = self._fetchers.submit(self._read, first)
        return self._fetched[first]

    def _start_next(self, first: Place) -> None:
        following = replace(first, window=first.window + 1)
        if following.window < self._stream.plan.epoch(first.epoch).windows_per_lane:
            self._fetch(following)

    def _read(self, first: Place) -> list[Encoded]:
        window = self._stream.plan.window(first)
        samples = [sample for stretch in window.stretches for sample in self._stream.read(stretch)]
        return [samples[i] for i in window.order]


def _batch(decoded: Sequence[tuple[Encoded, Tensor]], seeds: Sequence[int], *, flip: bool) -> Batch:
    flipped = [flip and derive_seed(seed, "flip") % 2 == 1 for seed in seeds]
    return Batch(
        images=torch.stack(
            [image.flip(-1) if mirror else image for (_, image), mirror in zip(decoded, flipped, strict=True)]
        ),
        captions=[
            sample.captions[derive_seed(seed, "caption") % len(sample.captions)]
            for (sample, _), seed in zip(decoded, seeds, strict=True)
        ],
        keys=[sample.key for sample, _ in decoded],
        flipped=flipped,
        seeds=list(seeds),
    )


def _expand(data: bytes, uri: str) -> Iterator[dict[str, Any]]:
    """Samples as WebDataset reads them: one dictionary of members by extension for each key."""
    members: Iterator[dict[str, Any]] = group_by_keys(tar_file_expander([{"url": uri, "stream": io.BytesIO(data)}]))
    return members


def _encoded(index: int, members: dict[str, Any]) -> Encoded:
    image = next(members[name] for name in IMAGE_MEMBERS if name in members)
    return Encoded(index, members["__key__"], image, json.loads(members["json"])["captions"])


def prefetched(items: Iterator[T], depth: int) -> Iterator[T]:
    """The same items, each computed in the background up to `depth` items before it is asked for."""
    end = object()
    with ThreadPoolExecutor(1) as background:
        pending = deque(background.submit(next, items, end) for _ in range(depth))
        while (item := pending.popleft().result()) is not end:
            pending.append(background.submit(next, items, end))
            yield item  # type: ignore[misc]


def read_samples(shards_uri: str, shard: ShardEntry) -> Iterator[Encoded]:
    """The samples of one shard, as they are, for those who look at shards."""
    uri = storage.join(shards_uri, shard.name)
    for index, members in enumerate(_expand(storage.read_bytes(uri), uri)):
        yield _encoded(index, members)
