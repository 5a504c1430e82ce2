"""One trained model over guidance scale x steps x sampler: how real its pictures are, and how well they obey.

Nothing is trained. All settings draw the same prompts from the same noise and are compared with the same real images,
so what differs between them is the setting. They are worked off, cut into shares, by one pool of actors, each of which
opens model and extractors once.

OUT/request.json       what is asked of every setting; the grid is not part of it, so it may grow later
OUT/settings/NAME/     a setting's samples/ and shares/, as an evaluation has them; measured.json, written last
OUT/sweep.json         the document; front.png and grid.png are its pictures
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from matplotlib.figure import Figure

from cluster import storage
from cluster.documents import parsing, read_json
from cluster.errors import UserError
from cluster.evaluations import KIND, PARENT
from cluster.progress import OnProgress
from cluster.provenance import git_commit
from cluster.registry import RegisteredModel
from cluster.tracking import Tracker, default_tracking_uri, find_run
from data_shards import Manifest
from sweeps.figures import png
from sweeps.guidance_document import FRONT, GRID, SWEEP, GuidanceSweep, SettingResult
from sweeps.guidance_pictures import draw_front, draw_grid, swept_scale
from sweeps.guidance_spec import GuidanceGrid
from sweeps.pareto import pareto_front
from trainers import lease
from trainers.drawing_settings import SETTINGS as DRAWING_SETTINGS
from trainers.evaluate import (
    EXPERIMENT,
    Request,
    alignment_measures,
    check_request,
    feature_measures,
    inspect_subject,
    samples_of,
    splits_of,
    workers_of,
)
from trainers.fidelity.alignment import MIN_BEARERS
from trainers.fidelity.bootstrap import PAIRED_METRICS, paired_difference
from trainers.fidelity.evaluation import Measure, Reference, measure_name
from trainers.fidelity.extractors import Extractor, PromptExtractor, kept_extractor
from trainers.fidelity.features import ReferenceFeatures, ReferenceWorker, reference_features
from trainers.fidelity.features import Share as RealShare
from trainers.fidelity.samples import Drawn, Share, begin, collect, draw_share, read_sample, shares_of
from trainers.generate import Drawing, load_model
from trainers.model_source import pinned, sampling_tags

MEASURED = "measured.json"
KIND_OF_RUN = "guidance-sweep"
SWEEP_TAG = "sampling.sweep"
AXES = (*DRAWING_SETTINGS, "sampler")
ALIGNMENT = ("clip_score", "caption_alignment")  # the first of them that was measured
ROWS_OF_GRID = 6
Setting = dict[str, Any]
"""A value for each of AXES that the model is drawn with."""


RULE = (
    "among the settings whose alignment is not below the 95 % interval of the best-aligned one, the most faithful; of "
    "those that a paired test (same prompts, same noise) cannot tell from it, one with the fewest steps"
)


def sweep_guidance(
    model_uri: str,
    shards: str,
    out: str,
    *,
    guidance_scales: Sequence[float] = (),
    num_inference_steps: Sequence[int] = (),
    samplers: Sequence[str] = (),
    true_cfg_scales: Sequence[float] = (),
    splits: Sequence[str] | None = None,
    num_samples: int = 256,
    images_per_prompt: int = 2,
    seed: int = 0,
    extractors: Sequence[str] = ("random-vgg",),
    fidelity: str = "kid",
    batch_size: int = 8,
    num_workers: int = 1,
    device: str | None = None,
    cache: str | None = None,
    on_progress: OnProgress = lambda what, done, total: None,
) -> GuidanceSweep:
    """Judge a model with every combination of the values given; an axis without values stays as the model has it.

    The sweep lies in the folder or s3:// prefix `out`. Begun there earlier, it goes on: nothing that was drawn or
    measured is done again, and the grid may have grown. `fidelity`, one of PAIRED_METRICS, is taken on the features of
    the first extractor; alignment is the CLIP score where an extractor reads prompts, else caption alignment. Features
    of real images are kept in `cache`, by default `out`/features. Several workers are Ray actors.

    Raises UserError for what the user can mend, before anything is drawn; HeldError while another process sweeps there.
    """
    if fidelity not in PAIRED_METRICS:
        raise UserError(f"there is no fidelity '{fidelity}' to sweep by: choose one of {', '.join(PAIRED_METRICS)}")
    request = _request(shards, splits, num_samples, images_per_prompt, seed, extractors, batch_size)
    out, pinned_uri = storage.absolute(out), pinned(model_uri)
    cache = storage.absolute(cache or storage.join(out, "features"))
    manifest = Manifest.load(request.shards)
    request_splits = splits_of(request, manifest)
    check_request(request, manifest, request_splits)
    subject = inspect_subject(model_uri, pinned_uri, request)
    if subject.drawing is None:
        raise UserError(f"{model_uri} is a folder of images, which nothing can draw otherwise: name a model")
    grid = settings_of(
        subject.drawing,
        {
            "guidance_scale": guidance_scales,
            "true_cfg_scale": true_cfg_scales,
            "num_inference_steps": num_inference_steps,
            "sampler": samplers,
        },
    )

    with lease.held(out), workers_of(num_workers, device) as (work, device):
        opened = [kept_extractor(uri, device if num_workers == 1 else "cpu") for uri in request.extractors]
        asked = request.document() | {"splits": request_splits, "shards": manifest.digest, "device": device}
        del asked["settings"]
        begin(out, asked | {"model": subject.record.digest, "extractors": [e.record.digest for e in opened]})

        def look_at_real(extractor: Extractor) -> ReferenceFeatures:
            worker = ReferenceWorker(extractor.record.uri, device, request.shards, subject.resolution)

            def extract(shares: Sequence[RealShare]) -> Any:
                if len(shares) == 1:  # not worth starting actors for
                    return map(worker(), shares)
                return work("Looking at real images", worker, shares, on_progress)

            return reference_features(
                request.shards,
                request_splits,
                extractor,
                resolution=subject.resolution,
                cache=cache,
                extract_shares=extract,
            )

        real = {extractor.label: look_at_real(extractor) for extractor in opened}
        reference = real[opened[0].label]
        samples = samples_of(subject, request, reference)
        prompts = [sample.prompt for sample in samples]
        _check_measurable(opened, reference, prompts)

        def measured(name: str) -> SettingResult:
            seen = collect(setting_uri(out, name), shares)
            measures: dict[str, Measure] = {}
            for extractor in opened:
                label = extractor.label
                measures |= feature_measures(extractor, seen[label], real[label], seed)
                measures |= alignment_measures(extractor, seen[label], real[label], prompts, seed)[0]
            seconds = float(seen["seconds"].sum()) / len(samples)
            result = SettingResult(name=name, setting=grid[name], measures=measures, seconds_per_image=seconds)
            storage.write_bytes(_measured_uri(out, name), result.model_dump_json(indent=1).encode())
            return result

        results = {name: _known(out, name) for name in grid}
        shares = shares_of(len(samples), batch_size)
        jobs = [(name, share) for name, known in results.items() if known is None for share in shares]
        if jobs:
            worker = SettingWorker(
                {
                    name: Drawn(pinned_uri, tuple(prompts), seed, grid[name], device, default_tracking_uri())
                    for name, _ in jobs
                },
                request.extractors,
                device,
                out,
            )
            # Results come in the order of the jobs, so a setting is measured here while actors draw the next ones.
            for (name, share), _ in zip(jobs, work("Drawing", worker, jobs, on_progress), strict=True):
                if share == shares[-1]:
                    results[name] = measured(name)

    found = [result for result in results.values() if result is not None]
    fidelity_name = measure_name(fidelity, opened[0].label)
    alignment_name = _alignment_name(opened, found[0].measures)

    def is_tied(one: int, other: int) -> bool:
        label = opened[0].label
        ours, theirs = (collect(setting_uri(out, found[i].name), shares)[label] for i in (one, other))
        low, high = paired_difference(fidelity, reference.features, ours, theirs, seed=seed).interval
        return low <= 0 <= high

    points = [Point.of(result, fidelity_name, alignment_name) for result in found]
    front = pareto_front([(point.loss, -point.alignment) for point in points])
    sweep = GuidanceSweep(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        medsynth_version=version("medsynth"),
        git_commit=git_commit(),
        model=subject.record,
        pinned_model=pinned_uri,
        reference=Reference(
            shards=request.shards,
            name=manifest.name,
            digest=manifest.digest,
            splits=request_splits,
            num_images=len(reference.keys),
            num_training_images=0,
        ),
        seed=seed,
        images_per_prompt=images_per_prompt,
        batch_size=batch_size,
        resolution=subject.resolution,
        device=device,
        extractors={extractor.label: extractor.record for extractor in opened},
        samples=tuple(samples),
        fidelity=fidelity_name,
        alignment=alignment_name,
        settings=tuple(found),
        front=tuple(found[i].name for i in front),
        recommended=found[recommend(points, is_tied)].name,
        rule=RULE,
    )
    storage.write_bytes(storage.join(out, FRONT), png(draw_front(sweep)))
    storage.write_bytes(storage.join(out, GRID), png(_grid(sweep, out)))
    storage.write_bytes(storage.join(out, SWEEP), sweep.model_dump_json(indent=1).encode())
    return sweep


def check_grid(grid: GuidanceGrid, shards: str) -> None:
    """Raise UserError for what `sweep_guidance` would refuse whatever the model is, before there is one."""
    request = _request(
        shards, grid.splits, grid.num_samples, grid.images_per_prompt, grid.seed, grid.extractors, grid.batch_size
    )
    manifest = Manifest.load(request.shards)
    check_request(request, manifest, splits_of(request, manifest))
    for uri in request.extractors:
        kept_extractor(uri, "cpu")


def _request(
    shards: str,
    splits: Sequence[str] | None,
    num_samples: int,
    images_per_prompt: int,
    seed: int,
    extractors: Sequence[str],
    batch_size: int,
) -> Request:
    return Request(
        shards=shards,
        splits=tuple(splits) if splits else None,
        num_samples=num_samples,
        images_per_prompt=images_per_prompt,
        seed=seed,
        extractors=tuple(extractors),
        batch_size=batch_size,
    ).absolute()


def record_guidance_sweep(sweep: GuidanceSweep, out: str, *, make_default: bool = True) -> Tracker:
    """An MLflow run for the sweep at `out`, below the run that trained the model, if that is known.

    A model named by models:/… is from now on drawn with the recommended setting wherever it is opened as that, unless
    the user says otherwise: `make_default` writes it to the version's tags `sampling.…`.
    """
    parent = find_run(sweep.model.run_id) if sweep.model.run_id else None
    tags = {KIND: KIND_OF_RUN, "model": sweep.model.uri, "sweep_folder": storage.absolute(out)}
    tracker = Tracker.start(
        experiment=parent.experiment() if parent else EXPERIMENT,
        run_name=f"guidance of {sweep.model.name}",
        tags=tags | ({PARENT: parent.run_id} if parent else {}),
    )
    tracker.log_params(
        {
            "model": sweep.model.uri,
            "seed": sweep.seed,
            "num_samples": len(sweep.samples),
            "recommended": sweep.best.setting,
            "axes": {name: sorted({r.setting[name] for r in sweep.settings}) for name in sweep.best.setting},
        }
    )
    tracker.log_dataset(
        name=sweep.reference.name, digest=sweep.reference.digest, source=sweep.reference.shards, context="evaluation"
    )
    for step, result in enumerate(sweep.settings):  # MLflow draws them side by side, in the order of the grid
        tracker.log_metrics({name: measure.value for name, measure in result.measures.items()}, step)
    tracker.log_metrics({f"recommended/{name}": m.value for name, m in sweep.best.measures.items()}, 0)
    log_files(tracker, out)
    if make_default and sweep.model.uri.startswith("models:/"):
        model, found = RegisteredModel.of(sweep.pinned_model)  # whatever an alias means by now
        model.tag(found.number, sampling_tags(sweep.best.setting) | {SWEEP_TAG: tracker.run_id})
    tracker.finish("FINISHED")
    return tracker


def log_files(tracker: Tracker, out: str) -> None:
    """The sweep's document and pictures as artifacts of a run."""
    with TemporaryDirectory() as temporary:
        for name in (SWEEP, FRONT, GRID):
            (Path(temporary) / name).write_bytes(storage.read_bytes(storage.join(out, name)))
        tracker.log_folder(Path(temporary), KIND_OF_RUN)


