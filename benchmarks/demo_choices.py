"""Choices of the demo's recipe, trained at equal compute and judged as the demo judges.

    python -m benchmarks.demo_choices train base c4-b8 --keep choices       # denoisers, and the autoencoders they need
    python -m benchmarks.demo_choices judge base c4-b8 --keep choices --guidance 1 3.5 --seeds 0 1
    python -m benchmarks.demo_choices report --keep choices

Variants are those of `demo_choices.yaml`. Each is an MLflow run (KEEP/mlflow.db, experiment demo-choices), trained by
the project's loop in one process on one thread; an autoencoder serves all denoisers in its latents. KEEP/shards are the
tests' colonoscopy frames, as the demo writes them. The steps of a variant are those that take as much processor time as
the recipe before.
"""

import argparse
import io
import json
import os
import shutil
import time
from collections.abc import Mapping
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from benchmarks.circumstances import RESULTS, ROOT, circumstances
from benchmarks.sweep_trials import write_frames
from cluster import storage
from cluster.tracking import Tracker
from data_shards import ShardStream
from trainers import evaluate
from trainers.engines import Saving
from trainers.families import family_of
from trainers.fidelity.evaluation import Evaluation
from trainers.fidelity.extractors import kept_extractor
from trainers.fidelity.frechet import fid
from trainers.loop import train
from trainers.msdm.vae import moments
from trainers.pictures import grid, to_pixels
from trainers.recipe import MSDMRecipe, load_recipe
from trainers.run_folder import RunFolder

TABLE = Path(__file__).with_suffix(".yaml")
EXTRACTOR = "random-vgg:64"
FIGURES = ("fid", "kid", "precision", "recall", "density", "coverage", "caption_alignment")
NUM_SAMPLES = 96
CPU = torch.device("cpu")
NEVER = 10**6
ONE_PROCESS = (
    "cluster.num_workers=1",
    "data.num_workers=0",
    "tracking.register_as=null",
    *(f"{stage}.training.preview_every_steps={NEVER}" for stage in ("vae", "denoiser")),
    *(f"{stage}.training.checkpoint_every_steps={NEVER}" for stage in ("vae", "denoiser")),
)


def variant_of(stage: str, name: str) -> Mapping[str, Any]:
    """What is changed, key by key; of a denoiser also its autoencoder and what that changes."""
    table = yaml.safe_load(TABLE.read_text())
    variant = table[stage][name] or {}
    if stage == "vae":
        return {"set": variant}
    vae = variant.get("vae", "recipe")
    changes = {key: value for key, value in variant.items() if key != "vae"}
    return {"vae": vae, "set": {**(table["vae"][vae] or {}), **changes}}


def recipe_of(keep: Path, stage: str, name: str, seed: int) -> MSDMRecipe:
    """The demo's recipe with the variant's changes, on one process that takes each batch at once."""
    changes = [f"{key}={json.dumps(value)}" for key, value in variant_of(stage, name)["set"].items()]
    changes += [f"data.shards={keep}/shards", f"cluster.storage={keep}/runs", f"seed={seed}"]
    recipe = str(ROOT / "recipes/msdm-demo.yaml")
    asked = load_recipe(recipe, [*ONE_PROCESS, *changes])
    batch = family_of(asked).training_of(asked, stage).global_batch_size
    found = load_recipe(recipe, [*ONE_PROCESS, *changes, f"{stage}.training.micro_batch_size={batch}"])
    assert isinstance(found, MSDMRecipe)
    return found


def train_variant(keep: Path, stage: str, name: str, seed: int = 0) -> RunFolder:
    """The run of a variant, trained unless it is already; so is the autoencoder that a denoiser needs, of seed 0."""
    recipe = recipe_of(keep, stage, name, seed)
    run = RunFolder.of(recipe, f"{stage}-{name}-{seed}")
    if run.has_model(stage):
        return run
    if stage == "denoiser":
        vae = train_variant(keep, "vae", variant_of(stage, name)["vae"])
        shutil.copytree(vae.model("vae"), run.model("vae"), dirs_exist_ok=True)
    tracker = Tracker.start(experiment="demo-choices", run_name=run.name, tags={"stage": stage, "variant": name})
    tracker.log_params(recipe.model_dump(mode="json"))
    run.begin(recipe, {"run_id": tracker.run_id, "tracking_uri": tracker.tracking_uri})
    train_stage(recipe, stage, run, tracker)
    tracker.finish("FINISHED")
    return run


