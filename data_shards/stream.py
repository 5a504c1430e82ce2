"""From shards to batches: a chain of small stages, each a generator or a plain function.

plan -> windows (one ranged read for each stretch) -> samples (checked, expanded) -> opened -> batches

Shards of images and precomputed sets, which hold latent moments in their place, are streamed alike.
"""

import io
import logging
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import count
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from cluster import counters
from cluster.documents import parsing
from cluster.errors import UserError
from data_shards.block_cache import BlockCache
from data_shards.decode import ImageError, decode
from data_shards.manifest import Manifest, Precomputed, check_present
from data_shards.plan import Place, Plan, Stretch, deal, window_size
from data_shards.reader import Encoded, ShardReader, encoded_image
from data_shards.sample import MIRRORED_MOMENTS_MEMBER, MOMENTS_MEMBER, Batch, derive_seed

T = TypeVar("T")
logger = logging.getLogger(__name__)

STEPS_AHEAD = 2
FETCH_THREADS = 4
MAX_BAD_IN_A_ROW = 16


Open = Callable[[Encoded, bool], Tensor]
"""(sample, mirrored) -> what a batch holds of it. Raises ImageError if the sample cannot be used."""


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
        cache: BlockCache | None = None,
    ) -> None:
        if global_batch_size % micro_batch_size:
            raise UserError(
                f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size}"
            )
        manifest = Manifest.load(shards_uri)
        self.manifest_digest = manifest.digest
        self.replaced = 0
        """Samples that could not be decoded and gave their place to another."""
        self._uri = shards_uri
        self._is_precomputed = manifest.precomputed is not None
        self._open = _opener(shards_uri, manifest.precomputed, resolution, horizontal_flip)
        self._shards = manifest.split(split)
        self._first_index = [0]
        for shard in self._shards:
            self._first_index.append(self._first_index[-1] + shard.num_samples)
        if not self.num_samples:
            raise UserError(f"{shards_uri} has no samples in its split '{split}'")
        self._plan = Plan(
            counts=tuple(shard.num_samples for shard in self._shards),
            digest=manifest.order_digest,
            seed=seed,
            global_batch_size=global_batch_size,
            window_size=window_size(global_batch_size),
        )
        check_present(shards_uri, self._shards)
        # Each lane of this rank is in one shard at a time, and its next window may be in the next one.
        lanes = -(-global_batch_size // world_size) + micro_batch_size
        self._reader = ShardReader(shards_uri, cache=cache, indexes_kept=2 * lanes)
        self._micro_batch_size = micro_batch_size
        self._seed = seed
        self._rank, self._world_size = rank, world_size
        self._horizontal_flip = horizontal_flip
        self._num_workers = num_workers

    @property
    def num_samples(self) -> int:
        return self._first_index[-1]

    def batches(self, start_step: int = 0) -> Iterator[list[Batch]]:
        """For each step from `start_step` on, without end: this rank's micro-batches, equally many on each rank.

        Where they cannot be dealt out evenly, ranks with fewer repeat one, with weight 0.
        """
        steps = self._steps(start_step)
        return prefetched(steps, STEPS_AHEAD) if self._num_workers else steps

    def one_pass(self, micro_batch_size: int, num_samples: int | None = None) -> Iterator[Batch]:
        """This rank's share of the split, each sample once, in the manifest's order and never mirrored.

        With `num_samples`, of the first so many of the split, which the writer has shuffled. Seeds are the same in
        every pass. Samples that cannot be decoded are left out.
        """
        total = min(self.num_samples, num_samples or self.num_samples)
        first, last = (total * rank // self._world_size for rank in (self._rank, self._rank + 1))
        for start in range(first, last, micro_batch_size):
            opened = []
            for stretch in self._stretches(start, min(start + micro_batch_size, last)):
                for sample in self.read(stretch):
                    with suppress(ImageError):
                        opened.append((sample, self._open(sample, False)))
            if opened:
                seeds = [derive_seed(self._seed, "one pass", sample.index) for sample, _ in opened]
                yield self._batch(opened, seeds, [False] * len(opened))

    def _steps(self, start_step: int) -> Iterator[list[Batch]]:
        size = self._micro_batch_size
        dealt = deal(self._plan.global_batch_size // size, self._rank, self._world_size)
        own = list(dict.fromkeys(number for number, _ in dealt))
        slots = [slot for number in own for slot in range(number * size, (number + 1) * size)]
        with (
            ThreadPoolExecutor(FETCH_THREADS) as fetchers,
            ThreadPoolExecutor(max(1, self._num_workers)) as openers,
        ):
            windows = _Windows(self, fetchers)
            open_all = openers.map if self._num_workers else map
            for step in count(start_step):
                places = [self._plan.place(step, slot) for slot in slots]
                samples = [windows.sample_at(place) for place in places]
                seeds = [
                    derive_seed(self._seed, place.epoch, sample.index)
                    for place, sample in zip(places, samples, strict=True)
                ]
                flipped = [self._horizontal_flip and derive_seed(seed, "flip") % 2 == 1 for seed in seeds]
                opened = list(open_all(self._open_or_replace, samples, flipped))
                parts = {number: slice(at * size, (at + 1) * size) for at, number in enumerate(own)}
                batches = {n: self._batch(opened[part], seeds[part], flipped[part]) for n, part in parts.items()}
                yield [replace(batches[number], weight=weight) for number, weight in dealt]

    def _open_or_replace(self, sample: Encoded, mirrored: bool) -> tuple[Encoded, Tensor]:
        """The sample and what is in it, or the next one of its shard that can be opened in its place.

        Raises UserError if MAX_BAD_IN_A_ROW samples cannot.
        """
        for candidate in self._from(sample):
            try:
                return candidate, self._open(candidate, mirrored)
            except ImageError as error:
                self.replaced += 1
                counters.count("replaced_samples")
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
        first = self._first_index[stretch.shard] + stretch.start
        return self._reader.read(shard, stretch.start, stretch.stop, first_index=first)

    def _batch(self, opened: Sequence[tuple[Encoded, Tensor]], seeds: list[int], flipped: list[bool]) -> Batch:
        with parsing(f"a batch of {self._uri}"):  # moments may be of several shapes
            inputs = torch.stack([tensor for _, tensor in opened])
        return Batch(
            inputs=inputs,
            captions=[
                sample.captions[derive_seed(seed, "caption") % len(sample.captions)]
                for (sample, _), seed in zip(opened, seeds, strict=True)
            ],
            keys=[sample.key for sample, _ in opened],
            flipped=flipped,
            seeds=seeds,
            is_precomputed=self._is_precomputed,
        )

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


def _opener(uri: str, precomputed: Precomputed | None, resolution: int, horizontal_flip: bool) -> Open:
    """How samples are opened. Raises UserError if a precomputed set is not of this resolution, or lacks flips."""
    if precomputed is None:
        return partial(_image, resolution=resolution)
    if precomputed.resolution != resolution:
        raise UserError(f"{uri} was precomputed at resolution {precomputed.resolution}, not {resolution}")
    if horizontal_flip and not precomputed.horizontal_flip:
        raise UserError(f"{uri} was precomputed without mirror images, which horizontal_flip asks for")
    return _moments


def _image(sample: Encoded, mirrored: bool, *, resolution: int) -> Tensor:
    image = decode(encoded_image(sample), resolution)
    return image.flip(-1) if mirrored else image


def _moments(sample: Encoded, mirrored: bool) -> Tensor:
    try:
        data = sample.members[MIRRORED_MOMENTS_MEMBER if mirrored else MOMENTS_MEMBER]
    except KeyError:
        raise ImageError("its image could not be decoded when the set was precomputed") from None
    return _array(data)


def _array(data: bytes) -> Tensor:
    """A member of moments, float32 [2C, h, w]. Raises ImageError for anything else; NumPy would make room for all that
    a header claims, and open zip archives."""
    file = io.BytesIO(data)
    try:
        np.lib.format.read_magic(file)
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:
        raise ImageError(f"its moments are damaged: {error}") from None
    values = data[file.tell() :]
    is_whole = min(shape, default=0) > 0 and math.prod(shape) * dtype.itemsize == len(values)
    if dtype != np.float32 or is_fortran or len(shape) != 3 or not is_whole:
        raise ImageError(f"its moments are damaged: {dtype} {list(shape)} in {len(values)} bytes")
    return torch.frombuffer(bytearray(values), dtype=torch.float32).view(shape)


def prefetched(items: Iterator[T], depth: int) -> Iterator[T]:
    """The same items, each computed in the background up to `depth` items before it is asked for."""
    end = object()
    with ThreadPoolExecutor(1) as background:
        pending = deque(background.submit(next, items, end) for _ in range(depth))
        while (item := pending.popleft().result()) is not end:
            pending.append(background.submit(next, items, end))
            yield item  # type: ignore[misc]
