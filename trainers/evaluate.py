"""From a model and real images to an evaluation: draw, extract features, measure, report.

Drawing and feature extraction are cut into shares that any number of Ray actors work off. A picture depends on the
model, its prompt, the seed and its number alone, so one process and many find the same.
"""

import io
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from PIL import Image

from cluster import storage
from cluster.errors import UserError
from cluster.evaluations import EVALUATION as EVALUATION_KIND
from cluster.evaluations import FOLDER, KIND, PARENT
from cluster.progress import OnProgress
from cluster.provenance import git_commit
from cluster.tracking import Tracker, default_tracking_uri, find_run
from cluster.weights import folder_digest, num_parameters
from data_shards import Manifest, derive_seed
from data_shards.decode import decode
from data_shards.reader import read_images
from trainers.drawing_settings import BATCH_SIZE, NUM_IMAGES, SEED
from trainers.fidelity.alignment import MIN_BEARERS, caption_alignment, clip_scores
from trainers.fidelity.cost import cost_of_run
from trainers.fidelity.evaluation import (
    EVALUATION,
    REPORT,
    SCORES,
    Evaluation,
    Generation,
    Measure,
    ModelRecord,
    Neighbour,
    Reference,
    SampleRecord,
    features_uri,
    measure_name,
)
from trainers.fidelity.extractor_uris import absolute_extractor, label_of
from trainers.fidelity.extractors import ClassifyingExtractor, Extractor, PromptExtractor, kept_extractor
from trainers.fidelity.features import ReferenceFeatures, ReferenceWorker, reference_features
from trainers.fidelity.features import shares_of as shares_of_images
from trainers.fidelity.measures import (
    MIN_IMAGES,
    caption_alignment_measures,
    class_measures,
    clip_score_measures,
    diversity_measures,
    inception_score_measures,
    measure_features,
    memorization_measures,
)
from trainers.fidelity.report import CopyPair, FeatureMap, PromptRow, feature_map, write_report
from trainers.fidelity.samples import Drawn, Found, ShareWorker, begin, collect, read_sample, sample_uri, shares_of
from trainers.generate import Drawing, default_device, drawing_of
from trainers.model_source import is_model, noted_run, open_model, pinned
from trainers.pictures import to_pixels
from trainers.recipe import Recipe

T = TypeVar("T")
R = TypeVar("R")
MakeWorker = Callable[[], Callable[[Any], Any]]
"""(what, done, total)"""
TRAIN = "train"
EXPERIMENT = "evaluations"  # of models that no run is known to have trained
ROWS_IN_REPORT, IMAGES_IN_ROW = 8, 4


@dataclass(frozen=True)
class Request:
    """What is asked of an evaluation. Models that were asked the same can be compared."""

    shards: str
    """Folder or s3:// prefix of the real images."""
    splits: tuple[str, ...] | None = None
    """Whose captions are the prompts and whose images are the reference; None: all but the train split."""
    num_samples: int = 300
    images_per_prompt: int = 2
    """Diversity is measured among the images of a prompt."""
    seed: int = 0
    extractors: tuple[str, ...] = ("random-vgg",)
    """URIs. The first one's features decide on copies and on the map."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """guidance_scale, num_inference_steps and the like, where they are not the model's own."""
    batch_size: int = 8
    """Images drawn at a time. A part of what is asked, for another batch size rounds another way."""
    compile: bool = False
    """Compile the denoiser, which rounds another way too."""

    def absolute(self) -> "Request":
        """The same by names that hold in any process, whatever folder it works in."""
        extractors = tuple(absolute_extractor(uri) for uri in self.extractors)
        return replace(self, shards=storage.absolute(self.shards), extractors=extractors)

    def document(self) -> dict[str, Any]:
        """As plain data, to tell one request from another. Compiling is named only where it is asked for: what was
        begun before it could be goes on."""
        document = asdict(self)
        if not self.compile:
            del document["compile"]
        return document


@dataclass(frozen=True)
class Subject:
    """What is judged, as far as it can be known before it draws."""

    record: ModelRecord
    resolution: int
    settings: Mapping[str, Any]
    """All that it is drawn with."""
    found: Found | None
    """The images, where no model draws them."""
    drawing: Drawing | None
    """How it may be drawn, where a model draws."""