def settings_of(drawing: Drawing, axes: Mapping[str, Sequence[Any]]) -> dict[str, Setting]:
    """Every combination of the axes' values, each once and whole, by name; an axis without values is the model's own.

    Raises UserError for an axis or a value that the model is not drawn with.
    """
    given = {name: values for name, values in axes.items() if values}
    settings = {}
    for values in product(*given.values()):
        arguments = drawing.arguments(dict(zip(given, values, strict=True)))
        setting = {name: arguments[name] for name in AXES if name in arguments}
        settings[setting_name(setting)] = setting
    return settings


def setting_name(setting: Mapping[str, Any]) -> str:
    """Name of a setting's folder: guidance-3.5_steps-30_ddim"""
    cfg = f"_cfg-{setting['true_cfg_scale']:g}" if "true_cfg_scale" in setting else ""
    return f"guidance-{setting['guidance_scale']:g}{cfg}_steps-{setting['num_inference_steps']}_{setting['sampler']}"


def setting_uri(out: str, name: str) -> str:
    return storage.join(out, "settings", name)


@dataclass(frozen=True)
class Point:
    """What a choice between settings looks at."""

    loss: float
    """The measure of fidelity, turned so that less is better."""
    alignment: float
    """More is better."""
    lowest_alignment: float
    """Lower end of its interval."""
    num_inference_steps: int

    @classmethod
    def of(cls, result: SettingResult, fidelity: str, alignment: str) -> "Point":
        faithful, aligned = result.measures[fidelity], result.measures[alignment]
        return cls(
            loss=faithful.value if faithful.better == "lower" else -faithful.value,
            alignment=aligned.value,
            lowest_alignment=aligned.interval[0] if aligned.interval else aligned.value,
            num_inference_steps=result.setting["num_inference_steps"],
        )


