"""The cost model of docs/performance.md, against arithmetic by hand and against what others have measured."""

import pytest

from benchmarks import scaling
from trainers.hardware import gpu_named

H100 = gpu_named("h100")


def test_within_a_machine_a_ring_sends_all_but_a_part_twice() -> None:
    assert scaling.ring_seconds(450e9, H100, 8) == pytest.approx(2 * 7 / 8, rel=1e-3)
    assert scaling.ring_seconds(450e9, H100, 1) == pytest.approx(0, abs=1e-3)


def test_between_machines_each_gpu_sends_its_part_by_its_own_port() -> None:
    within = 2 * 7 / 8 * 100e9 / 450e9
    between = 2 * 3 / 4 * 100e9 / 8 / 50e9
    assert scaling.ring_seconds(100e9, H100, 32) == pytest.approx(within + between, rel=1e-3)


def test_an_exchange_hides_behind_the_backward_pass_but_for_its_last_bucket() -> None:
    assert scaling.exposed(1.0, 0.25, 1e12) == 0.75
    assert scaling.exposed(1.0, 2.0, 4 * scaling.BUCKET_BYTES) == 0.25
    assert scaling.exposed(1.0, 2.0, scaling.BUCKET_BYTES / 2) == 1.0  # one bucket, which waits for the whole pass


@pytest.mark.parametrize("num_gpus", [8, 16, 32, 64])
def test_published_rates_come_out_within_a_tenth(num_gpus: int) -> None:
    """Of 128 GPUs they do not (half as much again): docs/performance.md says so."""
    assert scaling.predict_published(num_gpus) == pytest.approx(scaling.PUBLISHED[num_gpus], rel=0.1)


def test_the_studys_recipes_are_predicted() -> None:
    found = scaling.predictions(H100, [8, 512])
    for rows in found.values():
        eight, many = rows
        assert scaling.efficiency(eight, eight) == 1
        assert 0.2 < scaling.efficiency(many, eight) <= 1
        assert many.global_batch_size == 64 * eight.global_batch_size
        assert many.exchanging > eight.exchanging
    flux, msdm = (scaling.efficiency(found[name][1], found[name][0]) for name in ("flux", "msdm"))
    assert flux < msdm
