"""MSDM: one training step of the study's denoiser, ours beside the study's method, the stock recipe and the ceiling.

    python -m benchmarks.msdm_step                                   # on this CPU, all of it
    python -m benchmarks.msdm_step --device cuda --batch 64 --steps 60 --compile
    python -m benchmarks.msdm_step --contenders ours ceiling --tiny  # rehearse

Images of 256 x 256, latents 8 x 32 x 32, a U-Net of 306 M parameters on 64 tokens of a text encoder of BERT's size, all
with random weights. Each contender is a process of its own, and they take turns; of the rounds the median counts.

study     its method re-expressed: autoencoder and text encoder run in every step, fp32, nothing compiled
stock     diffusers' text-to-image recipe re-expressed with accelerate: the same in bf16, with its EMA
ceiling   the same model, precision, layout and update (clipping, fused AdamW, moving average) as ours, in a bare loop
          over one batch of made-up latents
ours      trainers.loop on real shards, in this process: streaming, checkpoints, figures
system    the same by `medsynth train`: with Ray and MLflow too; left out where there is no Ray
"""

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from benchmarks.circumstances import RESULTS, ROOT, circumstances
from benchmarks.standins import write_text_encoder
from cluster.checksums import checksums
from data_shards import Settings, write_shards
from data_shards.sources import medvqa_records
from trainers.compiling import compile_blocks
from trainers.ema import EMA
from trainers.engines import Saving
from trainers.families import msdm
from trainers.hardware import matmul_flops
from trainers.msdm.denoiser import build_denoiser, denoiser_flops, denoising_objective, made_up_inputs
from trainers.msdm.text_encoder import load_text_encoder, tokenize
from trainers.msdm.unet import build_scheduler
from trainers.msdm.vae import build_vae, moments, set_channel_statistics, standardize
from trainers.recipe import MSDMRecipe, dump_recipe, load_recipe
from trainers.run_folder import RunFolder
from trainers.worker import train_rank

EXPERIMENT = "msdm-step"
ABOUT_ONCE = 10**6
TINY = (
    "data.resolution=64",
    *("vae.architecture.block_out_channels=[8, 16, 16, 16]", "vae.architecture.norm_num_groups=4"),
    *("denoiser.architecture.block_out_channels=[32, 32, 64, 64]", "denoiser.architecture.norm_num_groups=8"),
)
Step = Callable[[], object]


def recipe_of(options: argparse.Namespace, folder: Path) -> MSDMRecipe:
    """The study's, cut short: one rank, one batch a step, and nothing drawn or validated but at the end."""
    seldom = dict.fromkeys(("validate_every_steps", "preview_every_steps"), ABOUT_ONCE)
    training = {
        "steps": options.warmup + options.steps,
        "global_batch_size": options.batch,
        "micro_batch_size": options.batch,
        "warmup_steps": 0,
        "channels_last": options.channels_last,
        "compile": options.compile,
        "precision": options.precision,
        "validation_samples": 1,
        "log_every_steps": log_every(options),
        "checkpoint_every_steps": options.checkpoint_every,
        **seldom,
    }
    changes = [
        *(f"denoiser.training.{key}={value}" for key, value in training.items()),
        f"data.shards={folder / 'shards'}",
        f"text_encoder.pretrained={folder / 'text-encoder'}",
        "sampling.num_inference_steps=1",
        "sampling.prompts=[a polyp]",
        "cluster.num_workers=1",
        f"cluster.use_gpu={options.device == 'cuda'}",
        f"cluster.cpus_per_worker={options.threads}",
        f"cluster.storage={folder / 'runs'}",
        f"tracking.experiment={EXPERIMENT}",
        "tracking.register_as=null",
        *(TINY if options.tiny else ()),
    ]
    recipe = load_recipe(str(ROOT / "recipes/msdm-medvqa-gi.yaml"), changes)
    assert isinstance(recipe, MSDMRecipe)
    return recipe


def log_every(options: argparse.Namespace) -> int:
    return 1 if options.device == "cpu" else 10


def prepare(options: argparse.Namespace, folder: Path) -> None:
    """Shards of real images, a text encoder of BERT's size, and a run whose autoencoder is finished."""
    data = ROOT / "tests/data/colonoscopy"
    few = islice(medvqa_records(str(data)), 3 * options.batch)
    write_shards(few, str(folder / "shards"), Settings("frames", {"train": 0.7, "validation": 0.3}), source={})
    write_text_encoder(folder / "text-encoder", **({"hidden_size": 32, "num_hidden_layers": 2} if options.tiny else {}))
    recipe = recipe_of(options, folder)
    for number in range(options.rounds):
        for contender in ("ours", "system"):
            run = RunFolder.of(recipe, f"{contender}-{number}")
            vae = build_vae(recipe.vae.architecture, recipe.data.resolution)
            set_channel_statistics(vae, torch.randn(4, recipe.vae.architecture.latent_channels, 32, 32))
            vae.save_pretrained(run.model("vae"))
            run.mark_complete("vae", checksums([Path(run.model("vae"))]))
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))


