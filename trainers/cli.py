"""The commands `medsynth train`, `generate`, `plan`, `export` and `shards precompute`."""

from datetime import datetime
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster import storage
from cluster.errors import UserError
from cluster.names import check_path_part
from cluster.progress import TimeLeft, progress_lines
from cluster.terminal import ask, command_line, console, plain, say_starting
from trainers.drawing_settings import (
    BATCH_SIZE,
    GUIDANCE_SCALE,
    NUM_IMAGES,
    NUM_INFERENCE_STEPS,
    SEED,
    TRUE_CFG_SCALE,
    check_prompt,
    check_settings,
)
from trainers.evaluation_options import check_model

if TYPE_CHECKING:
    from data_shards.overview import Reader
    from trainers.recipe import FluxRecipe

# What takes long to import, the commands import themselves, after all that they can refuse without it.


class Weights(StrEnum):
    """Which weights of a checkpoint."""

    EMA = "ema"
    LAST = "weights"


def train(
    recipe: Annotated[str, typer.Argument(help="Recipe: a YAML file or s3:// URI.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Change a key: a.b=value. May be given several times.")
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="Name of the run; a run of this name that was stopped goes on.")
    ] = None,
) -> None:
    """Train a model from a recipe, record it in MLflow and register it.

    medsynth train recipes/msdm-demo.yaml --set denoiser.training.learning_rate=3e-4 --set cluster.num_workers=2
    """
    from trainers.families import check_shards
    from trainers.recipe import load_recipe

    ask(recipe)
    loaded = load_recipe(recipe, overrides or [])
    name = run or f"{loaded.name}-{datetime.now():%Y%m%d-%H%M%S}"
    check_path_part(name, "--run")
    ask(loaded.data.shards)
    check_shards(loaded)
    changes = [word for change in overrides or [] for word in ("--set", change)]
    command = command_line(["medsynth", "train", recipe, *changes, "--run", name])
    workers = " to ".join(str(number) for number in dict.fromkeys(loaded.cluster.worker_range))
    console.print(f"Run [bold]{plain(name)}[/] with {workers} workers; to resume it: {plain(command)}", soft_wrap=True)
    say_starting("PyTorch, Ray and MLflow")
    from trainers.launch import emulated_precision, train_recipe
    from trainers.watch import summarize, watching, work_of

    if notice := emulated_precision(loaded):
        console.print(f"[yellow]{plain(notice)}[/]", soft_wrap=True)
    with watching(console, command, TimeLeft(work_of(loaded))) as watch:
        trained = train_recipe(
            loaded,
            name,
            on_progress=watch.show,
            on_stop_requested=watch.say_stopping,
            on_starting=watch.say_starting,
        )
    summarize(console, trained, loaded.sampling.prompts[-1])


