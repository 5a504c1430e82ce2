"""Weak scaling: how a step's time grows with the ranks, each of which keeps its own batch.

    python -m benchmarks.scaling measure      # 1, 2 and 4 processes of this machine, against the model below
    python -m benchmarks.scaling predict      # the study's MSDM and FLUX on 8 to 512 GPUs

One model for both. DDP (MSDM) exchanges gradients while the last backward pass still runs, so of the exchange counts
what that does not cover, and the last bucket; ZeRO-3 (FLUX) is `trainers.estimates`: nothing is hidden.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.circumstances import RESULTS, ROOT, circumstances
from tests.servers import free_port
from trainers import estimates
from trainers.engines.ddp import DDPEngine
from trainers.flux.architecture import FLUX_1_DEV
from trainers.flux.footprint import footprint
from trainers.hardware import Gpu, gpu_named
from trainers.msdm.denoiser import build_denoiser, denoiser_flops, denoising_objective, made_up_inputs
from trainers.recipe import FluxRecipe, MSDMRecipe, Training, load_recipe

CPU = torch.device("cpu")
BUCKET_BYTES = 25 * 2**20  # DistributedDataParallel's default
# Of the matrix product's speed, by a U-Net on 32 x 32 latents: MosaicML's Stable Diffusion 2 (866 M parameters, 0.54
# TFLOP an image) trains 137.5 images a second on an A100, which are 74 of the 250 TFLOP/s that its products reach.
UNET_SHARE = 0.30
BACKWARD_SHARE = 2 / 3  # of a pass
COLLECTIVE_SECONDS = 20e-6  # to begin a message; assumed
EMBEDDING_DIM = 768  # Bio_ClinicalBERT's
SMALL = ("vae.architecture.latent_channels=8", "denoiser.architecture.block_out_channels=[96, 128, 192]")
SMALL_EMBEDDING_DIM = 384  # all-MiniLM-L6-v2's


# --- the model ---


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step, by what they go into, and what the step asks of others."""

    num_gpus: int
    global_batch_size: int
    computing: float
    exchanging: float  # not hidden behind the computation
    updating: float
    saving: float  # the copy to host memory, spread over the steps between two checkpoints
    gigabytes_sent: float  # by a GPU
    sample_bytes: int  # of an image's moments
    prompt_bytes: int  # of its caption's embeddings, where there are more than memory keeps
    gpus_per_host: int

    @property
    def seconds(self) -> float:
        return self.computing + self.exchanging + self.updating + self.saving

    @property
    def images_per_second(self) -> float:
        return self.global_batch_size / self.seconds

    @property
    def images_per_host(self) -> float:
        return self.images_per_second / self.num_gpus * min(self.num_gpus, self.gpus_per_host)

    @property
    def megabytes_read_per_host(self) -> tuple[float, float]:
        """Of moments, and of embeddings."""
        return self.images_per_host * self.sample_bytes / 1e6, self.images_per_host * self.prompt_bytes / 1e6