# --- contenders: from a recipe to a function that takes a step ---


def embedding_dim(recipe: MSDMRecipe) -> int:
    width: int = AutoConfig.from_pretrained(recipe.text_encoder.pretrained).hidden_size
    return width


def frozen(recipe: MSDMRecipe, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    vae = build_vae(recipe.vae.architecture, recipe.data.resolution)
    set_channel_statistics(vae, torch.randn(4, recipe.vae.architecture.latent_channels, 32, 32))
    tokenizer, text_encoder = load_text_encoder(recipe.text_encoder)
    models = (model.to(device, dtype).eval().requires_grad_(False) for model in (vae, text_encoder))
    return (*models, tokenizer)


def batch_of(recipe: MSDMRecipe, device: torch.device) -> tuple[Tensor, list[str]]:
    size, side = recipe.denoiser.training.micro_batch_size, recipe.data.resolution
    return torch.rand(size, 3, side, side, device=device) * 2 - 1, [f"a polyp of {n} mm" for n in range(size)]


def study(recipe: MSDMRecipe, device: torch.device) -> Step:
    vae, text_encoder, tokenizer = frozen(recipe, device, torch.float32)
    unet = build_denoiser(recipe, embedding_dim(recipe)).to(device).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, weight_decay=0.0)
    scheduler = build_scheduler(recipe.denoiser.noise, recipe.sampling)
    images, captions = batch_of(recipe, device)

    def step() -> float:
        with torch.no_grad():
            mean, logvar = moments(vae, images)
            latents = standardize(vae, mean + (0.5 * logvar).exp() * torch.randn_like(mean))
            tokens = tokenize(tokenizer, captions).to(device)
            prompt = text_encoder(**tokens).last_hidden_state
        noise = torch.randn_like(latents)
        timesteps = torch.randint(1000, (len(latents),), device=device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        loss = nn.functional.mse_loss(unet(noisy, timesteps, prompt).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def stock(recipe: MSDMRecipe, device: torch.device) -> Step:
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16")
    vae, text_encoder, tokenizer = frozen(recipe, device, torch.bfloat16)
    unet = build_denoiser(recipe, embedding_dim(recipe)).train()
    average = EMAModel(unet.parameters())
    average.to(device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, weight_decay=1e-2)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    scheduler = build_scheduler(recipe.denoiser.noise, recipe.sampling)
    images, captions = batch_of(recipe, device)

    def step() -> float:
        with accelerator.accumulate(unet):
            with torch.no_grad():
                latents = vae.encode(images.to(torch.bfloat16)).latent_dist.sample()
                prompt = text_encoder(**tokenize(tokenizer, captions).to(device), return_dict=False)[0]
            noise = torch.randn_like(latents)
            timesteps = torch.randint(1000, (len(latents),), device=device)
            noisy = scheduler.add_noise(latents, noise, timesteps)
            prediction = unet(noisy, timesteps, prompt, return_dict=False)[0]
            loss = nn.functional.mse_loss(prediction.float(), noise.float())
            shown = accelerator.gather(loss.repeat(len(latents))).mean().item()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.step(unet.parameters())
        return float(shown)

    return step


def ceiling(recipe: MSDMRecipe, device: torch.device) -> Step:
    training = recipe.denoiser.training
    unet = build_denoiser(recipe, embedding_dim(recipe)).to(device).train()
    if training.channels_last:
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if training.compile:
        compile_blocks(unet)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    average = EMA(unet, training.ema_decay)
    objective = denoising_objective(recipe, device)
    with device:
        inputs = made_up_inputs(recipe, embedding_dim(recipe), training.micro_batch_size)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bf16"):
            loss = objective(unet, **inputs).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), training.max_grad_norm)
        optimizer.step()
        average.update(unet)
        optimizer.zero_grad(set_to_none=True)

    return step


CONTENDERS: dict[str, Callable[[MSDMRecipe, torch.device], Step] | None] = {
    "study": study,
    "stock": stock,
    "ceiling": ceiling,
    "ours": None,
    "system": None,
}


# --- one turn ---


