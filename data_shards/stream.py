"""From shards to batches: a chain of small stages, each a generator or a plain function.

plan -> windows (one ranged read for each stretch) -> samples (checked, expanded) -> opened -> batches

Shards of images and precomputed sets, which hold latent moments in their place and prompt embeddings for the captions,
are streamed alike.
"""

import io
import logging
import math
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import count
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from cluster import counters
from cluster.errors import UserError
from data_shards.block_cache import BlockCache
from data_shards.decode import ImageError, decode_into
from data_shards.manifest import Manifest, Precomputed, check_present
from data_shards.plan import Place, Plan, Stretch, WindowKey, deal, window_size
from data_shards.prompts import PromptStore
from data_shards.reader import Encoded, ShardReader, encoded_image
from data_shards.sample import MIRRORED_MOMENTS_MEMBER, MOMENTS_MEMBER, Batch, derive_seed

T = TypeVar("T")
logger = logging.getLogger(__name__)

STEPS_AHEAD = 2
FETCH_THREADS = 4
MAX_BAD_IN_A_ROW = 16
PROMPT_MEMORY_BYTES = 2**30  # of one stream; a rank has two, of which the validation's sees fewer prompts
MAX_HEADER = 4096  # bytes of an array's; ours have 128


OpenInto = Callable[[NDArray[np.float32], Encoded, bool], None]
"""(its place in a batch, sample, mirrored). Raises ImageError if the sample cannot be used."""