def evaluate(
    model_uri: str,
    request: Request,
    out: str,
    *,
    cache: str,
    num_workers: int = 1,
    device: str | None = None,
    on_progress: OnProgress = lambda what, done, total: None,
) -> Evaluation:
    """Judge a model, or a folder of images, beside real images.

    The evaluation lies in the folder or s3:// prefix `out`. Begun there by an earlier call that was cut off, it goes
    on; finished, it is what is returned. Features of real images are kept in `cache` for the next evaluation. Several
    workers are Ray actors.

    Raises UserError for what the user can mend: before anything is drawn, where possible.
    """
    # By names that hold in any process, and whatever an alias will mean by then.
    request = request.absolute()
    out, cache, pinned_uri = storage.absolute(out), storage.absolute(cache), pinned(model_uri)
    manifest = Manifest.load(request.shards)
    splits = splits_of(request, manifest)
    check_request(request, manifest, splits)
    subject = inspect_subject(model_uri, pinned_uri, request)
    cost = cost_of_run(subject.record.run_id)

    with workers_of(num_workers, device) as (work, device):
        extractors = [kept_extractor(uri, device if num_workers == 1 else "cpu") for uri in request.extractors]
        asked = request.document() | {"splits": splits, "shards": manifest.digest, "device": device}
        asked |= {"settings": dict(subject.settings)}  # a registered version's own may have changed since
        begin(out, asked | {"model": subject.record.digest, "extractors": [e.record.digest for e in extractors]})
        if storage.exists(storage.join(out, EVALUATION)):
            return Evaluation.load(out)

        def look_at(splits: Sequence[str], extractor: Extractor) -> ReferenceFeatures:
            worker = ReferenceWorker(extractor.record.uri, device, request.shards, subject.resolution)
            return reference_features(
                request.shards,
                splits,
                extractor,
                resolution=subject.resolution,
                cache=cache,
                extract_shares=lambda shares: work("Looking at real images", worker, shares, on_progress),
            )

        held_out = {extractor.label: look_at(splits, extractor) for extractor in extractors}
        is_trained_on = TRAIN in manifest.splits and TRAIN not in splits
        train = look_at([TRAIN], extractors[0]) if is_trained_on else None
        reference = held_out[extractors[0].label]
        samples = samples_of(subject, request, reference)
        prompts = [sample.prompt for sample in samples]
        source = subject.found or Drawn(
            pinned_uri,
            tuple(prompts),
            request.seed,
            subject.settings,
            device,
            default_tracking_uri(),
            compile_for=min(request.batch_size, len(samples)) if request.compile else None,
        )
        shares = shares_of(len(samples), request.batch_size)
        deque(work("Drawing", ShareWorker(source, request.extractors, device, out), shares, on_progress), maxlen=0)
        device_name = _name_of(device)
    seen = collect(out, shares)

    measures: dict[str, Measure] = {}
    scores: dict[str, NDArray[np.float64]] = {}
    missing: dict[str, str] = {}
    for number, extractor in enumerate(extractors):
        on_progress("Measuring", number, len(extractors))
        generated, real = seen[extractor.label], held_out[extractor.label]
        measures |= feature_measures(extractor, generated, real, request.seed)
        aligned, of_samples = alignment_measures(extractor, generated, real, prompts, request.seed)
        measures |= aligned
        missing |= missing_alignment(extractor.label, aligned, prompts)
        scores |= of_samples
    measures |= diversity_measures(lambda rows: _pixels(out, rows), prompts, seed=request.seed)
    if "ms_ssim" not in measures:
        missing["ms_ssim"] = "no prompt was drawn twice: give --images-per-prompt 2 or more"
    first = seen[extractors[0].label]
    neighbours: tuple[Neighbour, ...] = ()
    if train is not None:
        copies, neighbours = memorization_measures(
            extractors[0].label, first, train.features, reference.features, train.keys, seed=request.seed
        )
        measures |= copies
    else:
        why = "the train split is the reference itself" if TRAIN in splits else "the shards have no train split"
        missing[measure_name("copy_rate", extractors[0].label)] = why
    on_progress("Measuring", len(extractors), len(extractors))

    evaluation = Evaluation(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        medsynth_version=version("medsynth"),
        git_commit=git_commit(),
        model=subject.record,
        reference=Reference(
            shards=request.shards,
            name=manifest.name,
            digest=manifest.digest,
            splits=splits,
            num_images=len(reference.keys),
            num_training_images=len(train.keys) if train else 0,
        ),
        generation=None
        if subject.found
        else Generation(
            seed=request.seed,
            settings=dict(subject.settings),
            images_per_prompt=request.images_per_prompt,
            batch_size=request.batch_size,
            compiled=request.compile,
            resolution=subject.resolution,
            device=device_name,
            seconds_per_image=float(seen["seconds"].sum()) / len(samples),
        ),
        samples=tuple(samples),
        measures=measures,
        missing=missing,
        classes=class_measures(first, reference.features, prompts, reference.captions),
        neighbours=neighbours,
        extractors={extractor.label: extractor.record for extractor in extractors},
        training=cost,
    )
    for extractor in extractors:
        features = safetensors.numpy.save({"features": seen[extractor.label]})
        storage.write_bytes(features_uri(out, extractor.label), features)
    storage.write_bytes(storage.join(out, SCORES), safetensors.numpy.save(scores))
    points = feature_map(extractors[0].label, reference.features, first)
    _report(evaluation, out, request.shards, subject.resolution, reference, points)
    evaluation.save(out)
    return evaluation


