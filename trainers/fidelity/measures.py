"""From features to the figures of an evaluation: each with its interval, its counts, its extractor and its source."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from cluster.errors import UserError
from trainers.fidelity.alignment import ALIGNMENT_NEIGHBOURS, MIN_BEARERS
from trainers.fidelity.bootstrap import (
    BOOTSTRAP,
    HALF_SAMPLES,
    MAX_ROWS,
    Interval,
    OnRows,
    half_sample_intervals,
    mean_interval,
)
from trainers.fidelity.diversity import MAX_PAIRS, SCALE_WEIGHTS, ReadPixels, num_scales, similarity_within_prompts
from trainers.fidelity.evaluation import ClassMeasure, Measure, Neighbour, measure_name
from trainers.fidelity.frechet import Rows, fid, fid_infinity, fid_infinity_on_rows, fid_on_rows
from trainers.fidelity.inception_score import class_probabilities, inception_score
from trainers.fidelity.kernel import CMMD_SIGMA, cmmd, cmmd_on_rows, kid, kid_on_rows
from trainers.fidelity.manifold import manifold_scores, manifold_scores_on_rows, precision_recall
from trainers.fidelity.memorization import COPY_QUANTILE, copy_threshold, nearest, training_bias
from trainers.fidelity.statistics import Features, Float64

MIN_IMAGES = 16
"""Of either set: a quarter of a half of them still has a covariance, for the interval of FID∞."""
MIN_CLASS_REAL = 10
MIN_CLASS_GENERATED = 5
MAX_NEIGHBOURS = 64
EXACT = "the exact method of Clopper and Pearson (1934)"


class _Figure(NamedTuple):
    better: Literal["lower", "higher"] | None
    bounds: Interval
    about: str


_FIGURES = {
    "fid": _Figure("lower", (0, np.inf), "Fréchet distance (Heusel et al. 2017); depends on the numbers of images"),
    "fid_infinity": _Figure(
        "lower",
        (-np.inf, np.inf),
        "FID extrapolated to infinitely many images (Chong & Forsyth 2020), here of both sets",
    ),
    "kid": _Figure(
        "lower",
        (-np.inf, np.inf),
        "squared MMD as it is, not times 1000; cubic kernel, unbiased, over all pairs (Bińkowski et al. 2018)",
    ),
    "cmmd": _Figure(
        "lower",
        (-np.inf, np.inf),
        f"1000 x squared MMD, unbiased, Gaussian kernel of bandwidth {CMMD_SIGMA:g} on unit-norm features "
        "(Jayasumana et al. 2024)",
    ),
    "precision": _Figure(
        "higher", (0, 1), "share of generated images that look real, k = 3 (Kynkäänniemi et al. 2019)"
    ),
    "recall": _Figure(
        "higher", (0, 1), "share of real images that the model can reach, k = 3 (Kynkäänniemi et al. 2019)"
    ),
    "f1": _Figure("higher", (0, 1), "harmonic mean of improved precision and recall, k = 3"),
    "density": _Figure(
        "higher", (0, np.inf), "how densely real images surround generated ones, k = 5 (Naeem et al. 2020)"
    ),
    "coverage": _Figure(
        "higher", (0, 1), "share of real images with a generated one in their neighbourhood, k = 5 (Naeem et al. 2020)"
    ),
}


def measure_features(
    label: str, generated: Features, real: Features, *, seed: int, num_bootstrap: int = 200
) -> dict[str, Measure]:
    """FID, FID∞, KID, CMMD, precision, recall, F1, density and coverage of [N, D] against [M, D].

    `label` names the extractor. Intervals are those of `bootstrap.half_sample_intervals`. Raises UserError if either
    set has fewer than MIN_IMAGES rows or holds a value that is not finite.
    """
    n, m = len(generated), len(real)
    if min(n, m) < MIN_IMAGES:
        raise UserError(
            f"fidelity is measured on at least {MIN_IMAGES} generated and {MIN_IMAGES} real images, got {n} and {m}: "
            "generate more, or choose more splits"
        )
    for name, features in (("generated", generated), ("real", real)):
        if not np.isfinite(features).all():
            raise UserError(f"the {label} features of the {name} images hold NaN or infinity: look at those images")
    values = {
        "fid": fid(generated, real),
        "fid_infinity": fid_infinity(generated, real, seed=seed),
        "kid": kid(generated, real),
        "cmmd": cmmd(generated, real),
        **manifold_scores(generated, real)._asdict(),
    }

    def prepare(rows: Rows, columns: Rows) -> OnRows:
        x, y = generated[rows], real[columns]
        singles = [f(x, y) for f in (fid_on_rows, fid_infinity_on_rows, kid_on_rows, cmmd_on_rows)]
        manifold = manifold_scores_on_rows(x, y)
        return lambda r, c: [*(single(r, c) for single in singles), *manifold(r, c)]

    intervals = half_sample_intervals(list(values.values()), prepare, n, m, seed=seed, num_bootstrap=num_bootstrap)
    cut = f"; interval from at most {MAX_ROWS} images of a set" if max(n, m) > MAX_ROWS else ""
    few = "; fewer images than dimensions: some bias is left" if min(n, m) <= generated.shape[1] else ""
    return {
        measure_name(metric, label): Measure(
            value=value,
            interval=_clipped(interval, _FIGURES[metric].bounds),
            interval_by=HALF_SAMPLES,
            better=_FIGURES[metric].better,
            extractor=label,
            num_generated=n,
            num_real=m,
            about=_FIGURES[metric].about + (few if metric == "fid_infinity" else "") + cut,
        )
        for (metric, value), interval in zip(values.items(), intervals, strict=True)
    }


def inception_score_measures(
    label: str, class_logits: NDArray[np.floating[Any]], *, seed: int, num_bootstrap: int = 200
) -> dict[str, Measure]:
    """Inception Score from the classifier's logits on generated images [N, C]."""
    probabilities = class_probabilities(class_logits)
    n = len(probabilities)
    value = inception_score(probabilities)
    [interval] = half_sample_intervals(
        value,
        lambda rows, _: lambda r, _: inception_score(probabilities[rows[r]]),
        n,
        n,
        seed=seed,
        num_bootstrap=num_bootstrap,
    )
    measure = Measure(
        value=value,
        interval=_clipped(interval, (1, probabilities.shape[1])),
        interval_by=HALF_SAMPLES,
        better="higher",
        extractor=label,
        num_generated=n,
        about="confident and varied classes (Salimans et al. 2016), over all images at once",
    )
    return {measure_name("inception_score", label): measure}


