"""What a picture of MSDM costs, and how real it looks, by sampler, steps, precision and whether it is compiled.

    python -m benchmarks.sampling --model runs/NAME/denoiser/model --data demo/shards

All variants draw the same captions of held-out images from the same noise in one process, and take turns batch by
batch. `study` is how the study draws: DDPM, 150 steps, guidance 4.5, fp32. The study writes 3.5, as w in
(1 + w) cond - w uncond;  here w is that of  uncond + w (cond - uncond),  one more. The fidelity of each is told
beside the same real images, and as a difference to the study's, paired by prompt and noise. What is compiled is
compiled before, from an empty cache, and stands beside the same uncompiled.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.circumstances import RESULTS, circumstances
from cluster.weights import folder_digest, num_parameters
from data_shards import Manifest, derive_seed
from trainers.fidelity.alignment import caption_alignment
from trainers.fidelity.bootstrap import Difference, paired_difference, paired_mean_difference
from trainers.fidelity.extractors import Extractor, kept_extractor
from trainers.fidelity.features import ReferenceFeatures, reference_features
from trainers.fidelity.measures import caption_alignment_measures, measure_features
from trainers.generate import Model, default_device, load_model

SEED = 0
STUDY = {"sampler": "ddpm", "num_inference_steps": 150, "guidance_scale": 4.5}
SOLVER = {"sampler": "dpm-solver++", "num_inference_steps": 20, "guidance_scale": 4.5}
EAGER: Mapping[str, Mapping[str, Any]] = {
    "study": STUDY,
    "ddim, 50 steps": {**STUDY, "sampler": "ddim", "num_inference_steps": 50},
    **{f"dpm-solver++, {steps} steps": SOLVER | {"num_inference_steps": steps} for steps in (30, 20, 12, 8)},
    "20 steps, bf16": SOLVER | {"precision": "bf16"},
    "12 steps, bf16": SOLVER | {"num_inference_steps": 12, "precision": "bf16"},
    "20 steps, guidance 1": SOLVER | {"guidance_scale": 1.0},
}
COMPILED = {f"{name}, compiled": name for name in ("dpm-solver++, 20 steps", "12 steps, bf16")}
"""The same, compiled."""
VARIANTS = {**EAGER, **{name: EAGER[eager] for name, eager in COMPILED.items()}}
ALONE = ("study", "dpm-solver++, 20 steps", "20 steps, bf16")
"""Timed one picture at a time too: the pictures are the same but for rounding."""
PICTURES_ALONE = 3


@dataclass
class Drawn:
    """What a variant drew so far."""

    pixels: list[NDArray[np.uint8]] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Of a picture, in each batch."""

    def costs(self) -> dict[str, float]:
        processor, wall = statistics.median(self.processor_seconds), statistics.median(self.seconds)
        return {"processor_seconds_per_image": processor, "seconds_per_image": wall, "images_per_second": 1 / wall}


def draw(
    model: Model, prompts: Sequence[str], numbers: Sequence[int], settings: Mapping[str, Any], into: Drawn
) -> None:
    _wait_for(model)
    wall, processor = time.perf_counter(), time.process_time()
    images = model.draw([prompts[number] for number in numbers], numbers, seed=SEED, settings=settings)
    into.processor_seconds.append((time.process_time() - processor) / len(numbers))
    into.seconds.append((time.perf_counter() - wall) / len(numbers))
    into.pixels.append(np.stack([np.asarray(image) for image in images]))


def fidelity(
    label: str, seen: NDArray[np.float32], study: NDArray[np.float32], real: ReferenceFeatures, prompts: Sequence[str]
) -> dict[str, Any]:
    """FID, KID and alignment with their intervals, and how much more each is than the study's."""
    ours, theirs = (caption_alignment(one, real.features, prompts, real.captions) for one in (seen, study))
    found = measure_features(label, seen, real.features, seed=SEED)
    found |= caption_alignment_measures(label, ours, num_real=len(real.features), seed=SEED)
    differences = {
        metric: paired_difference(metric, real.features, seen, study, seed=SEED) for metric in ("fid", "kid")
    } | {"caption_alignment": paired_mean_difference(ours, theirs, seed=SEED)}
    return {
        metric: {
            "value": found[f"{metric}_{label}"].value,
            "interval": found[f"{metric}_{label}"].interval,
            "above_study": _rounded(difference),
        }
        for metric, difference in differences.items()
    }