def train_stage(recipe: MSDMRecipe, stage_name: str, run: RunFolder, tracker: Tracker) -> None:
    family = family_of(recipe)
    training = family.training_of(recipe, stage_name)
    started = time.process_time()

    def report(step: int, metrics: dict[str, float], pixels: Tensor | None, saving: Saving | None) -> None:
        told = {**metrics, "cpu_seconds": time.process_time() - started}
        tracker.log_metrics({f"{stage_name}/{name}": value for name, value in told.items()}, step)
        print(
            f"{run.name} {step}/{training.steps}", {n: told[n] for n in told if "loss" in n or "cpu" in n}, flush=True
        )
        if pixels is not None:
            png = io.BytesIO()
            grid(pixels).save(png, "PNG")
            storage.write_bytes(run.picture(stage_name, step), png.getvalue())
            tracker.log_picture(f"{stage_name}/samples", png.getvalue(), step)
        if saving is not None:  # after the last step alone
            saving.written.result()
            family.export(recipe, stage_name, run, saving.folder, Path(run.model(stage_name)))
            shutil.rmtree(saving.folder)

    family.prepare(recipe, stage_name, run, lambda what, done, total: None)
    stage, engine = family.build(recipe, stage_name, run, CPU)
    train(
        training=training,
        stage=stage,
        engine=engine,
        stream=family.open_stream(recipe, stage_name, run, "train"),
        validation=family.open_stream(recipe, stage_name, run, "validation"),
        seed=recipe.seed,
        report=report,
    )
    run.mark_complete(stage_name)


def judge(keep: Path, name: str, seed: int, *, guidance: float, steps: int, drawn_with: int) -> Evaluation:
    """As the demo judges: 96 samples beside the frames held out. `drawn_with` is the seed of noise and prompts."""
    run = RunFolder(str(keep / "runs" / f"denoiser-{name}-{seed}"))
    request = evaluate.Request(
        shards=str(keep / "shards"),
        num_samples=NUM_SAMPLES,
        seed=drawn_with,
        extractors=(EXTRACTOR,),
        settings={"guidance_scale": guidance, "num_inference_steps": steps},
        batch_size=16,
    )
    out = keep / "judged" / f"{run.name}-{guidance:g}-{steps}-{drawn_with}"
    found = evaluate.evaluate(run.model("denoiser"), request, str(out), cache=str(keep / "features"), device="cpu")
    if recorded := run.mlflow_run():
        tracker = Tracker(recorded["tracking_uri"], recorded["run_id"])
        tracker.log_metrics({f"judged-{guidance:g}-{steps}/{k}": v for k, v in figures(found).items()}, drawn_with)
    return found


def figures(found: Evaluation) -> dict[str, float]:
    label = kept_extractor(EXTRACTOR, "cpu").label
    return {name: found.measures[f"{name}_{label}"].value for name in FIGURES}