def bare(step: Step, options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    for _ in range(options.warmup):
        step()
    finish(device)
    began = time.perf_counter()
    for _ in range(options.steps):
        step()
    finish(device)
    return {"images_per_second": options.steps * options.batch / (time.perf_counter() - began)}


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ours(recipe: MSDMRecipe, run: str, options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    reported: dict[int, dict[str, float]] = {}

    def report(step: int, metrics: dict[str, float], pixels: Tensor | None, saving: Saving | None) -> None:
        reported[step] = metrics
        if saving is not None:
            saving.written.add_done_callback(lambda _: shutil.rmtree(saving.folder))

    folder = RunFolder.of(recipe, run)
    msdm.prepare(recipe, "denoiser", folder, lambda what, done, total: None)
    train_rank(recipe, "denoiser", folder, device=device, report=report, resume_from=None)
    return summary({step: metrics for step, metrics in reported.items() if "loss" in metrics}, options)


def system(recipe: MSDMRecipe, run: str, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    from mlflow import MlflowClient

    uri = f"sqlite:///{folder / 'mlflow.db'}"
    command = [sys.executable, str(ROOT / "medsynth.py"), "train", str(folder / "recipe.yaml"), "--run", run]
    environment = os.environ | {"MLFLOW_TRACKING_URI": uri, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, check=True, stdout=sys.stderr)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    [recorded] = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{run}'")
    by_step: dict[int, dict[str, float]] = {}
    for name in recorded.data.metrics:
        if name.startswith("denoiser/"):
            for metric in client.get_metric_history(recorded.info.run_id, name):
                by_step.setdefault(metric.step, {})[name.removeprefix("denoiser/")] = metric.value
    return summary({step: metrics for step, metrics in by_step.items() if "loss" in metrics}, options)


def summary(reported: dict[int, dict[str, float]], options: argparse.Namespace) -> dict[str, float]:
    """Of the logs after the warm-up: images a second and what a step's time went into, medians; and what all took over
    the median, as checkpoints do that are copied, and written beside the training."""
    per_log, last = log_every(options), max(reported)
    warm = [metrics for step, metrics in sorted(reported.items()) if step > options.warmup]
    parts = ("data_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds", "stall_seconds")
    seconds = [options.batch / metrics["images_per_second"] for metrics in warm]
    usual = statistics.median(seconds)
    in_all = math.fsum(seconds) + math.fsum(metrics["stall_seconds"] for metrics in warm)
    checkpoints = sum(step > options.warmup and step % options.checkpoint_every == 0 for step in range(last))
    found = {
        "images_per_second": options.batch / usual,
        **{name: statistics.median(metrics[name] for metrics in warm) for name in parts},
    }
    if checkpoints:
        found["seconds_of_a_checkpoint"] = (in_all - len(warm) * usual) * per_log / checkpoints
    return found


def turn(options: argparse.Namespace) -> dict[str, float]:
    contender, folder, number = options.turn
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    recipe = load_recipe(str(Path(folder) / "recipe.yaml"))
    assert isinstance(recipe, MSDMRecipe)
    if contender == "system":
        return system(recipe, f"system-{number}", options, Path(folder))
    if contender == "ours":
        found = ours(recipe, f"ours-{number}", options, device)
    else:
        build = CONTENDERS[contender]
        assert build is not None
        found = bare(build(recipe, device), options, device)
    found["peak_gb"] = peak_memory(device) / 1e9
    return found


def peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="measured, after --warmup")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--checkpoint-every", type=int, default=6)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of ours and the ceiling")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a small model")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--turn", nargs=3, metavar=("CONTENDER", "FOLDER", "ROUND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.turn:
        print(json.dumps(turn(options)))
        return
    here = circumstances(options.device)
    contenders = [name for name in options.contenders if name != "system" or find_spec("ray")]
    turns: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(options, Path(folder))
        torch.set_num_threads(options.threads)
        dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
        side = 8192 if options.device == "cuda" else 2048
        ceiling_flops = matmul_flops(torch.device(options.device), dtype, side=side)
        recipe = recipe_of(options, Path(folder))
        flops = denoiser_flops(recipe, embedding_dim(recipe))
        for number in range(options.rounds):
            for contender in contenders:
                command = [sys.executable, "-m", "benchmarks.msdm_step", *sys.argv[1:]]
                done = subprocess.run(
                    [*command, "--turn", contender, folder, str(number)], stdout=subprocess.PIPE, text=True, check=True
                )
                found = json.loads(done.stdout.splitlines()[-1])
                turns.setdefault(contender, []).append(found)
                print(f"{contender}: {json.dumps(found)}", flush=True)
    medians = {name: statistics.median(one["images_per_second"] for one in found) for name, found in turns.items()}
    document = {
        **here,
        "arguments": {name: value for name, value in vars(options).items() if name not in ("out", "turn")},
        "matmul_teraflops_per_second": ceiling_flops / 1e12,
        "teraflops_per_image": flops / 1e12,
        "median": {
            name: {
                "images_per_second": rate,
                "teraflops_per_second": rate * flops / 1e12,
                "of_matmul": rate * flops / ceiling_flops,
                "of_study": rate / medians["study"] if "study" in medians else None,
                "of_ceiling": rate / medians["ceiling"] if "ceiling" in medians else None,
            }
            for name, rate in medians.items()
        },
        "turns": turns,
    }
    kind = "gpu" if options.device == "cuda" else "cpu"
    out = options.out or RESULTS / f"{date.today()}-msdm-step-{kind}.json"
    out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document["median"], indent=1))
    print(f"written: {out}")


if __name__ == "__main__":
    main()