def generate(
    model: Annotated[str, typer.Option(help="models:/NAME/VERSION, models:/NAME@ALIAS, runs:/ID/model, or a folder.")],
    prompt: Annotated[str, typer.Option(help="What the pictures should show.")],
    out: Annotated[Path, typer.Option(help="Folder for the PNG files.")] = Path("samples"),
    negative_prompt: Annotated[str, typer.Option(help="What they should not show.")] = "",
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            min=GUIDANCE_SCALE.low,
            max=GUIDANCE_SCALE.high,
            help="MSDM: weight of the prompt, 1 is none. FLUX: the guidance it is told.",
        ),
    ] = None,
    true_cfg_scale: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            min=TRUE_CFG_SCALE.low,
            max=TRUE_CFG_SCALE.high,
            help="FLUX: weight of the prompt against the negative one; 1 is none.",
        ),
    ] = None,
    num_inference_steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=NUM_INFERENCE_STEPS.low,
            help="Sampling steps, at most those that it was trained with. Default: the model's own.",
        ),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(help="MSDM: ddpm, ddim or dpm-solver++. FLUX: euler. Default: the model's own."),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="MSDM: fp32, or bf16, which is faster on GPUs and processors that have it. Default: fp32."),
    ] = None,
    num_images: Annotated[int, typer.Option(metavar="N", min=NUM_IMAGES.low)] = 1,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=BATCH_SIZE.low, max=BATCH_SIZE.high, help="Pictures drawn at a time.")
    ] = 8,
    seed: Annotated[int, typer.Option(metavar="N", min=SEED.low, help="The same seed draws the same pictures.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
    compile: Annotated[
        bool,
        typer.Option("--compile", help="Compile the denoiser first, a minute or more: for thousands of pictures."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace pictures that medsynth drew into --out for another command.")
    ] = False,
) -> None:
    """Draw pictures from a trained model.

    medsynth generate --model models:/msdm-demo/1 --prompt "Generate an image with a large polyp." --out pictures
    """
    asked = {
        "negative_prompt": negative_prompt or None,
        "guidance_scale": guidance_scale,
        "true_cfg_scale": true_cfg_scale,
        "num_inference_steps": num_inference_steps,
        "sampler": sampler,
        "precision": precision,
    }
    settings = check_settings({name: value for name, value in asked.items() if value is not None})
    check_prompt(prompt)
    check_model(model)
    try:
        storage.check_writable(str(out))
    except storage.StorageError as error:
        raise UserError(f"{error}; choose another --out") from None
    say_starting("PyTorch and the model")
    from trainers.generate import generate as draw

    with progress_lines(console) as on_progress:
        paths = draw(
            model,
            prompt,
            out,
            num_images=num_images,
            batch_size=batch_size,
            seed=seed,
            settings=settings,
            device=device,
            compile=compile,
            overwrite=overwrite,
            on_progress=on_progress,
        )
    console.print(f"{len(paths)} pictures in {plain(out)}: {paths[0].name} to {paths[-1].name}", soft_wrap=True)


def precompute(
    recipe: Annotated[str, typer.Argument(help="FLUX recipe: a YAML file or s3:// URI.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Change a key: a.b=value.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images and captions encoded at a time.")] = 8,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
) -> None:
    """Encode a recipe's images and captions once, so that training needs no encoder; with RAY_ADDRESS, on its GPUs.

    For FLUX; MSDM's own autoencoder is trained first, so `medsynth train` does it between the two stages.

    medsynth shards precompute recipes/flux-full-8gpu.yaml --set data.shards=my-shards
    """
    loaded = _flux_recipe(
        recipe, overrides, "shards precompute", instead=", which medsynth train precomputes for between its two stages"
    )
    from data_shards.manifest import Manifest

    ask(loaded.data.shards)
    Manifest.load(loaded.data.shards)
    say_starting("PyTorch")
    from data_shards.precompute import precompute as encode
    from trainers.flux.encoders import FluxEncoders

    speed = "; all of it was there"

    def note_speed(images: int, seconds: float) -> None:
        nonlocal speed
        speed = f", encoded in {seconds / images * 1000:.3g} s per 1,000" if images else ""

    with progress_lines(console) as on_progress:
        manifest = encode(
            loaded.data.shards,
            loaded.data.precomputed,
            encoders=FluxEncoders.of(loaded),
            resolution=loaded.data.resolution,
            horizontal_flip=loaded.data.horizontal_flip,
            extra_prompts=loaded.sampling.prompts,
            batch_size=batch_size,
            device=device,
            on_progress=on_progress,
            on_encoded=note_speed,
        )
    total = sum(shard.num_samples for shard in manifest.shards)
    megabytes = sum(shard.num_bytes for shard in manifest.shards) / 1e6
    console.print(
        f"{total} samples at {plain(loaded.data.precomputed)}, digest {manifest.digest[:12]}: "
        f"{megabytes / total * 1000:.3g} MB per 1,000 images, prompts aside{speed}",
        soft_wrap=True,
    )


def reader_of_recipe(uri: str) -> "Reader":
    """How a recipe's model reads samples, for `medsynth shards inspect --recipe`."""
    from data_shards.overview import Reader
    from trainers.recipe import FluxRecipe, load_recipe

    loaded = load_recipe(uri)
    if isinstance(loaded, FluxRecipe):
        from trainers.flux.encoders import FluxEncoders

        return Reader(loaded.data.resolution, loaded.max_tokens, FluxEncoders.of(loaded).num_tokens)
    from trainers.msdm.text_encoder import load_tokenizer
    from trainers.tokens import num_tokens

    tokenizer = load_tokenizer(loaded.text_encoder)
    return Reader(loaded.data.resolution, loaded.text_encoder.max_tokens, partial(num_tokens, tokenizer))


def plan(
    recipe: Annotated[str, typer.Argument(help="FLUX recipe: a YAML file or s3:// URI.")],
    gpus: Annotated[int, typer.Option(min=1, help="How many.")] = 8,
    gpu: Annotated[str, typer.Option(help="Which; --gpu help lists them.")] = "h200",
    price: Annotated[float | None, typer.Option(min=0, help="Of one GPU for an hour, for the cost of the run.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Change a key: a.b=value.")] = None,
) -> None:
    """Say what a FLUX run will take in memory, time and money, before any GPU is taken.

    medsynth plan recipes/flux-full-8gpu.yaml --gpus 8 --gpu h200 --price 4
    """
    from trainers.hardware import gpu_named

    loaded = _flux_recipe(recipe, overrides, "plan", instead=", which any GPU made for training holds: train it")
    kind = gpu_named(gpu)
    say_starting("PyTorch")
    from trainers.plan import plan_flux, render

    render(plan_flux(loaded, num_gpus=gpus, gpu=kind, price_per_gpu_hour=price), console)


def export(
    run: Annotated[str, typer.Argument(help="Folder or s3:// prefix of the run, such as runs/NAME.")],
    out: Annotated[Path, typer.Option(help="Folder for the model.")],
    step: Annotated[int | None, typer.Option(help="Of the checkpoint. Default: the latest.")] = None,
    weights: Annotated[Weights, typer.Option(help="ema: the moving average. weights: the last.")] = Weights.EMA,
) -> None:
    """Write a FLUX checkpoint as a model that FluxPipeline opens, without ever holding all of it in memory.

    medsynth export runs/flux-1 --step 2000 --out flux-2000
    """
    ask(run)
    from trainers.export import export_checkpoint

    found = export_checkpoint(run, out, step=step, weights=weights.value)
    draw = command_line(["medsynth", "generate", "--model", out])
    console.print(f"Checkpoint of step {found} as {plain(out)}; draw: {plain(draw)} --prompt ...", soft_wrap=True)


def _flux_recipe(uri: str, overrides: list[str] | None, command: str, instead: str = "") -> "FluxRecipe":
    from trainers.recipe import FluxRecipe, load_recipe

    ask(uri)
    loaded = load_recipe(uri, overrides or [])
    if not isinstance(loaded, FluxRecipe):
        raise UserError(f"medsynth {command} is for FLUX; {uri} is of family {loaded.family}{instead}")
    return loaded
