"""Every figure states what it was taken on, and holds what its metric alone gives."""

import numpy as np
import pytest

from cluster.errors import UserError
from tests.trainers.fidelity.real_images import frames, pixel_features, pixels
from trainers.fidelity.alignment import caption_alignment, clip_scores
from trainers.fidelity.evaluation import Measure
from trainers.fidelity.frechet import fid
from trainers.fidelity.inception_score import class_probabilities, inception_score
from trainers.fidelity.manifold import manifold_scores, precision_recall
from trainers.fidelity.measures import (
    caption_alignment_measures,
    class_measures,
    clip_score_measures,
    diversity_measures,
    inception_score_measures,
    measure_features,
    memorization_measures,
)

METRICS = ["fid", "fid_infinity", "kid", "cmmd", "precision", "recall", "f1", "density", "coverage"]


def test_features_are_measured_by_all_metrics_each_with_its_interval() -> None:
    features = pixel_features(frames(240, 32), side=3)
    generated, real = features[:50] * 0.9, features[50:100]
    measures = measure_features("random_vgg", generated, real, seed=0, num_bootstrap=20)
    assert list(measures) == [f"{metric}_random_vgg" for metric in METRICS]
    assert measures["fid_random_vgg"].value == fid(generated, real)
    assert measures["coverage_random_vgg"].value == manifold_scores(generated, real).coverage
    for name, measure in measures.items():
        assert measure.interval is not None, name
        assert measure.interval[0] <= measure.value <= measure.interval[1], name
        assert measure.interval[0] < measure.interval[1], name
        assert (measure.num_generated, measure.num_real, measure.extractor) == (50, 50, "random_vgg")
    assert measures["recall_random_vgg"].interval[1] <= 1  # type: ignore[index]
    lower = [name for name, measure in measures.items() if measure.better == "lower"]
    assert lower == [f"{metric}_random_vgg" for metric in ("fid", "fid_infinity", "kid", "cmmd")]
    assert measures == measure_features("random_vgg", generated, real, seed=0, num_bootstrap=20)
    assert measures != measure_features("random_vgg", generated, real, seed=1, num_bootstrap=20)


def test_only_the_published_extractor_gives_the_plain_name() -> None:
    features = np.random.default_rng(0).standard_normal((32, 4))
    names = measure_features("inception", features[:16], features[16:], seed=0, num_bootstrap=2)
    assert list(names) == ["fid", "fid_infinity", "kid", "cmmd_inception", *(f"{m}_inception" for m in METRICS[4:])]


def test_few_or_broken_features_are_refused() -> None:
    features = np.ones((20, 4), np.float32)
    with pytest.raises(UserError, match="at least 16 generated and 16 real images, got 15 and 20"):
        measure_features("x", features[:15], features, seed=0)
    broken = features.copy()
    broken[3, 1] = np.nan
    with pytest.raises(UserError, match="x features of the real images hold NaN"):
        measure_features("x", features, broken, seed=0)


def test_many_images_say_that_their_interval_comes_from_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.fidelity.bootstrap.MAX_ROWS", 20)
    monkeypatch.setattr("trainers.fidelity.measures.MAX_ROWS", 20)
    features = np.random.default_rng(0).standard_normal((60, 3))
    measures = measure_features("x", features[:40], features[40:], seed=0, num_bootstrap=2)
    assert measures["fid_x"].about.endswith("; interval from at most 20 images of a set")


def test_inception_score() -> None:
    logits = 3 * np.random.default_rng(0).standard_normal((60, 5))
    [(name, measure)] = inception_score_measures("inception", logits, seed=0, num_bootstrap=50).items()
    assert name == "inception_score"
    assert measure.value == inception_score(class_probabilities(logits))
    assert measure.interval is not None
    assert 1 <= measure.interval[0] < measure.value < measure.interval[1] <= 5


def test_clip_score() -> None:
    rng = np.random.default_rng(0)
    prompts = rng.standard_normal((40, 6))
    scores = clip_scores(prompts + rng.standard_normal((40, 6)), prompts)
    [(name, measure)] = clip_score_measures("clip", scores, seed=0).items()
    assert name == "clip_score"
    assert measure.interval is not None
    assert 40 < measure.interval[0] < measure.value < measure.interval[1] < 100


def test_caption_alignment_counts_the_images_it_could_judge() -> None:
    rng = np.random.default_rng(0)
    generated, real = rng.standard_normal((20, 4)), rng.standard_normal((40, 4))
    captions = [("even",) if row % 2 else ("odd",) for row in range(40)]
    prompts = ["even", "unheard of"] * 10

    def aligned(prompts: list[str]) -> dict[str, Measure]:
        scores = caption_alignment(generated, real, prompts, captions)
        return caption_alignment_measures("dino", scores, num_real=40, seed=0)

    [(name, measure)] = aligned(prompts).items()
    assert name == "caption_alignment_dino"
    assert measure.value == np.nanmean(caption_alignment(generated, real, prompts, captions))
    assert (measure.num_generated, measure.num_real) == (10, 40)
    assert aligned(["unheard of"] * 20) == {}