def ring_seconds(nbytes: float, gpu: Gpu, num_gpus: int) -> float:
    """An all-reduce: summed up within each machine, then over machines (each GPU its part, by its own port), then
    spread again. Each of the rounds sends (n - 1) / n of the bytes (Patarasuk & Yuan 2009)."""
    here = min(num_gpus, gpu.gpus_per_host)
    hosts = -(-num_gpus // gpu.gpus_per_host)
    within = 2 * (here - 1) / here * nbytes / gpu.bus
    between = 2 * (hosts - 1) / hosts * nbytes / here / gpu.network
    return within + between + 2 * math.ceil(math.log2(max(2, num_gpus))) * COLLECTIVE_SECONDS


def exposed(exchange: float, backward: float, nbytes: float) -> float:
    """What a backward pass does not cover of an exchange, whose last bucket begins when the pass has ended."""
    return max(exchange - backward, exchange * min(1.0, BUCKET_BYTES / nbytes))


def predict_msdm(recipe: MSDMRecipe, gpu: Gpu, num_gpus: int) -> Prediction:
    training = recipe.denoiser.training
    per_gpu = training.global_batch_size // recipe.cluster.min_workers
    passes = per_gpu // training.micro_batch_size
    flops, parameters = counted(recipe)
    computing = per_gpu * flops / (gpu.matmul_flops * UNET_SHARE)
    gradients = 4 * parameters
    exchange = ring_seconds(gradients, gpu, num_gpus) if num_gpus > 1 else 0.0
    # Clipping reads the gradients; AdamW reads them and reads and writes weights and moments; then the average.
    latent_side = recipe.data.resolution // recipe.vae.architecture.downsampling
    touched = (1 + 1 + 3 * 2 + 1 + 2) * 4 * parameters
    return Prediction(
        num_gpus,
        per_gpu * num_gpus,
        computing,
        exposed(exchange, BACKWARD_SHARE * computing / passes, gradients) if num_gpus > 1 else 0.0,
        touched / gpu.memory_bandwidth,
        16 * parameters / gpu.host_bus / training.checkpoint_every_steps,
        2 * (num_gpus - 1) / num_gpus * gradients / 1e9,
        _moments_bytes(recipe.vae.architecture.latent_channels, latent_side),
        2 * recipe.text_encoder.max_tokens * EMBEDDING_DIM,
        gpu.gpus_per_host,
    )


PUBLISHED = {8: 1100, 16: 2180, 32: 4080, 64: 8530, 128: 11600}
"""Images a second by number of A100s: MosaicML's Stable Diffusion 2, 256 x 256, a global batch of 2,048, micro-batches
of 32 or fewer, precomputed latents (README of mosaicml/diffusion)."""


def predict_published(num_gpus: int) -> float:
    """What the model says of the same; its UNET_SHARE is taken from the first of them."""
    gpu, flops, parameters = gpu_named("a100"), 0.5393e12, 865.9e6
    per_gpu = 2048 // num_gpus
    computing = per_gpu * flops / (gpu.matmul_flops * UNET_SHARE)
    last_pass = computing * min(32, per_gpu) / per_gpu
    exchange = ring_seconds(4 * parameters, gpu, num_gpus)
    return 2048 / (computing + exposed(exchange, BACKWARD_SHARE * last_pass, 4 * parameters))


def predict_flux(recipe: FluxRecipe, gpu: Gpu, num_gpus: int) -> Prediction:
    training = recipe.transformer.training
    per_gpu = training.global_batch_size // recipe.cluster.min_workers
    document = recipe.model_dump()
    document["cluster"]["num_workers"] = num_gpus
    document["transformer"]["training"]["global_batch_size"] = per_gpu * num_gpus
    scaled = FluxRecipe.model_validate(document)
    of_an_image = footprint(
        FLUX_1_DEV,
        resolution=recipe.data.resolution,
        max_tokens=recipe.max_tokens,
        checkpointing=recipe.transformer.activation_checkpointing,
    )
    passes = per_gpu // training.micro_batch_size
    computing = per_gpu * of_an_image.pass_flops / (gpu.matmul_flops * estimates.ACHIEVED_SHARE)
    updating = estimates.update_seconds(scaled, of_an_image, gpu)
    whole = estimates.seconds_per_step(scaled, of_an_image, gpu)
    part = estimates.checkpoint_bytes(scaled, of_an_image) / num_gpus
    return Prediction(
        num_gpus,
        per_gpu * num_gpus,
        computing,
        whole - computing - updating,
        updating,
        part / gpu.host_bus / training.checkpoint_every_steps,
        passes * estimates.bytes_sent(scaled, of_an_image) / 1e9,
        _moments_bytes(16, recipe.data.resolution // 8),
        2 * recipe.max_tokens * 4096,
        gpu.gpus_per_host,
    )


def _moments_bytes(latent_channels: int, latent_side: int) -> int:
    """Mean and log-variance, float32."""
    return 2 * latent_channels * latent_side**2 * 4


@cache
def counted(recipe: MSDMRecipe) -> tuple[float, int]:
    """FLOPs of an image's pass, and parameters, of a recipe's denoiser."""
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build_denoiser(recipe, EMBEDDING_DIM).parameters())
    return denoiser_flops(recipe, EMBEDDING_DIM), parameters


def msdm_recipe(name: str, *changes: str) -> MSDMRecipe:
    recipe = load_recipe(str(ROOT / f"recipes/{name}.yaml"), changes)
    assert isinstance(recipe, MSDMRecipe)
    return recipe


# --- measured here ---


def rank(number: int, world_size: int, rendezvous: str, batch: int, steps: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=number, world_size=world_size)
    recipe = msdm_recipe("msdm-demo", *SMALL)
    unet = build_denoiser(recipe, SMALL_EMBEDDING_DIM)
    gradients = torch.zeros(sum(parameter.numel() for parameter in unet.parameters()))
    engine = DDPEngine(unet, Training(steps=steps, global_batch_size=1, micro_batch_size=1, learning_rate=1e-4), CPU)
    objective, inputs = denoising_objective(recipe, CPU), made_up_inputs(recipe, SMALL_EMBEDDING_DIM, batch)

    def step() -> None:
        loss = objective(engine.model, **inputs).mean()
        engine.backward(loss)
        engine.step(1e-4, loss, stop_requested=False)

    seconds = timed(step, steps)
    exchange = timed(lambda: dist.all_reduce(gradients), steps) if world_size > 1 else 0.0
    if number == 0:
        found = {"seconds": seconds, "exchange": exchange, "gradient_bytes": 4 * len(gradients)}
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


def timed(step: Callable[[], object], times: int) -> float:
    """The median's seconds."""
    seconds = []
    for _ in range(times + 2):
        dist.barrier()
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


def measure(options: argparse.Namespace) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    cores = os.cpu_count() or 1
    for world_size in options.ranks:
        with TemporaryDirectory() as folder:
            out = f"{folder}/found.json"
            arguments = (world_size, f"tcp://127.0.0.1:{free_port()}", options.batch, options.steps, out)
            mp.spawn(rank, arguments, nprocs=world_size)  # type: ignore[attr-defined]
            found = json.loads(Path(out).read_text())
        alone = rows[0]["seconds"] if rows else found["seconds"]
        crowded = max(1.0, world_size / cores)  # processes on one core take turns
        hidden = BACKWARD_SHARE * alone * crowded
        predicted = alone * crowded + exposed(found["exchange"], hidden, found["gradient_bytes"])
        rows.append(
            {
                "ranks": world_size,
                **found,
                "images_per_second": world_size * options.batch / found["seconds"],
                "efficiency": alone * crowded / found["seconds"],
                "predicted_seconds": predicted if rows else alone,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


# --- what the user sees ---


def predictions(gpu: Gpu, numbers: Sequence[int]) -> dict[str, list[Prediction]]:
    msdm = msdm_recipe("msdm-medvqa-gi")
    flux = load_recipe(str(ROOT / "recipes/flux-full-8gpu.yaml"))
    assert isinstance(flux, FluxRecipe)
    return {
        "msdm": [predict_msdm(msdm, gpu, number) for number in numbers],
        "flux": [predict_flux(flux, gpu, number) for number in numbers],
    }


def efficiency(row: Prediction, first: Prediction) -> float:
    """A GPU's rate beside what it is with as many as `first` has."""
    return row.images_per_second / row.num_gpus / (first.images_per_second / first.num_gpus)


def as_table(rows: Sequence[Prediction]) -> str:
    """Markdown, as docs/performance.md has it."""
    head = "| GPUs | global batch | images/s | of 8 GPUs' rate | computing | exchange, not hidden | update | saving |"
    lines = [head, "|---" * 8 + "|"]
    for row in rows:
        seconds = (row.computing, row.exchanging, row.updating, row.saving)
        parts = " | ".join(f"{part * 1e3:,.1f} ms" for part in seconds)
        lines.append(
            f"| {row.num_gpus} | {row.global_batch_size:,} | {row.images_per_second:,.0f} | "
            f"{efficiency(row, rows[0]):.0%} | {parts} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    measuring.add_argument("--batch", type=int, default=8, help="images of a rank")
    measuring.add_argument("--steps", type=int, default=12)
    measuring.add_argument("--out", type=Path, default=RESULTS / f"{date.today()}-scaling-cpu.json")
    predicting = commands.add_parser("predict")
    predicting.add_argument("--gpu", default="h100", help="as `medsynth plan --gpu` knows it")
    predicting.add_argument("--gpus", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512])
    options = parser.parse_args()
    if options.command == "predict":
        for number, rate in PUBLISHED.items():
            print(f"Published of {number} A100s: {rate:,} images/s; predicted: {predict_published(number):,.0f}")
        for name, rows in predictions(gpu_named(options.gpu), options.gpus).items():
            print(f"\n{name} on {options.gpu}, batch of a GPU fixed\n\n{as_table(rows)}\n")
            last = rows[-1]
            moments, prompts = last.megabytes_read_per_host
            print(
                f"A GPU sends {last.gigabytes_sent:.1f} GB a step; a machine reads {moments:.0f} MB/s of moments, "
                f"and up to {prompts:.0f} MB/s of prompt embeddings, as far as memory does not keep them"
            )
        return
    arguments = {name: getattr(options, name) for name in ("ranks", "batch", "steps")}
    document = {**circumstances(), "arguments": arguments, "rows": measure(options)}
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
