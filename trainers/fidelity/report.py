"""An evaluation as a page for people: one HTML file that needs nothing beside it.

The page asks for nothing from anywhere: images are inlined, made small, there is no script, and its content security
policy forbids all else. Captions and names are other people's text: the template escapes whatever it is given.
"""

import base64
import io
import posixpath
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image
from sklearn.decomposition import PCA

from cluster import storage
from cluster.promotion import CHANCE, MemorizationGate, pictures_to_decide
from data_shards.decode import open_image
from trainers.fidelity.evaluation import STANDARD_EXTRACTORS, Evaluation, Measure, Neighbour
from trainers.fidelity.figures import (
    GROUPS,
    METRICS,
    MISSING,
    by_group,
    decimals,
    label_of,
    metric_of,
    what_is_best,
    write,
)

MOST_POINTS = 1500  # of each kind in the map: more would hide each other, and weigh on the page
MAP_WIDTH, MAP_HEIGHT, MAP_MARGIN = 1000.0, 620.0, 18.0
MOST_NEIGHBOURS = 64  # that an evaluation keeps
# Those that the command takes.
ASKED_SETTINGS = ("guidance_scale", "true_cfg_scale", "num_inference_steps", "sampler", "precision")
THUMBNAIL_SIDE, THUMBNAIL_QUALITY = 256, 85  # 64 pairs of 1024² would weigh over 100 MB
IMAGE_TYPES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}


@dataclass(frozen=True)
class PromptRow:
    """Encoded images (PNG or JPEG): what was drawn for a prompt, and real images that have it as their caption."""

    prompt: str
    generated: list[bytes]
    real: list[bytes]


@dataclass(frozen=True)
class CopyPair:
    """Encoded images (PNG or JPEG): a generated one and the training image nearest to it."""

    generated: bytes
    real: bytes
    neighbour: Neighbour


@dataclass(frozen=True)
class FeatureMap:
    """Features on the two directions in which the real ones vary most."""

    label: str
    """Of the extractor."""
    real: NDArray[np.float64]
    """[N, 2]"""
    generated: NDArray[np.float64]
    """[M, 2]"""
    explained: tuple[float, float]
    """Share of the real features' variance along each direction."""


def feature_map(label: str, real: NDArray[np.float32], generated: NDArray[np.float32]) -> FeatureMap:
    """Project features [N, D] and [M, D] on the first two principal components of the real ones.

    The generated ones take no part in choosing the directions. Raises ValueError with fewer than two real images or
    dimensions.
    """
    pca = PCA(n_components=2, random_state=0).fit(real.astype(np.float64))
    first, second = (float(share) for share in np.nan_to_num(pca.explained_variance_ratio_))
    projected = pca.transform(generated.astype(np.float64))
    return FeatureMap(label, pca.transform(real.astype(np.float64)), projected, (first, second))