def test_diversity_says_how_many_scales_and_prompts() -> None:
    images = pixels(frames(5, 44))
    measure = diversity_measures(images.__getitem__, ["a", "a", "b", "b", "c"], seed=0)["ms_ssim"]
    assert (measure.num_generated, measure.extractor) == (4, None)
    assert "3 of 5 scales, mean over 2 prompts, at most 20 pairs of each" in measure.about
    assert diversity_measures(images.__getitem__, ["a", "a", "", "", ""], seed=0)["ms_ssim"].num_generated == 2
    assert measure.interval is not None
    assert measure.interval[0] <= measure.value <= measure.interval[1]
    assert diversity_measures(images.__getitem__, ["a", "b", "c", "d", "e"], seed=0) == {}
    assert diversity_measures(images.__getitem__, ["a", "a", "b", "c", "d"], seed=0)["ms_ssim"].interval is None


def test_classes_are_captions_with_enough_images_of_both_kinds() -> None:
    rng = np.random.default_rng(0)
    generated, real = rng.standard_normal((20, 3)), rng.standard_normal((40, 3))
    captions = [
        ("polyp", "large") if row < 15 else ("polyp", "small") if row < 31 else ("polyp", "tiny") for row in range(40)
    ]
    prompts = ["large"] * 6 + ["small"] * 4 + ["tiny"] * 5 + ["polyp"] * 5
    found = class_measures(generated, real, prompts, captions)
    assert [(m.caption, m.num_generated, m.num_real) for m in found] == [("polyp", 5, 40), ("large", 6, 15)]
    assert (found[1].precision, found[1].recall) == precision_recall(generated[:6], real[:15])


def test_a_model_that_copies_is_caught_with_the_images_it_copied() -> None:
    features = pixel_features(frames(240, 32))
    train, held_out, honest = features[::3], features[1::3], features[2::3]
    generated = np.concatenate([honest[:60], train[10:20]])
    keys = [f"image-{row}" for row in range(80)]
    measures, neighbours = memorization_measures("pixels", generated, train, held_out, keys, seed=0)
    rate = measures["copy_rate_pixels"]
    assert 10 / 70 <= rate.value <= 13 / 70
    assert rate.interval is not None
    assert rate.interval[0] > 1 / 81  # more than honest images would be
    assert "fewer than 99 held-out images" in rate.about
    assert [(n.key, n.distance) for n in neighbours[:10]] == [(f"image-{row}", 0) for row in range(10, 20)]
    assert [n.sample for n in neighbours[:10]] == list(range(60, 70))
    assert [n.is_suspicious for n in neighbours] == [i < round(rate.value * 70) for i in range(64)]
    bias = measures["nearer_to_training_pixels"]
    assert bias.interval is not None
    assert 0.5 < bias.value < bias.interval[1] < 1
    _, honest_neighbours = memorization_measures("pixels", honest, train, held_out, keys, seed=0)
    assert sum(n.is_suspicious for n in honest_neighbours) <= 3


def test_no_copies_is_not_a_promise_that_there_never_is_one() -> None:
    rng = np.random.default_rng(0)
    far, near = rng.standard_normal((30, 50)), rng.standard_normal((40, 50))
    measures, _ = memorization_measures("x", far, near[:30], near[:30] + 0.01 * near[10:], [""] * 30, seed=0)
    assert measures["copy_rate_x"].value == 0
    assert measures["copy_rate_x"].interval == pytest.approx((0, 1 - 0.025 ** (1 / 30)))


def test_training_images_among_the_held_out_ones_are_told_of() -> None:
    train, held_out = np.split(np.random.default_rng(0).standard_normal((60, 50)), 2)
    held_out[:2] = train[5:7]
    measures, neighbours = memorization_measures("x", train[:12], train, held_out, [""] * 30, seed=0)
    assert measures["copy_rate_x"].value == 1
    assert "(by 28 held-out ones; " in measures["copy_rate_x"].about
    assert "; 2 held-out images are training images and left out)" in measures["copy_rate_x"].about
    assert all(neighbour.is_suspicious for neighbour in neighbours)


def test_memorization_needs_held_out_images() -> None:
    with pytest.raises(UserError, match="got 4 and 0: the shards need a train split and another"):
        memorization_measures("x", np.ones((4, 2)), np.ones((4, 2)), np.ones((0, 2)), ["a"] * 4, seed=0)
