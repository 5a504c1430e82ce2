"""The plan: exactly once an epoch, contiguous reads, resumable from the step alone."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.plan import Plan, WindowKey, deal, window_size

counts = st.lists(st.integers(1, 40), min_size=1, max_size=7).map(tuple)


def plan_of(counts: tuple[int, ...], global_batch_size: int, *, seed: int = 0, window_size: int = 8) -> Plan:
    return Plan(counts=counts, digest="d", seed=seed, global_batch_size=global_batch_size, window_size=window_size)


def drawn(plan: Plan, steps: int) -> list[tuple[int, int, int]]:
    """(epoch, shard, index) of every slot of the first steps, in order."""
    return [plan.sample(step, slot) for step in range(steps) for slot in range(plan.global_batch_size)]


@settings(max_examples=60, deadline=None)
@given(counts=counts, global_batch_size=st.integers(1, 50), seed=st.integers(0, 3))
def test_each_sample_comes_exactly_once_an_epoch(counts: tuple[int, ...], global_batch_size: int, seed: int) -> None:
    plan = plan_of(counts, global_batch_size, seed=seed)
    epochs = 3
    positions = drawn(plan, -(-epochs * plan.num_samples // global_batch_size))[: epochs * plan.num_samples]
    expected = {(shard, index) for shard, count in enumerate(counts) for index in range(count)}
    for epoch in range(epochs):
        seen = Counter((shard, index) for e, shard, index in positions if e == epoch)
        assert seen.keys() == expected
        assert set(seen.values()) == {1}


@settings(max_examples=20, deadline=None)
@given(counts=counts, global_batch_size=st.integers(1, 20))
def test_a_fresh_plan_agrees_at_any_step(counts: tuple[int, ...], global_batch_size: int) -> None:
    """What comes at a step depends on nothing that was asked before: the step is the only state."""
    walked = plan_of(counts, global_batch_size)
    all_steps = drawn(walked, 12)
    for step in (11, 0, 7):
        fresh = plan_of(counts, global_batch_size)
        here = [fresh.sample(step, slot) for slot in range(global_batch_size)]
        assert here == all_steps[step * global_batch_size : (step + 1) * global_batch_size]


def test_epochs_seeds_and_data_change_the_order() -> None:
    one = drawn(plan_of((30, 30), 4), 30)
    first, second = ([s[1:] for s in one if s[0] == epoch] for epoch in (0, 1))
    assert sorted(first) == sorted(second)
    assert first != second
    assert one != drawn(plan_of((30, 30), 4, seed=1), 30)
    other_data = Plan(counts=(30, 30), digest="other", seed=0, global_batch_size=4, window_size=8)
    assert one != drawn(other_data, 30)


def test_a_batch_mixes_shards_and_a_lane_reads_forward() -> None:
    plan = plan_of((100,) * 20, 16)
    assert len({shard for _, shard, _ in drawn(plan, 1)}) > 8
    epoch = plan.epoch(0)
    windows = [epoch.window(3, number).stretches for number in range(epoch.windows_per_lane)]
    joined = [stretch for stretches in windows for stretch in stretches]
    assert sum(stretch.stop - stretch.start for stretch in joined) == epoch.full_batches
    for before, after in pairwise(joined):
        assert (before.shard == after.shard and before.stop == after.start) or after.start == 0


def test_neighbours_in_a_shard_are_separated_by_the_window() -> None:
    plan = plan_of((512,), 2, window_size=64)
    window = plan.window(WindowKey(0, 0, 0))
    assert sorted(window.order) == list(range(64))
    assert list(window.order) != sorted(window.order)


def test_a_hundred_million_samples_cost_nothing_to_plan() -> None:
    plan = Plan(counts=(10_000,) * 10_000, digest="d", seed=0, global_batch_size=4096, window_size=64)
    seen = {plan.sample(step, slot)[1:] for step in (0, 20_000, 24_000) for slot in range(0, 4096, 64)}
    assert len(seen) > 150


@given(st.integers(1, 40), st.integers(1, 16))
def test_micro_batches_are_dealt_out_to_any_number_of_ranks(num_micro_batches: int, world_size: int) -> None:
    dealt = [deal(num_micro_batches, rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in dealt}) == 1, "ranks that share weights must run equally many forwards"
    counting = [number for share in dealt for number, weight in share if weight]
    assert counting == list(range(num_micro_batches))
    losses = [3.0**number for number in range(num_micro_batches)]
    of_ranks = [sum(weight * losses[number] for number, weight in share) for share in dealt]
    assert sum(of_ranks) / world_size == pytest.approx(sum(losses) / num_micro_batches)


@given(st.integers(1, 100_000))
def test_what_lanes_hold_together_is_bounded(global_batch_size: int) -> None:
    """Until the batch alone is larger: a window is worth a request."""
    window = window_size(global_batch_size)
    assert 8 <= window <= 64
    assert window == 8 or window * global_batch_size <= 4096