def clip_score_measures(label: str, scores: Float64, *, seed: int, num_bootstrap: int = 500) -> dict[str, Measure]:
    """Mean of `alignment.clip_scores` [N]."""
    measure = Measure(
        value=float(scores.mean()),
        interval=mean_interval(scores, seed=seed, num_bootstrap=num_bootstrap),
        interval_by=BOOTSTRAP,
        better="higher",
        extractor=label,
        num_generated=len(scores),
        about="100 max(cos, 0) of image and prompt (CLIPScore, Hessel et al. 2021, with weight 100)",
    )
    return {measure_name("clip_score", label): measure}


def caption_alignment_measures(
    label: str, scores: Float64, *, num_real: int, seed: int, num_bootstrap: int = 500
) -> dict[str, Measure]:
    """Mean of `alignment.caption_alignment` [N]; empty if no prompt is the caption of enough real images."""
    scores = scores[~np.isnan(scores)]
    if len(scores) == 0:
        return {}
    measure = Measure(
        value=float(scores.mean()),
        interval=mean_interval(scores, seed=seed, num_bootstrap=num_bootstrap),
        interval_by=BOOTSTRAP,
        better="higher",
        extractor=label,
        num_generated=len(scores),
        num_real=num_real,
        about=f"how many of the {ALIGNMENT_NEIGHBOURS} nearest real images bear the prompt, from 0 (as by chance) to 1 "
        f"(all); for captions of at least {MIN_BEARERS} real images",
    )
    return {measure_name("caption_alignment", label): measure}


def diversity_measures(
    read: ReadPixels, prompts: Sequence[str], *, seed: int, num_bootstrap: int = 500
) -> dict[str, Measure]:
    """Mean MS-SSIM within a prompt; empty if no prompt was drawn twice.

    Image i was drawn from prompts[i], or from no prompt where that is empty. They are read when they are needed, at
    most 32 pairs at a time: `read(numbers [n])` gives their pixels, uint8 [n, H, W, 3].
    """
    similarities = similarity_within_prompts(read, prompts, seed=seed)
    if not similarities:
        return {}
    values = np.array(list(similarities.values()))
    scales = num_scales(min(read([0]).shape[1:3]))
    measure = Measure(
        value=float(values.mean()),
        interval=mean_interval(values, seed=seed, num_bootstrap=num_bootstrap) if len(values) > 1 else None,
        interval_by=BOOTSTRAP if len(values) > 1 else None,
        better="lower",
        num_generated=sum(count for prompt, count in Counter(prompts).items() if prompt in similarities),
        about=f"MS-SSIM between images of one prompt (Wang et al. 2003), {scales} of {len(SCALE_WEIGHTS)} scales, mean "
        f"over {len(values)} prompts, at most {MAX_PAIRS} pairs of each; 1 = always the same picture",
    )
    return {"ms_ssim": measure}