def recommend(points: Sequence[Point], is_tied: Callable[[int, int], bool]) -> int:
    """The index to choose, by RULE. `is_tied(i, j)`: whether the losses of i and j cannot be told apart."""
    bound = max(points, key=lambda point: point.alignment).lowest_alignment
    aligned = [i for i, point in enumerate(points) if point.alignment >= bound]
    best = min(aligned, key=lambda i: points[i].loss)
    tied = [i for i in aligned if i == best or is_tied(i, best)]
    return min(tied, key=lambda i: (points[i].num_inference_steps, points[i].loss))


@dataclass(frozen=True)
class SettingWorker:
    """Makes a worker on (setting, share): it draws the share with the setting, by a model that is opened once."""

    sources: Mapping[str, Drawn]
    """By name of the setting; all of one model."""
    extractors: tuple[str, ...]
    device: str
    out: str

    def __call__(self) -> Callable[[tuple[str, Share]], None]:
        source = next(iter(self.sources.values()))
        os.environ.setdefault("MLFLOW_TRACKING_URI", source.tracking_uri)
        model = load_model(source.model_uri, self.device)
        extractors = [kept_extractor(uri, self.device) for uri in self.extractors]

        def work(job: tuple[str, Share]) -> None:
            name, share = job
            draw_share(share, self.sources[name].by(model), extractors, setting_uri(self.out, name))

        return work