def measure_checkpoint(recipe: Recipe, folder: Path) -> dict[str, float]:
    """The figures of a pipeline in a local folder as its recipe's `fidelity` block asks for them, by name."""
    asked = recipe.fidelity
    assert asked is not None
    steps = {} if asked.num_inference_steps is None else {"num_inference_steps": asked.num_inference_steps}
    request = Request(
        shards=recipe.data.shards,
        splits=asked.splits,
        num_samples=asked.num_samples,
        seed=recipe.seed,
        extractors=(asked.extractor,),
        settings=steps,
        batch_size=asked.batch_size,
    )
    with TemporaryDirectory() as out:
        found = evaluate(
            str(folder),
            request,
            out,
            cache=storage.join(recipe.cluster.storage, "features"),
            device="cuda" if asked.use_gpu else "cpu",
        )
    return {name: measure.value for name, measure in found.measures.items()}


def record_evaluation(evaluation: Evaluation, out: str) -> Tracker:
    """An MLflow run of its own for the evaluation at `out`, below the run that trained the model, if that is known.

    Recorded already on this server, it is not recorded again.
    """
    marker = storage.join(out, "mlflow.json")
    if (run_id := noted_run(marker)) and (known := find_run(run_id)):
        return known
    parent = find_run(evaluation.model.run_id) if evaluation.model.run_id else None
    tags = {KIND: EVALUATION_KIND, "model": evaluation.model.uri, "evaluation_folder": storage.absolute(out)}
    # Not as the run's data set: MLflow fails where two runs log the same one at once.
    tags |= {"manifest_digest": evaluation.reference.digest}
    tracker = Tracker.start(
        experiment=parent.experiment() if parent else EXPERIMENT,
        run_name=f"evaluate {evaluation.model.name}",
        tags=tags | ({PARENT: parent.run_id} if parent else {}),
    )
    try:
        drawn = evaluation.generation.model_dump() if evaluation.generation else {}
        tracker.log_params({"model": evaluation.model.uri, **drawn})
        tracker.log_metrics({name: measure.value for name, measure in evaluation.measures.items()}, step=0)
        for name in (EVALUATION, REPORT):
            tracker.log_text(storage.read_bytes(storage.join(out, name)).decode(), f"{FOLDER}/{name}")
        tracker.finish("FINISHED")
        storage.write_bytes(marker, json.dumps({"run_id": tracker.run_id}).encode())
    except BaseException:
        with suppress(Exception):  # what led here is what the user must see
            tracker.finish("FAILED")
        raise
    return tracker