@torch.no_grad()
def reconstruction(keep: Path, vae_folder: Path) -> dict[str, float]:
    """How well an autoencoder redraws frames that it was not trained on; and the FID of 96 training frames redrawn,
    which no denoiser of its latents can be expected to beat. `of_real` is that of these frames as they are."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(vae_folder).eval()
    (held_out, real), (trained_on, of_trained_on) = _real(keep)

    def redrawn(images: Tensor) -> Tensor:
        mean, logvar = moments(vae, images)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
        draw = mean + (0.5 * logvar).exp() * noise
        return torch.cat([vae.decode(part, return_dict=False)[0] for part in draw.split(32)]).clamp(-1, 1)

    copies = redrawn(held_out)
    return {
        "mean_squared_error": float((copies - held_out).square().mean()),
        "fid_of_copies": fid(real, _features(copies)),
        "fid_of_redrawn_training_frames": fid(real, _features(redrawn(trained_on))),
        "fid_of_real": fid(real, of_trained_on),
    }


def _features(images: Tensor) -> Any:
    extractor = kept_extractor(EXTRACTOR, "cpu")
    return torch.cat([extractor.features(to_pixels(part)) for part in images.split(32)]).numpy()


@cache
def _real(keep: Path) -> list[tuple[Tensor, Any]]:
    """Frames held out, and as many of those trained on as are drawn; each with its features."""
    held_out = torch.cat([_frames(keep, split) for split in ("validation", "test")])
    return [(images, _features(images)) for images in (held_out, _frames(keep, "train", NUM_SAMPLES))]


def _frames(keep: Path, split: str, count: int | None = None) -> Tensor:
    stream = ShardStream(
        str(keep / "shards"),
        split=split,
        resolution=64,
        global_batch_size=8,
        micro_batch_size=8,
        seed=0,
        rank=0,
        world_size=1,
        horizontal_flip=False,
        num_workers=0,
        cache=None,
    )
    return torch.cat([batch.images for batch in stream.one_pass(8, count)])


def report(keep: Path, out: Path) -> None:
    """One row for each run that is finished, with all that it was judged by."""
    rows = []
    for folder in sorted((keep / "runs").iterdir()):
        stage, _, rest = folder.name.partition("-")
        name, _, seed = rest.rpartition("-")
        run = RunFolder(str(folder))
        if stage not in ("vae", "denoiser") or not run.has_model(stage):
            continue
        row: dict[str, Any] = {"stage": stage, "variant": name, "seed": int(seed), **variant_of(stage, name)}
        if recorded := run.mlflow_run():
            last = Tracker(recorded["tracking_uri"], recorded["run_id"]).last_metrics()
            row["last"] = {k: v for k, v in last.items() if k.endswith(("/loss", "/validation_loss", "/cpu_seconds"))}
        if stage == "vae":
            known = folder / "reconstruction.json"
            if not known.exists():
                known.write_text(json.dumps(reconstruction(keep, Path(run.model("vae")))))
            row["reconstruction"] = json.loads(known.read_text())
        else:
            row["judged"] = [
                {"guidance_and_steps_and_seed": place.name.removeprefix(f"{folder.name}-"), **figures(found)}
                for place in sorted((keep / "judged").glob(f"{folder.name}-[0-9]*"))
                if (place / "evaluation.json").exists()
                for found in [Evaluation.load(str(place))]
            ]
        rows.append(row)
        print(json.dumps(row), flush=True)
    document = {**circumstances(), "num_samples": NUM_SAMPLES, "extractor": EXTRACTOR, "runs": rows}
    out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written: {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["train", "judge", "report"])
    parser.add_argument("names", nargs="*", help="of variants")
    parser.add_argument("--keep", type=lambda text: Path(text).absolute(), required=True, help="folder of all runs")
    parser.add_argument("--stage", choices=["vae", "denoiser"], default="denoiser", help="what to train")
    parser.add_argument("--train-seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the drawing that is judged")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.5])
    parser.add_argument("--steps", type=int, default=20, help="of sampling")
    parser.add_argument("--out", type=Path, help="JSON; default: benchmarks/results/DATE-demo-choices-cpu.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= {"MLFLOW_TRACKING_URI": f"sqlite:///{asked.keep}/mlflow.db", "HF_HUB_OFFLINE": "1"}
    if not (asked.keep / "shards").exists():
        write_frames(str(asked.keep / "shards"), resize=None)
    for name in asked.names:
        if asked.action == "train":
            train_variant(asked.keep, asked.stage, name, asked.train_seed)
            continue
        for guidance in asked.guidance:
            for seed in asked.seeds:
                found = judge(asked.keep, name, asked.train_seed, guidance=guidance, steps=asked.steps, drawn_with=seed)
                told = {key: round(value, 4) for key, value in figures(found).items()}
                print(f"{name} guidance {guidance:g}, drawn with seed {seed}:", json.dumps(told), flush=True)
    if asked.action == "report":
        report(asked.keep, asked.out or RESULTS / f"{date.today()}-demo-choices-cpu.json")


if __name__ == "__main__":
    main()