def write_report(
    evaluation: Evaluation,
    *,
    prompts: Sequence[PromptRow],
    pairs: Sequence[CopyPair],
    feature_map: FeatureMap | None,
    out: str,
) -> None:
    """Write the page to a path or s3:// address. Raises ValueError if an image is neither PNG nor JPEG."""
    environment = Environment(
        loader=PackageLoader("trainers.fidelity"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[[Any], str]] = {
        "data_uri": _data_uri,
        "percent": lambda share: f"{100 * share:.2f}%",
        "public": public,
        "best": what_is_best,
    }
    environment.filters |= filters
    html = environment.get_template("report.html").render(
        evaluation=evaluation,
        created=_when(evaluation.created),
        verdict=list(_verdict(evaluation)),
        limits=list(limits_of(evaluation)),
        groups=_groups(evaluation),
        intervals=_listed(
            list(dict.fromkeys(m.interval_by or "not said how" for m in evaluation.measures.values() if m.interval))
        ),
        missing=list(missing_of(evaluation)),
        scale=[figure for group in _groups(evaluation) for figure in group.figures if figure.is_share],
        prompts=prompts,
        suspicious=[pair for pair in pairs if pair.neighbour.is_suspicious],
        nearest=[pair for pair in pairs if not pair.neighbour.is_suspicious],
        copies=_copies(evaluation),
        map=_drawn(feature_map) if feature_map is not None else None,
        command=repeat_command(evaluation),
    )
    storage.write_bytes(out, html.lstrip().encode())


def public(uri: str) -> str:
    """A name that tells whoever gets the page nothing of somebody's machine: of an absolute path, also of weights after
    KIND:, the last part."""
    if uri.startswith(("models:/", "runs:/")) or ("://" in uri and not uri.startswith("file://")):
        return uri
    path = uri.removeprefix("file://")
    kind, colon, place = path.partition(":") if not path.startswith(("/", "~")) and ":" in path else ("", "", path)
    return kind + colon + (posixpath.basename(place.rstrip("/")) if place.startswith(("/", "~")) else place)


def repeat_command(evaluation: Evaluation) -> str:
    """What to type to evaluate the same again, with names for paths."""
    drawn = evaluation.generation
    options: list[tuple[str, object]] = [("data", public(evaluation.reference.shards))]
    options += [("split", split) for split in evaluation.reference.splits]
    options += [("num_samples", len(evaluation.samples))]
    options += [("extractor", public(extractor.uri)) for extractor in evaluation.extractors.values()]
    if drawn is not None:
        options += [("seed", drawn.seed), ("images_per_prompt", drawn.images_per_prompt)]
        options += [("batch_size", drawn.batch_size)]
        options += [(name, drawn.settings[name]) for name in ASKED_SETTINGS if name in drawn.settings]
    flags = (f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in options if value is not None)
    compiled = " --compile" if drawn is not None and drawn.compiled else ""
    return f"medsynth evaluate {shlex.quote(public(evaluation.model.uri))} {' '.join(flags)}{compiled}"


# --- what the template shows ---


@dataclass(frozen=True)
class Figure:
    """A measure, written."""

    label: str
    measure: Measure
    value: str
    interval: str
    is_share: bool


@dataclass(frozen=True)
class Group:
    name: str
    about: str
    figures: list[Figure]


@dataclass(frozen=True)
class Point:
    kind: str
    """real or generated"""
    x: float
    y: float


@dataclass(frozen=True)
class Drawn:
    """A feature map in the units of its picture, with few enough points to be seen."""

    map: FeatureMap
    height: float
    points: list[Point]


def _groups(evaluation: Evaluation) -> list[Group]:
    return [
        Group(name, GROUPS[name], [_figure(*item) for item in measures])
        for name, measures in by_group(evaluation.measures.items()).items()
    ]


def _figure(name: str, measure: Measure) -> Figure:
    places = decimals([measure.value], [measure.interval])
    interval = MISSING if measure.interval is None else " to ".join(write(bound, places) for bound in measure.interval)
    low, high = measure.interval or (measure.value, measure.value)
    is_share = metric_of(name, measure).is_share and low >= 0 and high <= 1
    return Figure(label_of(name, measure), measure, write(measure.value, places), interval, is_share)


def _verdict(evaluation: Evaluation) -> Iterator[str]:
    """Sentences that say what was measured, and how far the figures carry; none that they do not support."""
    reference, count = evaluation.reference, len(evaluation.samples)
    num_prompts = len({sample.prompt for sample in evaluation.samples})
    of_prompts = f" for {num_prompts:,} different prompts" if num_prompts > 1 else ""
    how = f"were drawn{of_prompts} with seed {evaluation.generation.seed}" if evaluation.generation else "were given"
    yield (
        f"{count:,} images {how}, and compared with {reference.num_images:,} real images of {reference.name} "
        f"({_listed(reference.splits)})."
    )
    groups = _groups(evaluation)
    if groups:
        leads = [group.figures[0] for group in groups]
        yield "In figures: " + "; ".join(f"{lead.label} {lead.value}{_in_brackets(lead)}" for lead in leads) + "."
    yield obedience(evaluation)
    yield _copies(evaluation)
    yield "These figures say how this model compares with these real images, and nothing about another model."


def obedience(evaluation: Evaluation) -> str:
    """One sentence on whether prompts are obeyed, as far as it was measured."""
    aligned = [item for item in evaluation.measures.items() if metric_of(*item).group == "Alignment"]
    by_chance = [(name, found) for name, found in aligned if metric_of(name, found) is METRICS["caption_alignment"]]
    if not aligned:
        reasons = [why for name, why in evaluation.missing.items() if name.startswith("caption_alignment")]
        return f"Whether the images show what their prompts ask for was not measured{_after_colon(reasons)}."
    if not by_chance:
        return "How well images show their prompts is a score without a floor here: compare it with another model's."
    figure = _figure(*by_chance[0])
    low, high = figure.measure.interval or (figure.measure.value,) * 2
    told = f"{figure.label} {figure.value}{_in_brackets(figure)}, where 0 is chance and 1 is every image"
    if low > 0:
        return f"The images show their prompts more often than by chance: {told}."
    if high < 0:
        return f"The images show something else than their prompts more often than by chance: {told}."
    return f"That the images show what their prompts ask for cannot be told from chance: {told}."


def missing_of(evaluation: Evaluation) -> Iterator[str]:
    """What was not measured, and why."""
    for name, why in evaluation.missing.items():
        metric = next((METRICS[known].label for known in METRICS if name.startswith(known)), name)
        yield f"{metric}: not measured, for {why}."


def few_for_copies(evaluation: Evaluation) -> Iterator[str]:
    """Where there are too few images to show that few of them are copies, by the default gates."""
    limit = MemorizationGate().limit
    for name, found in evaluation.measures.items():
        if metric_of(name, found) is METRICS["copy_rate"] and found.interval and found.interval[0] <= limit:
            if found.interval[1] <= limit:
                continue
            needed = pictures_to_decide(found.value, found.num_generated, limit=limit, chance=found.chance or CHANCE)
            draw = f": draw {needed:,}" if needed else ""
            yield (
                f"{found.num_generated:,} images are too few to tell whether more than {100 * limit:g} % are copies: "
                f"up to {100 * found.interval[1]:.1f} % may be{draw}."
            )


def limits_of(evaluation: Evaluation) -> Iterator[str]:
    """What must be known to read the figures."""
    yield from few_for_copies(evaluation)
    for name, measure in evaluation.measures.items():
        if metric_of(name, measure) is not METRICS["fid"] or measure.extractor is None:
            continue
        label = label_of(name, measure)
        if measure.extractor != STANDARD_EXTRACTORS["fid"]:
            yield f"{label} was not taken on Inception features: set it beside no published FID."
        fewest = min(measure.num_generated, measure.num_real)
        extractor = evaluation.extractors.get(measure.extractor)
        if extractor is not None and fewest <= extractor.dim:
            yield (
                f"{label} was taken on no more images ({fewest:,}) than its features have dimensions "
                f"({extractor.dim:,}), so it is biased upwards (Chong and Forsyth 2020): compare it only at the same "
                "number of images."
            )


def _copies(evaluation: Evaluation) -> str:
    """One sentence on suspicious samples."""
    count, trained_on = len(evaluation.samples), evaluation.reference.num_training_images
    if not trained_on:
        return "Copies of training images were not looked for."
    suspicious = sum(neighbour.is_suspicious for neighbour in evaluation.neighbours)
    if not suspicious:
        return (
            f"None of the {count:,} images comes nearer to one of the {trained_on:,} training images than real "
            "held-out images usually do."
        )
    number = f"At least {suspicious}" if suspicious >= MOST_NEIGHBOURS else str(suspicious)
    return (
        f"{number} of the {count:,} images {'comes' if suspicious == 1 else 'come'} nearer to one of the "
        f"{trained_on:,} training images than real held-out images usually do: look at the pairs."
    )


def _drawn(found: FeatureMap) -> Drawn:
    """Bring a map to the picture's units, the same for both axes."""
    real, generated = _some(found.real), _some(found.generated)
    everything = np.concatenate([real, generated])
    low, high = everything.min(axis=0), everything.max(axis=0)
    width, height = (float(span) or 1.0 for span in high - low)
    unit = min((MAP_WIDTH - 2 * MAP_MARGIN) / width, (MAP_HEIGHT - 2 * MAP_MARGIN) / height)
    left, bottom = (MAP_WIDTH - width * unit) / 2, height * unit + MAP_MARGIN
    kinds = ["real"] * len(real) + ["generated"] * len(generated)
    points = [
        Point(kind, round(left + (x - low[0]) * unit, 1), round(bottom - (y - low[1]) * unit, 1))
        for kind, (x, y) in zip(kinds, everything.tolist(), strict=True)
    ]
    # What is drawn last lies on top: in mixed order neither kind hides the other.
    order = np.random.default_rng(0).permutation(len(points))
    return Drawn(found, round(bottom + MAP_MARGIN, 1), [points[i] for i in order])


def _some(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """At most MOST_POINTS of them, evenly spread over their order."""
    count = len(features)
    some: NDArray[np.float64] = features[np.linspace(0, count - 1, min(count, MOST_POINTS)).astype(int)]
    return some


def _data_uri(image: bytes) -> str:
    """Raises ValueError if an encoded image is neither PNG nor JPEG."""
    if not image.startswith(tuple(IMAGE_TYPES)):
        raise ValueError(f"an image of the report is neither PNG nor JPEG: it begins with {image[:8]!r}")
    small = _thumbnail(image)
    kind = next(kind for magic, kind in IMAGE_TYPES.items() if small.startswith(magic))
    return f"data:{kind};base64,{base64.b64encode(small).decode()}"


def _thumbnail(image: bytes) -> bytes:
    """The encoded image itself where it is small, else a JPEG of at most THUMBNAIL_SIDE pixels a side."""
    with Image.open(io.BytesIO(image)) as picture:
        if max(picture.size) <= THUMBNAIL_SIDE:
            return image
    small = open_image(image)
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    jpeg = io.BytesIO()
    small.save(jpeg, "JPEG", quality=THUMBNAIL_QUALITY)
    return jpeg.getvalue()


def _when(created: str) -> str:
    moment = datetime.fromisoformat(created).astimezone(UTC)
    return f"{moment.day} {moment:%B %Y, %H:%M} UTC"


def _after_colon(reasons: Sequence[str]) -> str:
    return f": {reasons[0]}" if reasons else ""


def _in_brackets(figure: Figure) -> str:
    return "" if figure.measure.interval is None else f" ({figure.interval})"


def _listed(names: Sequence[str]) -> str:
    """a; a and b; a, b and c"""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else "all splits"