@contextmanager
def workers_of(num_workers: int, device: str | None) -> Iterator[tuple[Callable[..., Iterator[Any]], str]]:
    """A function (what, make_worker, shares, on_progress) -> results in order, run here or by Ray actors; and the
    device that it runs on, which on a cluster need not be this machine's."""

    def here(what: str, make_worker: MakeWorker, shares: Sequence[T], on_progress: OnProgress) -> Iterator[R]:
        on_progress(what, 0, len(shares))
        worker = make_worker()
        for done, share in enumerate(shares, start=1):
            yield worker(share)
            on_progress(what, done, len(shares))

    if num_workers == 1:
        yield here, device or default_device()
        return

    from cluster import runtime  # takes seconds to import, and one process needs none of it

    def by_actors(what: str, make_worker: MakeWorker, shares: Sequence[T], on_progress: OnProgress) -> Iterator[R]:
        on_progress(what, 0, len(shares))
        return runtime.map_actors(
            make_worker,
            shares,
            num_actors=num_workers,
            gpus_per_actor=int(on_gpus),
            on_done=partial(on_progress, what),
        )

    with runtime.connect(min_cpus=num_workers):
        # An actor sees the one GPU that is its own, so its number means nothing there.
        on_gpus = device.startswith("cuda") if device else any(node.num_gpus for node in runtime.nodes())
        yield by_actors, "cuda" if on_gpus else "cpu"


def _name_of(device: str) -> str:
    """What the device is called, as far as this machine knows: speeds of two GPUs do not compare."""
    if not device.startswith("cuda"):
        return device
    return torch.cuda.get_device_name(device) if torch.cuda.is_available() else "GPU of another machine"


def check_request(request: Request, manifest: Manifest, splits: Sequence[str]) -> None:
    """Raise UserError for what would fail after everything was drawn, or is out of bounds."""
    for bounds, name in (
        (NUM_IMAGES, "num_samples"),
        (NUM_IMAGES, "images_per_prompt"),
        (SEED, "seed"),
        (BATCH_SIZE, "batch_size"),
    ):
        bounds.check(name, getattr(request, name))
    shares_of_images(request.shards, manifest, splits)
    held_out = sum(shard.num_samples for split in splits for shard in manifest.split(split))
    if min(held_out, request.num_samples) < MIN_IMAGES:
        raise UserError(
            f"{held_out} real images in {', '.join(splits)} and {request.num_samples} samples: figures need at least "
            f"{MIN_IMAGES} of each; name more splits with --split, or raise --num-samples"
        )
    labels = [label_of(uri) for uri in request.extractors]
    if len(set(labels)) < len(labels):
        raise UserError(
            f"extractors {', '.join(request.extractors)} would both be called {max(labels, key=labels.count)} in the "
            "figures: evaluate with one of them at a time"
        )


def splits_of(request: Request, manifest: Manifest) -> tuple[str, ...]:
    splits = request.splits or tuple(split for split in manifest.splits if split != TRAIN)
    if not splits:
        raise UserError(f"{request.shards} has only a train split: name it with --split, or write shards with others")
    for split in splits:
        manifest.split(split)
    return splits


def inspect_subject(model_uri: str, pinned_uri: str, request: Request) -> Subject:
    """Look at what is judged. Raises UserError if it is neither a model nor a folder of images."""
    with open_model(pinned_uri) as source:
        if not is_model(source.folder):
            found = Found.in_folder(pinned_uri, request.num_samples)
            record = ModelRecord(uri=model_uri, name=source.name, digest=found.digest)
            return Subject(record, found.resolution, {}, found, None)
        drawing = drawing_of(source.folder, name=model_uri, sampling=source.sampling)
        record = ModelRecord(
            uri=model_uri,
            name=source.name,
            digest=folder_digest(source.folder),
            family=drawing.family,
            num_parameters=num_parameters(source.folder),
            run_id=source.run_id,
        )
        return Subject(record, drawing.resolution, drawing.arguments(request.settings), None, drawing)


def samples_of(subject: Subject, request: Request, reference: ReferenceFeatures) -> list[SampleRecord]:
    """The prompts, each a caption of a real image; the first ones are the same however many there are."""
    if subject.found:
        return [SampleRecord(prompt=prompt) for prompt in subject.found.prompts]
    rng = np.random.default_rng(derive_seed(request.seed, "prompts"))
    order = rng.permutation(len(reference.keys))
    samples = []
    for number in range(request.num_samples):
        turn = number // request.images_per_prompt
        image = order[turn % len(order)]
        captions = reference.captions[image]
        caption = captions[derive_seed(request.seed, "caption", turn) % len(captions)]
        samples.append(SampleRecord(prompt=caption, prompt_key=reference.keys[image]))
    return samples


