"""How figures are named, ordered and written."""

import pytest

from tests.trainers.evaluations import measure
from trainers.fidelity.figures import by_group, decimals, label_of, overlap, write


@pytest.mark.parametrize(
    ("value", "interval", "written"),
    [
        (23.41, (21.93, 24.88), "23.4"),
        (0.01234, (0.0112, 0.0135), "0.0123"),
        (1234.5, (1100.0, 1400.0), "1,234"),
        (-0.00004, (-0.01, 0.01), "0.000"),
        (-0.0123, (-0.02, -0.01), "−0.012"),
        (5.0, None, "5.00"),
        (5.0, (5.0, 5.0), "5.00"),
        (0.0, None, "0"),
        (1e-12, None, "0.000000"),
    ],
)
def test_figures_are_written_as_finely_as_they_are_known(
    value: float, interval: tuple[float, float] | None, written: str
) -> None:
    assert write(value, decimals([value], [interval])) == written


def test_only_the_published_extractor_gives_the_plain_name() -> None:
    assert label_of("fid", measure(1)) == "FID"
    assert label_of("fid_random_vgg", measure(1, extractor="random_vgg")) == "FID (random_vgg)"
    assert label_of("precision_inception", measure(1)) == "Precision (inception)"
    assert label_of("ms_ssim", measure(1, extractor=None)) == "MS-SSIM within a prompt"
    assert label_of("new_metric_inception", measure(1)) == "New metric (inception)"


def test_measures_are_grouped_and_ordered_as_people_read_them() -> None:
    measures = {
        "odd": measure(1),
        "copy_rate_dinov2": measure(1, extractor="dinov2"),
        "nearer_to_training_dinov2": measure(1, extractor="dinov2"),
        "ms_ssim": measure(1, extractor=None),
        "recall_inception": measure(1),
        "kid": measure(1),
        "fid_dinov2": measure(1, extractor="dinov2"),
        "fid": measure(1),
    }
    grouped = {group: [name for name, _ in found] for group, found in by_group(measures.items()).items()}
    assert grouped == {
        "Fidelity": ["fid", "kid", "fid_dinov2"],
        "Diversity": ["recall_inception", "ms_ssim"],
        "Memorisation": ["copy_rate_dinov2", "nearer_to_training_dinov2"],
        "Other": ["odd"],
    }
    assert list(grouped) == ["Fidelity", "Diversity", "Memorisation", "Other"]


def test_intervals_that_touch_overlap() -> None:
    assert overlap((0, 1), (1, 2))
    assert overlap((0, 3), (1, 2))
    assert not overlap((0, 1), (1.01, 2))
