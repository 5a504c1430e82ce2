"""The plan: which sample is at which place of which global batch, in which order shards are read.

A pure function of the manifest's digest and counts, the seed, the epoch and the global batch size; ranks and
workers do not enter it. Its only state is the step.

Let N be the samples of the split and G the global batch size. Slot j of step s is the global position
p = s G + j, without end; epoch e covers the positions [e N, (e + 1) N). So batches are always full, nothing is
dropped or padded, each sample comes exactly once an epoch, and a batch may straddle two epochs: that is the rule
for the tail.

In each epoch the shards are laid end to end in a shuffled order and turned by a random offset: the *line*. Its
positions are cut into the head (completing the batch begun by the epoch before), the body (F full batches), and
the tail (beginning the next batch). The body's part of the line is cut into G *lanes* of F consecutive samples,
and full batch b takes one sample of each lane: slot j reads lane j from front to back, shuffled within windows.
A rank that owns slots [a, b) thus reads a contiguous part of the line and nothing else, and a batch mixes
samples from G places all over the data set.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_shards.sample import derive_seed


@dataclass(frozen=True)
class Stretch:
    """Consecutive samples [start, stop) of shard number `shard`."""

    shard: int
    start: int
    stop: int


@dataclass(frozen=True)
class Window:
    """A unit of reading: stretches that are read together, and the order in which their samples are used.

    `order[k]` is the place, counted along the stretches, of the sample that the lane uses k-th.
    """

    stretches: tuple[Stretch, ...]
    order: NDArray[np.int64]


class WindowKey(NamedTuple):
    """Which window of which lane in which epoch."""

    epoch: int
    lane: int
    number: int


class Place(NamedTuple):
    """Where the sample of a slot is found: the k-th to be used of a window."""

    window: WindowKey
    k: int


def deal(num_micro_batches: int, rank: int, world_size: int) -> list[tuple[int, float]]:
    """A rank's micro-batches of a step, equally many on each rank: (which of the step's, its weight).

    Weights are so that the mean over ranks of each rank's weighted sum is the mean over the step's micro-batches.
    Ranks for which there are not enough repeat one, with weight 0.
    """
    each = -(-num_micro_batches // world_size)
    own = range(min(rank * each, num_micro_batches), min((rank + 1) * each, num_micro_batches))
    weight = world_size / num_micro_batches
    return [(number, weight) for number in own] + [(own[0] if own else 0, 0.0)] * (each - len(own))


HEAD, TAIL = -1, -2  # "lanes" of the samples outside the body


MAX_WINDOW, MIN_WINDOW, WINDOWED = 64, 8, 4096


def window_size(global_batch_size: int) -> int:
    """Samples of a window: as many as are worth a request, but of all lanes together some WINDOWED at most."""
    return min(MAX_WINDOW, max(MIN_WINDOW, WINDOWED // global_batch_size))


@dataclass(frozen=True)
class Plan:
    """The order of a split's samples over all epochs."""

    counts: tuple[int, ...]
    """Samples in each shard."""
    digest: str
    seed: int
    global_batch_size: int
    window_size: int
    """Samples within which a lane is shuffled, and the most it holds in memory."""

    @cached_property
    def num_samples(self) -> int:
        return sum(self.counts)

    def place(self, step: int, slot: int) -> Place:
        """Where slot `slot` of step `step` is read."""
        epoch, position = divmod(step * self.global_batch_size + slot, self.num_samples)
        plan = self.epoch(epoch)
        if position < plan.head:
            return Place(WindowKey(epoch, HEAD, 0), position)
        batch, lane = divmod(position - plan.head, self.global_batch_size)
        if batch >= plan.full_batches:
            position -= plan.head + plan.full_batches * self.global_batch_size
            return Place(WindowKey(epoch, TAIL, 0), position)
        number, k = divmod(batch, self.window_size)
        return Place(WindowKey(epoch, lane, number), k)

    def window(self, key: WindowKey) -> Window:
        return self.epoch(key.epoch).window(key.lane, key.number)

    def sample(self, step: int, slot: int) -> tuple[int, int, int]:
        """(epoch, shard, index in the shard) of a slot: the plan itself, for tests and for people."""
        place = self.place(step, slot)
        window = self.window(place.window)
        along = int(window.order[place.k])
        for stretch in window.stretches:
            length = stretch.stop - stretch.start
            if along < length:
                return place.window.epoch, stretch.shard, stretch.start + along
            along -= length
        raise AssertionError("a window's order stays within its stretches")

    def epoch(self, epoch: int) -> "EpochPlan":
        if epoch not in self._epochs:
            self._epochs.pop(epoch - 2, None)
            self._epochs[epoch] = EpochPlan(self, epoch)
        return self._epochs[epoch]

    @cached_property
    def _epochs(self) -> dict[int, "EpochPlan"]:
        """The epochs in use: a step straddles two at most."""
        return {}


class EpochPlan:
    """One epoch's line and its cuts. Holds a few numbers for each shard, never one for each sample."""

    def __init__(self, plan: Plan, epoch: int) -> None:
        self._plan = plan
        self._epoch = epoch
        total, batch = plan.num_samples, plan.global_batch_size
        self.head = min(-epoch * total % batch, total)
        self.full_batches = (total - self.head) // batch
        self._order = self._rng("shards").permutation(len(plan.counts))
        self._starts = np.concatenate([[0], np.cumsum(np.asarray(plan.counts, dtype=np.int64)[self._order])])
        self._turn = int(self._rng("turn").integers(total))

    @property
    def windows_per_lane(self) -> int:
        return -(-self.full_batches // self._plan.window_size)

    def window(self, lane: int, number: int) -> Window:
        plan = self._plan
        if lane == HEAD:
            start, length = 0, self.head
        elif lane == TAIL:
            start = self.head + self.full_batches * plan.global_batch_size
            length = plan.num_samples - start
        else:
            first = number * plan.window_size
            start = self.head + lane * self.full_batches + first
            length = min(plan.window_size, self.full_batches - first)
        order = self._rng("window", lane, number).permutation(length)
        return Window(self._stretches(start, length), order)

    def _stretches(self, start: int, length: int) -> tuple[Stretch, ...]:
        """The stretches of shards under positions [start, start + length) of the line."""
        found: list[Stretch] = []
        total = self._plan.num_samples
        while length:
            along = (start + self._turn) % total  # in the shuffled order of shards, before the turn
            place = int(np.searchsorted(self._starts, along, side="right")) - 1
            first = along - int(self._starts[place])
            taken = min(length, int(self._starts[place + 1]) - along)
            found.append(Stretch(int(self._order[place]), first, first + taken))
            start, length = start + taken, length - taken
        return tuple(found)

    def _rng(self, *purpose: int | str) -> np.random.Generator:
        return np.random.default_rng(derive_seed(self._plan.digest, self._plan.seed, self._epoch, *purpose))