def feature_measures(
    extractor: Extractor, generated: NDArray[np.float32], real: ReferenceFeatures, seed: int
) -> dict[str, Measure]:
    """What one extractor's features tell of the images, whatever they were drawn for."""
    measures = measure_features(extractor.label, generated, real.features, seed=seed)
    if isinstance(extractor, ClassifyingExtractor):
        logits = extractor.class_logits(torch.from_numpy(generated)).numpy()
        measures |= inception_score_measures(extractor.label, logits, seed=seed)
    return measures


def alignment_measures(
    extractor: Extractor, generated: NDArray[np.float32], real: ReferenceFeatures, prompts: Sequence[str], seed: int
) -> tuple[dict[str, Measure], dict[str, NDArray[np.float64]]]:
    """Do images show their prompts? Figures, and each sample's score [N], NaN where it has no prompt to be held to."""
    label = extractor.label
    rows = [row for row, prompt in enumerate(prompts) if prompt]
    if not rows:
        return {}, {}
    told, images = [prompts[row] for row in rows], generated[rows]
    measures: dict[str, Measure] = {}
    scores: dict[str, NDArray[np.float64]] = {}

    def keep(found: dict[str, Measure], of_rows: NDArray[np.float64]) -> None:
        for name in found:
            scores[name] = np.full(len(prompts), np.nan)
            scores[name][rows] = of_rows
        measures.update(found)

    if isinstance(extractor, PromptExtractor):
        distinct = list(dict.fromkeys(told))
        embedded = dict(zip(distinct, extractor.prompt_features(distinct).numpy(), strict=True))
        of_rows = clip_scores(images, np.stack([embedded[prompt] for prompt in told]))
        keep(clip_score_measures(label, of_rows, seed=seed), of_rows)
    of_rows = caption_alignment(images, real.features, told, real.captions)
    keep(caption_alignment_measures(label, of_rows, num_real=len(real.features), seed=seed), of_rows)
    return measures, scores


def missing_alignment(label: str, aligned: Mapping[str, Measure], prompts: Sequence[str]) -> dict[str, str]:
    """Why caption alignment is not among the measures by an extractor, by its name; empty if it is."""
    name = measure_name("caption_alignment", label)
    if name in aligned:
        return {}
    if not any(prompts):
        return {name: "the images do not say for which prompts they were drawn"}
    return {name: f"no prompt is the caption of {MIN_BEARERS} real images or more, but not of all"}


def _pixels(out: str, rows: Sequence[int]) -> NDArray[np.uint8]:
    """Some of the images, uint8 [n, H, W, 3]."""
    return np.stack([np.asarray(read_sample(out, row)) for row in rows])


def _as_compared(encoded: bytes, resolution: int) -> bytes:
    """A real image as features were taken of it, scaled and cropped to a square; as PNG."""
    pixels = to_pixels(decode(encoded, resolution)[None])[0]
    data = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(data, "PNG")
    return data.getvalue()


def _report(
    evaluation: Evaluation, out: str, shards: str, resolution: int, reference: ReferenceFeatures, points: FeatureMap
) -> None:
    """Choose what the page shows, and write it."""
    of_prompt: dict[str, list[int]] = {}
    for number, sample in enumerate(evaluation.samples):
        of_prompt.setdefault(sample.prompt, []).append(number)
    chosen = sorted(of_prompt, key=lambda prompt: -len(of_prompt[prompt]))[:ROWS_IN_REPORT]
    bearers = {
        prompt: [key for key, captions in zip(reference.keys, reference.captions, strict=True) if prompt in captions]
        for prompt in chosen
    }
    pairs = [n for n in evaluation.neighbours if n.is_suspicious] or list(evaluation.neighbours[:IMAGES_IN_ROW])
    keys = [key for prompt in chosen for key in bearers[prompt][:IMAGES_IN_ROW]] + [pair.key for pair in pairs]
    real = {key: _as_compared(data, resolution) for key, data in read_images(shards, keys).items()}

    def drawn(number: int) -> bytes:
        return storage.read_bytes(sample_uri(out, number))

    write_report(
        evaluation,
        prompts=[
            PromptRow(
                prompt,
                [drawn(number) for number in of_prompt[prompt][:IMAGES_IN_ROW]],
                [real[key] for key in bearers[prompt][:IMAGES_IN_ROW]],
            )
            for prompt in chosen
        ],
        pairs=[CopyPair(drawn(pair.sample), real[pair.key], pair) for pair in pairs],
        feature_map=points,
        out=storage.join(out, REPORT),
    )