def class_measures(
    generated: Features, real: Features, prompts: Sequence[str], captions_of_real: Sequence[tuple[str, ...]]
) -> tuple[ClassMeasure, ...]:
    """Improved precision and recall among the images of each caption, the most frequent first.

    Only captions that at least MIN_CLASS_REAL real and MIN_CLASS_GENERATED generated images bear.
    """
    measures = []
    for caption, num_generated in Counter(prompts).items():
        rows = [row for row, prompt in enumerate(prompts) if prompt == caption]
        columns = [column for column, captions in enumerate(captions_of_real) if caption in captions]
        if num_generated < MIN_CLASS_GENERATED or len(columns) < MIN_CLASS_REAL:
            continue
        precision, recall = precision_recall(generated[rows], real[columns])
        measures.append(
            ClassMeasure(
                caption=caption,
                num_generated=num_generated,
                num_real=len(columns),
                precision=precision,
                recall=recall,
            )
        )
    return tuple(sorted(measures, key=lambda measure: -measure.num_real))


def memorization_measures(
    label: str,
    generated: Features,
    train: Features,
    held_out: Features,
    train_keys: Sequence[str],
    *,
    seed: int,
) -> tuple[dict[str, Measure], tuple[Neighbour, ...]]:
    """Copy rate and the train-versus-held-out test; and the nearest pairs, nearest first, at most MAX_NEIGHBOURS.

    `train` [T, D] are the training images, row i of key train_keys[i]; `held_out` [H, D] are real images that were not
    trained on. Raises UserError if there are no training or no held-out images, or if these are all training images.
    """
    if len(train) == 0 or len(held_out) == 0:
        raise UserError(
            f"copies are looked for among training images and judged by held-out ones, got {len(train)} and "
            f"{len(held_out)}: the shards need a train split and another"
        )
    found = nearest(generated, train)
    threshold = copy_threshold(nearest(held_out, train).distance)
    is_copy = found.distance <= threshold.distance
    bias = training_bias(generated, train, held_out, seed=seed)
    few = f"; fewer than {1 / COPY_QUANTILE - 1:.0f} held-out images, so coarse" * (
        threshold.honest_rate > COPY_QUANTILE
    )
    are_training_images = "image is a training image" if threshold.num_leaked == 1 else "images are training images"
    leaked = f"; {threshold.num_leaked} held-out {are_training_images} and left out" * (threshold.num_leaked > 0)

    low, high = _exact_interval(bias.is_nearer_to_training)
    n, num_train, num_held_out = len(generated), len(train), len(held_out)
    measures = {
        "copy_rate": Measure(
            value=float(is_copy.mean()),
            interval=_exact_interval(is_copy),
            interval_by=EXACT,
            better="lower",
            chance=threshold.honest_rate,
            extractor=label,
            num_generated=n,
            num_real=num_train,
            about=f"share of images within {threshold.distance:.3g} of a training image, where "
            f"{threshold.honest_rate:.2%} of new real images would be (by {threshold.num_held_out} held-out "
            f"ones{few}{leaked})",
        ),
        "nearer_to_training": Measure(
            value=bias.at_equal_sizes(bias.share),
            interval=(bias.at_equal_sizes(low), bias.at_equal_sizes(high)),
            interval_by=EXACT,
            chance=0.5,
            extractor=label,
            num_generated=n,
            num_real=num_train + num_held_out,
            about=f"share whose nearest real image is a training image ({num_train}), not a held-out one "
            f"({num_held_out}), as if these were equally many: 0.5 is chance (after Meehan et al. 2020)",
        ),
        "nearer_to_training_p_value": Measure(
            value=bias.p_value,
            better="higher",
            extractor=label,
            num_generated=n,
            num_real=num_train + num_held_out,
            about="chance that a model which has not learnt its training images by heart is this near to them; by "
            "permutation",
        ),
    }
    order = np.argsort(found.distance, kind="stable")[:MAX_NEIGHBOURS]
    neighbours = tuple(
        Neighbour(
            sample=int(row),
            key=train_keys[int(found.index[row])],
            distance=float(found.distance[row]),
            is_suspicious=bool(is_copy[row]),
        )
        for row in order
    )
    return {measure_name(name, label): value for name, value in measures.items()}, neighbours


def _exact_interval(flags: NDArray[np.bool_]) -> Interval:
    """Clopper & Pearson 1934, for a share. Resampling no copies at all would promise that there never is one."""
    interval = binomtest(int(flags.sum()), len(flags)).proportion_ci()
    return float(interval.low), float(interval.high)


def _clipped(interval: Interval, bounds: Interval) -> Interval:
    low, high = np.clip(interval, *bounds)
    return float(low), float(high)