def compiling(name: str, drawn: Mapping[str, Drawn], seconds_of_first: float) -> dict[str, float]:
    """What it took to compile, with the one step that waited for it, and how far its pictures are off the others."""
    ours, eager = (np.concatenate(drawn[one].pixels).astype(np.int16) for one in (name, COMPILED[name]))
    off = np.abs(ours - eager)
    return {"seconds": seconds_of_first, "levels_off_mean": float(off.mean()), "levels_off_max": int(off.max())}


def features(extractor: Extractor, drawn: Drawn) -> NDArray[np.float32]:
    return np.concatenate([extractor.features(torch.from_numpy(pixels)).numpy() for pixels in drawn.pixels])


def _rounded(difference: Difference) -> dict[str, Any]:
    return {"value": difference.value, "interval": difference.interval}


def _wait_for(model: Model) -> None:
    if model.pipeline.device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a trained MSDM: a folder or models:/NAME/VERSION")
    parser.add_argument("--data", required=True, help="shards of real images; all splits but train are held out")
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--extractor", default="random-vgg:64")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", type=Path, help="JSON; default: benchmarks/results/DATE-sampling-DEVICE.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    here = circumstances(options.device)
    model, extractor = load_model(options.model, options.device), kept_extractor(options.extractor, options.device)
    splits = tuple(split for split in Manifest.load(options.data).splits if split != "train")
    real = reference_features(options.data, splits, extractor, resolution=model.drawing.resolution, cache=None)
    order = np.random.default_rng(SEED).permutation(len(real.keys))
    captions = [real.captions[order[number % len(order)]] for number in range(options.num_samples)]
    prompts = [of[derive_seed(SEED, "caption", number) % len(of)] for number, of in enumerate(captions)]

    beside = [COMPILED[name] for name in options.variants if name in COMPILED]
    names = list(dict.fromkeys(["study", *beside, *options.variants]))
    compiled = load_model(options.model, options.device, compile_for=options.batch_size) if beside else model
    models = {name: compiled if name in COMPILED else model for name in names}
    drawn, alone = {name: Drawn() for name in names}, {name: Drawn() for name in names if name in ALONE}
    seconds_of_first: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # as where nothing was compiled before
        for name in names:  # what is done once is not counted
            first = Drawn()
            draw(models[name], prompts, [0], {**VARIANTS[name], "num_inference_steps": 1}, first)
            (seconds_of_first[name],) = first.seconds
    for start in range(0, options.num_samples, options.batch_size):
        numbers = range(start, min(start + options.batch_size, options.num_samples))
        for name in names:
            draw(models[name], prompts, numbers, VARIANTS[name], drawn[name])
        if start // options.batch_size < PICTURES_ALONE:
            for name, single in alone.items():
                draw(model, prompts, [start], VARIANTS[name], single)
        print(f"{numbers[-1] + 1} of {options.num_samples} pictures", flush=True)

    seen = {name: features(extractor, one) for name, one in drawn.items()}
    study = drawn["study"].costs()
    rows = {}
    for name in names:
        costs = drawn[name].costs()
        rows[name] = {
            "settings": VARIANTS[name],
            **costs,
            "speedup": study["processor_seconds_per_image"] / costs["processor_seconds_per_image"],
            "alone": alone[name].costs() if name in alone else None,
            **({"compiled": compiling(name, drawn, seconds_of_first[name])} if name in COMPILED else {}),
            **fidelity(extractor.label, seen[name], seen["study"], real, prompts),
        }
        print(name, json.dumps(rows[name]), flush=True)
    kind = "gpu" if options.device.startswith("cuda") else "cpu"
    document = {
        **here,
        "native_bf16": kind == "gpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        "model": {"digest": folder_digest(model_folder), "parameters": num_parameters(model_folder)}
        if (model_folder := Path(options.model)).is_dir()
        else options.model,
        "num_real": len(real.keys),
        "arguments": {name: value for name, value in vars(options).items() if name not in ("model", "data", "out")},
        "variants": rows,
    }
    out = options.out or RESULTS / f"{date.today()}-sampling-{kind}.json"
    out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