@dataclass(frozen=True)
class _Step:
    """A rank's samples of a step, in whose inputs they are being opened."""

    samples: list[Encoded]
    seeds: list[int]
    flipped: list[bool]
    inputs: NDArray[np.float32]


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
        self._prompts = PromptStore(shards_uri, PROMPT_MEMORY_BYTES, cache) if manifest.precomputed else None
        self._open_into = _opener(shards_uri, manifest.precomputed, resolution, horizontal_flip)
        self._resolution = resolution
        self._memory = _Memory()
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
        starts = range(first, last, micro_batch_size)
        parts = [(start, min(start + micro_batch_size, last)) for start in starts]
        if not self._num_workers:
            return self._batches_of(map(self._opened_part, parts))
        return prefetched(self._batches_of(self._opened_ahead(parts)), STEPS_AHEAD)

    def _opened_ahead(self, parts: Sequence[tuple[int, int]]) -> Iterator[_Step]:
        """`_opened_part` of each, by as many threads as decode for the training, a little ahead of who asks."""
        with ThreadPoolExecutor(self._num_workers) as workers:
            pending: deque[Future[_Step]] = deque()
            for part in parts:
                pending.append(workers.submit(self._opened_part, part))
                if len(pending) > max(STEPS_AHEAD, self._num_workers):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def _opened_part(self, part: tuple[int, int]) -> _Step:
        """Samples [start, stop) in the manifest's order, less those that cannot be opened."""
        samples = [sample for stretch in self._stretches(*part) for sample in self.read(stretch)]
        inputs = self._memory.take(len(samples), *self._input_shape)
        opened: list[Encoded] = []
        for sample in samples:
            with suppress(ImageError):
                self._open_into(inputs[len(opened)], sample, False)
                opened.append(sample)
        seeds = [derive_seed(self._seed, "one pass", sample.index) for sample in opened]
        return _Step(opened, seeds, [False] * len(opened), inputs[: len(opened)])

    def _batches_of(self, steps: Iterable[_Step]) -> Iterator[Batch]:
        return (self._batch(step) for step in steps if step.samples)

    def _steps(self, start_step: int) -> Iterator[list[Batch]]:
        size = self._micro_batch_size
        dealt = deal(self._plan.global_batch_size // size, self._rank, self._world_size)
        own = list(dict.fromkeys(number for number, _ in dealt))
        slots = [slot for number in own for slot in range(number * size, (number + 1) * size)]
        parts = {number: slice(at * size, (at + 1) * size) for at, number in enumerate(own)}
        chunk_size = -(-len(slots) // max(1, self._num_workers))
        chunks = [range(len(slots))[start : start + chunk_size] for start in range(0, len(slots), chunk_size)]
        with (
            ThreadPoolExecutor(FETCH_THREADS) as fetchers,
            ThreadPoolExecutor(max(1, self._num_workers)) as workers,
        ):
            windows = _Windows(self, fetchers)
            begun: deque[tuple[_Step, list[Future[None]]]] = deque()
            for number in count(start_step):
                step = self._begin([self._plan.place(number, slot) for slot in slots], windows)
                if self._num_workers:
                    # While one step's samples are opened, the next one's are found.
                    begun.append((step, [workers.submit(self._open, step, chunk) for chunk in chunks]))
                    if len(begun) <= STEPS_AHEAD:
                        continue
                    step, opened = begun.popleft()
                    for chunk in opened:
                        chunk.result()
                else:
                    self._open(step, range(len(slots)))
                batches = {number: self._batch(step, part) for number, part in parts.items()}
                yield [replace(batches[number], weight=weight) for number, weight in dealt]

    def _begin(self, places: Sequence[Place], windows: "_Windows") -> _Step:
        samples = windows.samples_at(places)
        epochs = [place.window.epoch for place in places]
        seeds = [derive_seed(self._seed, epoch, s.index) for epoch, s in zip(epochs, samples, strict=True)]
        flipped = [self._horizontal_flip and derive_seed(seed, "flip") % 2 == 1 for seed in seeds]
        return _Step(samples, seeds, flipped, self._memory.take(len(samples), *self._input_shape))

    def _open(self, step: _Step, numbers: Iterable[int]) -> None:
        """Open samples of a step into their places, or in place of one the next of its shard that can be opened.

        Raises UserError if MAX_BAD_IN_A_ROW samples cannot.
        """
        for number in numbers:
            sample, mirrored = step.samples[number], step.flipped[number]
            step.samples[number] = self._open_or_replace(step.inputs[number], sample, mirrored)

    def _open_or_replace(self, place: NDArray[np.float32], sample: Encoded, mirrored: bool) -> Encoded:
        for candidate in self._from(sample):
            try:
                self._open_into(place, candidate, mirrored)
            except ImageError as error:
                self.replaced += 1
                counters.count("replaced_samples")
                logger.warning("sample %s of %s left out: %s", candidate.key, self._uri, error)
            else:
                return candidate
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

    @cached_property
    def _input_shape(self) -> tuple[int, ...]:
        """Of what a batch holds of one sample."""
        if self._prompts is None:
            return 3, self._resolution, self._resolution
        [first] = self.read(Stretch(0, 0, 1))
        for candidate in self._from(first):
            with suppress(ImageError):
                return _moments(candidate, False).shape
        raise UserError(f"no moments can be read from sample '{first.key}' of {self._uri} on: precompute it anew")

    def _batch(self, step: _Step, part: slice = slice(None)) -> Batch:
        samples, seeds = step.samples[part], step.seeds[part]
        captions = [_caption(sample, seed) for sample, seed in zip(samples, seeds, strict=True)]
        return Batch(
            inputs=torch.from_numpy(step.inputs[part]),
            captions=captions,
            keys=[sample.key for sample in samples],
            flipped=step.flipped[part],
            seeds=seeds,
            is_precomputed=self._prompts is not None,
            prompts=self._prompts.get(captions) if self._prompts else {},
        )

    def _stretches(self, start: int, stop: int) -> Iterator[Stretch]:
        """The stretches of shards under samples [start, stop) in the manifest's order."""
        for number, shard in enumerate(self._shards):
            first = self._first_index[number]
            begin, end = max(start - first, 0), min(stop - first, shard.num_samples)
            if begin < end:
                yield Stretch(number, begin, end)


class _Memory:
    """Memory of batches, taken up again when nobody holds them any more: new memory of this size comes from the
    system page by page, which takes as long as decoding a quarter of the images that go into it."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, ...], deque[NDArray[np.float32]]] = {}

    def take(self, *shape: int) -> NDArray[np.float32]:
        """Uninitialised; free again when this array, its parts, and all tensors over them are gone."""
        free = self._free.setdefault(shape, deque())
        try:
            array = free.pop()
        except IndexError:
            array = np.empty(shape, np.float32)
        loan = _Loan(array)
        weakref.finalize(loan, free.append, array)
        return np.asarray(loan)


class _Loan:
    """Holds an array's memory for others. A part of an array holds the array that owns its memory, not the one that it
    was cut from; none of them owns this memory, so all hold this."""

    def __init__(self, array: NDArray[np.float32]) -> None:
        self.__array_interface__ = array.__array_interface__


class _Windows:
    """The windows in use, and of each lane the next one already on its way."""

    def __init__(self, stream: ShardStream, fetchers: ThreadPoolExecutor) -> None:
        self._stream = stream
        self._fetchers = fetchers
        self._open: dict[WindowKey, list[Encoded]] = {}
        self._fetching: dict[WindowKey, Future[list[Encoded]]] = {}

    def samples_at(self, places: Sequence[Place]) -> list[Encoded]:
        for key, _ in places:  # all are on their way before the first is waited for, and before those that follow
            if key not in self._open:
                self._fetch(key)
        return [self._sample_at(key, k) for key, k in places]

    def _sample_at(self, key: WindowKey, k: int) -> Encoded:
        samples = self._open.get(key)
        if samples is None:
            samples = self._open[key] = self._opened(key)
        if k == len(samples) - 1:
            del self._open[key]
        return samples[k]

    def _opened(self, key: WindowKey) -> list[Encoded]:
        # What other ranks used up of a window at the seam of two epochs never comes to its end here.
        for old in [other for other in self._open if other.epoch < key.epoch - 1]:
            del self._open[old]
        samples = self._fetching.pop(key).result()
        following = key._replace(number=key.number + 1)
        if key.lane >= 0 and following.number < self._stream.plan.epoch(key.epoch).windows_per_lane:
            self._fetch(following)
        return samples

    def _fetch(self, key: WindowKey) -> None:
        if key not in self._fetching:
            self._fetching[key] = self._fetchers.submit(self._read, key)

    def _read(self, key: WindowKey) -> list[Encoded]:
        window = self._stream.plan.window(key)
        samples = [sample for stretch in window.stretches for sample in self._stream.read(stretch)]
        return [samples[i] for i in window.order]


def _caption(sample: Encoded, seed: int) -> str:
    """One of a sample's captions."""
    captions = sample.captions
    return captions[derive_seed(seed, "caption") % len(captions)] if len(captions) > 1 else captions[0]


def _opener(uri: str, precomputed: Precomputed | None, resolution: int, horizontal_flip: bool) -> OpenInto:
    """How samples are opened. Raises UserError if a precomputed set is not of this resolution, or lacks flips."""
    if precomputed is None:
        return _open_image
    if precomputed.resolution != resolution:
        raise UserError(f"{uri} was precomputed at resolution {precomputed.resolution}, not {resolution}")
    if horizontal_flip and not precomputed.horizontal_flip:
        raise UserError(f"{uri} was precomputed without mirror images, which horizontal_flip asks for")
    return _open_moments


def _open_image(place: NDArray[np.float32], sample: Encoded, mirrored: bool) -> None:
    decode_into(place, encoded_image(sample), mirrored=mirrored)


def _open_moments(place: NDArray[np.float32], sample: Encoded, mirrored: bool) -> None:
    moments = _moments(sample, mirrored)
    if moments.shape != place.shape:
        raise ImageError(f"its moments are {list(moments.shape)}, those of the first sample {list(place.shape)}")
    place[...] = moments


def _moments(sample: Encoded, mirrored: bool) -> NDArray[np.float32]:
    try:
        data = sample.members[MIRRORED_MOMENTS_MEMBER if mirrored else MOMENTS_MEMBER]
    except KeyError:
        raise ImageError("its image could not be decoded when the set was precomputed") from None
    return _array(data)


def _array(data: bytes | memoryview) -> NDArray[np.float32]:
    """A member of moments, float32 [2C, h, w]. Raises ImageError for anything else; NumPy would make room for all that
    a header claims, and open zip archives."""
    header_length = 10 + int.from_bytes(data[8:10], "little")
    shape = _shape_in(bytes(data[: min(header_length, MAX_HEADER)]))
    if math.prod(shape) * 4 != len(data) - header_length:
        raise ImageError(f"its moments are damaged: {list(shape)} in {len(data) - header_length} bytes")
    return np.frombuffer(data, np.float32, offset=header_length).reshape(shape)


@lru_cache(64)  # a set has one or two, and each takes longer to read than what follows it
def _shape_in(header: bytes) -> tuple[int, ...]:
    """Of an array float32 [2C, h, w], which its NPY header must say. Raises ImageError."""
    file = io.BytesIO(header)
    try:
        np.lib.format.read_magic(file)
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:
        raise ImageError(f"its moments are damaged: {error}") from None
    if dtype != np.float32 or is_fortran or len(shape) != 3 or min(shape) <= 0:
        raise ImageError(f"its moments are damaged: {dtype} {list(shape)}")
    return shape


def prefetched(items: Iterator[T], depth: int) -> Iterator[T]:
    """The same items, each computed in the background up to `depth` items before it is asked for."""
    end = object()
    with ThreadPoolExecutor(1) as background:
        pending = deque(background.submit(next, items, end) for _ in range(depth))
        while (item := pending.popleft().result()) is not end:
            pending.append(background.submit(next, items, end))
            yield item  # type: ignore[misc]
