"""From a model and real images to an evaluation: draw, extract features, measure, report.

Drawing and feature extraction are cut into shares that any number of Ray actors work off. A picture depends on the
model, its prompt, the seed and its number alone, so one process and many find the same.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
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

from cluster import runtime, storage
from cluster.errors import UserError
from cluster.evaluations import EVALUATION as EVALUATION_KIND
from cluster.evaluations import FOLDER, KIND, PARENT
from cluster.tracking import Tracker, find_run
from cluster.weights import folder_digest, num_parameters
from data_shards import Manifest, derive_seed
from data_shards.stream import read_images
from trainers.code_version import git_commit
from trainers.fidelity.cost import cost_of_run
from trainers.fidelity.evaluation import (
    EVALUATION,
    Evaluation,
    Generation,
    Measure,
    ModelRecord,
    Neighbour,
    Reference,
    SampleRecord,
)
from trainers.fidelity.extractors import ClassifyingExtractor, Extractor, PromptExtractor, kept_extractor
from trainers.fidelity.features import ReferenceFeatures, ReferenceWorker, reference_features
from trainers.fidelity.measures import (
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
from trainers.generate import Drawing, default_device, drawing_of, is_model
from trainers.model_source import open_model
from trainers.recipe import Recipe

T = TypeVar("T")
R = TypeVar("R")
MakeWorker = Callable[[], Callable[[Any], Any]]
OnProgress = Callable[[str, int, int], None]
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
    num_samples: int = 256
    images_per_prompt: int = 2
    """Diversity is measured among the images of a prompt."""
    seed: int = 0
    extractors: tuple[str, ...] = ("random-vgg",)
    """URIs. The first one's features decide on copies and on the map."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """guidance_scale, num_inference_steps and the like, where they are not the model's own."""
    batch_size: int = 8
    """Images drawn at a time. A part of what is asked, for another batch size rounds another way."""


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
    manifest = Manifest.load(request.shards)
    splits = splits_of(request, manifest)
    device = device or default_device()
    subject = inspect_subject(model_uri, request)
    extractors = [kept_extractor(uri, device) for uri in request.extractors]
    asked = asdict(request) | {"splits": splits, "shards": manifest.digest}
    asked |= {"settings": dict(subject.settings)}  # a registered version's own may have changed since
    begin(out, asked | {"model": subject.record.digest, "extractors": [e.record.digest for e in extractors]})
    if storage.exists(storage.join(out, EVALUATION)):
        return Evaluation.load(out)

    held_out: dict[str, ReferenceFeatures] = {}
    train: ReferenceFeatures | None = None
    with workers_of(num_workers, device) as work:

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

        for extractor in extractors:
            held_out[extractor.label] = look_at(splits, extractor)
        if TRAIN in manifest.splits and TRAIN not in splits:
            train = look_at([TRAIN], extractors[0])
        reference = held_out[extractors[0].label]
        samples = samples_of(subject, request, reference)
        source = subject.found or Drawn(
            model_uri, tuple(sample.prompt for sample in samples), request.seed, subject.settings, device
        )
        shares = shares_of(len(samples), request.batch_size)
        deque(work("Drawing", ShareWorker(source, request.extractors, device, out), shares, on_progress), maxlen=0)
    seen = collect(out, shares)

    measures: dict[str, Measure] = {}
    prompts = [sample.prompt for sample in samples]
    for number, extractor in enumerate(extractors):
        on_progress("Measuring", number, len(extractors))
        measures |= feature_measures(extractor, seen[extractor.label], held_out[extractor.label], prompts, request.seed)
    measures |= diversity_measures(_pixels(out, len(samples)), prompts, seed=request.seed)
    first = seen[extractors[0].label]
    neighbours: tuple[Neighbour, ...] = ()
    if train is not None:
        copies, neighbours = memorization_measures(
            extractors[0].label, first, train.features, reference.features, train.keys, seed=request.seed
        )
        measures |= copies
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
            resolution=subject.resolution,
            device=device,
            seconds_per_image=float(seen["seconds"].sum()) / len(samples),
        ),
        samples=tuple(samples),
        measures=measures,
        classes=class_measures(first, reference.features, prompts, reference.captions),
        neighbours=neighbours,
        extractors={extractor.label: extractor.record for extractor in extractors},
        training=cost_of_run(subject.record.run_id),
    )
    for extractor in extractors:
        features = safetensors.numpy.save({"features": seen[extractor.label]})
        storage.write_bytes(features_uri(out, extractor.label), features)
    _report(evaluation, out, request.shards, reference, feature_map(extractors[0].label, reference.features, first))
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
    """An MLflow run of its own for the evaluation at `out`, below the run that trained the model, if that is known."""
    parent = find_run(evaluation.model.run_id) if evaluation.model.run_id else None
    tags = {KIND: EVALUATION_KIND, "model": evaluation.model.uri, "evaluation_folder": storage.absolute(out)}
    tracker = Tracker.start(
        experiment=parent.experiment() if parent else EXPERIMENT,
        run_name=f"evaluate {evaluation.model.name}",
        tags=tags | ({PARENT: parent.run_id} if parent else {}),
    )
    tracker.log_params(
        {"model": evaluation.model.uri} | evaluation.generation.model_dump() if evaluation.generation else {}
    )
    tracker.log_dataset(
        name=evaluation.reference.name,
        digest=evaluation.reference.digest,
        source=evaluation.reference.shards,
        context="evaluation",
    )
    tracker.log_metrics({name: measure.value for name, measure in evaluation.measures.items()}, step=0)
    for name in (EVALUATION, "report.html"):
        tracker.log_text(storage.read_bytes(storage.join(out, name)).decode(), f"{FOLDER}/{name}")
    tracker.finish("FINISHED")
    return tracker


def features_uri(out: str, label: str) -> str:
    """Where an evaluation keeps what an extractor saw in the generated images."""
    return storage.join(out, "features", f"{label}.safetensors")


@contextmanager
def workers_of(num_workers: int, device: str) -> Iterator[Callable[..., Iterator[Any]]]:
    """A function (what, make_worker, shares, on_progress) -> results in order, run here or by Ray actors."""

    def here(what: str, make_worker: MakeWorker, shares: Sequence[T], on_progress: OnProgress) -> Iterator[R]:
        worker = make_worker()
        for done, share in enumerate(shares, start=1):
            yield worker(share)
            on_progress(what, done, len(shares))

    def by_actors(what: str, make_worker: MakeWorker, shares: Sequence[T], on_progress: OnProgress) -> Iterator[R]:
        return runtime.map_actors(
            make_worker,
            shares,
            num_actors=num_workers,
            gpus_per_actor=int(device.startswith("cuda")),
            on_done=partial(on_progress, what),
        )

    if num_workers == 1:
        yield here
    else:
        with runtime.connect(min_cpus=num_workers):
            yield by_actors


def splits_of(request: Request, manifest: Manifest) -> tuple[str, ...]:
    splits = request.splits or tuple(split for split in manifest.splits if split != TRAIN)
    if not splits:
        raise UserError(f"{request.shards} has only a train split: name it with --split, or write shards with others")
    for split in splits:
        manifest.split(split)
    return splits


def inspect_subject(model_uri: str, request: Request) -> Subject:
    """Look at what is judged. Raises UserError if it is neither a model nor a folder of images."""
    with open_model(model_uri) as source:
        if not is_model(source.folder):
            found = Found.in_folder(model_uri, request.num_samples)
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
    extractor: Extractor,
    generated: NDArray[np.float32],
    real: ReferenceFeatures,
    prompts: Sequence[str],
    seed: int,
) -> dict[str, Measure]:
    """All that one extractor's features tell."""
    label = extractor.label
    measures = measure_features(label, generated, real.features, seed=seed)
    if isinstance(extractor, ClassifyingExtractor):
        logits = extractor.class_logits(torch.from_numpy(generated)).numpy()
        measures |= inception_score_measures(label, logits, seed=seed)
    if isinstance(extractor, PromptExtractor):
        distinct = list(dict.fromkeys(prompts))
        embedded = dict(zip(distinct, extractor.prompt_features(distinct).numpy(), strict=True))
        of_prompts = np.stack([embedded[prompt] for prompt in prompts])
        measures |= clip_score_measures(label, generated, of_prompts, seed=seed)
    return measures | caption_alignment_measures(label, generated, real.features, prompts, real.captions, seed=seed)


def _pixels(out: str, count: int) -> NDArray[np.uint8]:
    return np.stack([np.asarray(read_sample(out, number)) for number in range(count)])


def _report(evaluation: Evaluation, out: str, shards: str, reference: ReferenceFeatures, points: FeatureMap) -> None:
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
    real = read_images(shards, keys)

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
        out=storage.join(out, "report.html"),
    )