def _check_measurable(extractors: Sequence[Extractor], real: ReferenceFeatures, prompts: Sequence[str]) -> None:
    bearers = Counter(caption for captions in real.captions for caption in set(captions))
    reads_prompts = any(isinstance(extractor, PromptExtractor) for extractor in extractors)
    if not reads_prompts and not any(MIN_BEARERS <= bearers[prompt] < len(real.keys) for prompt in prompts):
        raise UserError(
            f"alignment cannot be measured: no prompt is the caption of {MIN_BEARERS} real images (but not of all); "
            "name an extractor that reads prompts, such as clip or biomedclip, or choose more splits"
        )


def _alignment_name(extractors: Sequence[Extractor], measures: Mapping[str, Measure]) -> str:
    names = (measure_name(metric, extractor.label) for metric in ALIGNMENT for extractor in extractors)
    return next(name for name in names if name in measures)


def _measured_uri(out: str, name: str) -> str:
    return storage.join(setting_uri(out, name), MEASURED)


def _known(out: str, name: str) -> SettingResult | None:
    """What an earlier call measured."""
    uri = _measured_uri(out, name)
    if not storage.exists(uri):
        return None
    document = read_json(uri)
    with parsing(uri):
        return SettingResult(**document)


def _grid(sweep: GuidanceSweep, out: str) -> Figure:
    """The first image of some prompts over the scales, all else as recommended."""
    first: dict[str, int] = {}
    for number, sample in enumerate(sweep.samples):
        first.setdefault(sample.prompt, number)
    numbers = list(first.values())[:ROWS_OF_GRID]
    axis = swept_scale(sweep)
    rest = {name: value for name, value in sweep.best.setting.items() if name != axis}
    columns = [r for r in sweep.settings if {k: v for k, v in r.setting.items() if k != axis} == rest]
    columns.sort(key=lambda result: result.setting[axis])
    pictures = [[read_sample(setting_uri(out, c.name), number) for c in columns] for number in numbers]
    return draw_grid(sweep, pictures, columns, [sweep.samples[number].prompt for number in numbers])
