"""The whole way of a FLUX run on one rank, step by step and timed, with stand-ins for what needs a download.

Shards, precomputed set, training, two saves on end, resume, export, a picture: each by the function that `medsynth`
calls for it. A part of benchmarks/gpu_evidence.py.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from benchmarks.circumstances import ROOT
from data_shards import Settings, write_shards
from data_shards.precompute import precompute
from data_shards.sources import medvqa_records
from trainers import loop
from trainers.engines import Engine, Saving
from trainers.families import flux
from trainers.flux.architecture import FLUX_1_DEV
from trainers.flux.export import write_safetensors
from trainers.flux.footprint import build_on_meta
from trainers.recipe import FluxRecipe, load_recipe
from trainers.run_folder import RunFolder
from trainers.worker import train_rank

IMAGES = 24
PROMPT = "Generate an image with a large polyp."
STAGE = "transformer"
FILE_BYTES = 4_500_000_000
TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
LEFT_OUT = (*TEXT_PARTS, "image_encoder", "feature_extractor")
Result = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class StandInEncoders:
    """Random moments and embeddings of the true shapes, the same for the same image or prompt."""

    latent_channels: int
    max_tokens: int
    text_width: int
    pooled_width: int
    components: ClassVar[Mapping[str, str]] = {"vae": "the VAE", "text_encoder": "the text encoder"}
    origin: ClassVar[dict[str, str]] = {"pretrained": "random"}

    def digest(self, component: str) -> str:
        return hashlib.sha256(repr((component, self)).encode()).hexdigest()

    def num_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    def text_dtype(self, device: str) -> str:
        return "bfloat16"

    def image_encoder(self, device: str) -> Callable[[Tensor], Tensor]:
        def encode(images: Tensor) -> Tensor:
            side = images.shape[-1] // 8
            seeds = [int(image.double().abs().sum() * 1000) for image in images]
            return torch.stack([self._draw(seed, 2 * self.latent_channels, side, side) for seed in seeds]) * 0.5

        return encode

    def prompt_encoder(self, device: str) -> Callable[[Sequence[str]], Mapping[str, Tensor]]:
        def encode(prompts: Sequence[str]) -> dict[str, Tensor]:
            seeds = [int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16) for prompt in prompts]
            tokens = [self._draw(seed, self.max_tokens, self.text_width) for seed in seeds]
            pooled = [self._draw(seed, self.pooled_width) for seed in seeds]
            return {
                "prompt_embeds": torch.stack(tokens).bfloat16(),
                "pooled_prompt_embeds": torch.stack(pooled).bfloat16(),
            }

        return encode

    def _draw(self, seed: int, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameters_of(config: Mapping[str, Any]) -> int:
    return sum(parameter.numel() for parameter in build_on_meta(config, None, torch.bfloat16).parameters())


def free_disk(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def stages(
    folder: Path,
    config: Mapping[str, Any],
    device: torch.device,
    *,
    is_tiny: bool,
    steps: int,
    save_every: int,
    keep: Callable[[dict[str, Any]], None],
) -> Iterator[Result]:
    """What each stage found, with its `seconds`, as soon as it is done; `keep` is told what a training found so far."""
    began = time.perf_counter()

    def done(name: str, **found: Any) -> Result:
        nonlocal began
        seconds, began = time.perf_counter() - began, time.perf_counter()
        return name, {"seconds": seconds, **found}

    write_pretrained(folder / "pretrained", config, device)
    yield done("pretrained")
    recipe = recipe_of(folder, is_tiny=is_tiny, device=device, steps=steps, save_every=save_every)
    records = islice(medvqa_records(str(ROOT / "tests/data/colonoscopy")), IMAGES)
    write_shards(records, recipe.data.shards, Settings("frames", {"train": 0.7, "validation": 0.3}), source={})
    yield done("shards")
    prepare(recipe, config)
    yield done("precompute")

    run = RunFolder.of(recipe, "evidence")
    first = in_a_process(recipe, run, device, folder / "train.json", keep)
    yield done("train", **{name: first[name] for name in ("losses", "saves", "staged_bytes")})

    further = type(recipe).model_validate(recipe.model_dump() | {"transformer": with_steps(recipe, steps + 1)})
    second = in_a_process(further, run, device, folder / "resume.json", keep, resume_from=first["checkpoint"])
    yield done("resume", resumed_losses=second["losses"])

    checkpoint = Path(second["checkpoint"])
    flux.export(recipe, STAGE, run, checkpoint, folder / "model")
    shutil.rmtree(checkpoint)
    yield done("export", model_bytes=sum(path.stat().st_size for path in (folder / "model").rglob("*.safetensors")))
    yield done("draw", picture_is_finite=draw(folder / "model", recipe, config, device))


def in_a_process(
    recipe: FluxRecipe,
    run: RunFolder,
    device: torch.device,
    result: Path,
    keep: Callable[[dict[str, Any]], None],
    resume_from: str | None = None,
) -> dict[str, Any]:
    """Train in a process of its own, as `medsynth train` does: DeepSpeed keeps its memory until the process ends."""
    process = multiprocessing.get_context("spawn").Process(
        target=train, args=(recipe, run, device, result, resume_from)
    )
    process.start()
    while process.is_alive():
        process.join(1)
        if result.exists():
            keep(json.loads(result.read_text()))
    if process.exitcode:
        raise RuntimeError(f"the training's process ended with {process.exitcode}")
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def train(recipe: FluxRecipe, run: RunFolder, device: torch.device, result: Path, resume_from: str | None) -> None:
    """Train a stage on one rank, and write what was found to `result` after each report and each save."""
    watched = Watched(result, Path(resume_from) if resume_from else None)
    original, loop.save = loop.save, watched.save
    try:
        train_rank(recipe, STAGE, run, device=device, report=watched.report, resume_from=watched.newest)
        watched.finish()
    finally:
        loop.save = original


class Watched:
    """What a rank reported, and how long its saves held it up. The disk holds one checkpoint at a time."""

    def __init__(self, result: Path, newest: Path | None) -> None:
        self.newest = newest
        self._result = result
        self._save = loop.save
        self._written: Future[None] | None = None
        self._found: dict[str, Any] = {"losses": {}, "saves": [], "staged_bytes": 0}

    def report(self, step: int, metrics: dict[str, float], pixels: Tensor | None, saving: Saving | None) -> None:
        if "loss" in metrics:
            self._found["losses"][str(step)] = metrics["loss"]
        self._keep()

    def save(self, engine: Engine, step: int) -> Saving | None:
        """In place of the loop's own."""
        began, waited = time.perf_counter(), 0.0
        if self._written is not None:  # the writer would wait for it as well, but would not say for how long
            self._written.result()
            waited = time.perf_counter() - began
        if self.newest is not None:
            shutil.rmtree(self.newest)
        saving = self._save(engine, step)
        assert saving is not None
        self.newest, self._written = saving
        writer = engine._writer  # type: ignore[attr-defined]
        self._found["staged_bytes"] = writer.staged_bytes
        self._found["saves"].append(
            {
                "step": step,
                "seconds_waiting_for_the_save_before": waited,
                "seconds_of_stall": time.perf_counter() - began - waited,
                "was_written_beside": not saving.written.done(),
                "is_pinned": writer.staging_is_pinned,
            }
        )
        self._keep()
        return saving

    def finish(self) -> None:
        assert self._written is not None
        self._written.result()
        self._found["checkpoint"] = str(self.newest)
        self._keep()

    def _keep(self) -> None:
        part = self._result.with_suffix(".part")
        part.write_text(json.dumps(self._found))
        part.replace(self._result)


def write_pretrained(folder: Path, config: Mapping[str, Any], device: torch.device) -> None:
    """A FLUX model in the diffusers layout, its text encoders left out: what is trained needs only their outputs."""
    torch.manual_seed(0)
    with device:
        transformer = FluxTransformer2DModel.from_config(dict(config)).bfloat16()
    state = ((name, value.cpu()) for name, value in transformer.state_dict().items())
    write_safetensors(state, folder / "transformer", max_file_bytes=FILE_BYTES)
    whole = dict(FLUX_1_DEV) | dict(config)
    (folder / "transformer" / "config.json").write_text(json.dumps(whole))
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=config["in_channels"] // 4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    vae.save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(folder / "scheduler")
    parts: dict[str, Any] = {name: [None, None] for name in LEFT_OUT}
    parts |= {name: ["diffusers", type(part).__name__] for name, part in (("vae", vae), ("transformer", transformer))}
    parts |= {"_class_name": "FluxPipeline", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(parts))


def recipe_of(folder: Path, *, is_tiny: bool, device: torch.device, steps: int, save_every: int) -> FluxRecipe:
    """recipes/flux-full-1xh200.yaml, cut short."""
    changes = [
        f"pretrained={folder / 'pretrained'}",
        f"data.shards={folder / 'shards'}",
        f"data.precomputed={folder / 'precomputed'}",
        f"transformer.training.steps={steps}",
        f"transformer.training.checkpoint_every_steps={save_every}",
        "transformer.training.log_every_steps=1",
        "transformer.training.warmup_steps=0",
        f"transformer.training.validate_every_steps={steps}",
        f"transformer.training.preview_every_steps={steps}",
        "transformer.training.validation_samples=4",
        "sampling.num_inference_steps=2",
        f"sampling.prompts=[{PROMPT}]",
        f"cluster.storage={folder / 'runs'}",
    ]
    if is_tiny:
        changes += ["data.resolution=32", "max_tokens=8"]
        changes += ["transformer.training.global_batch_size=4", "transformer.training.micro_batch_size=2"]
    recipe = load_recipe(str(ROOT / "recipes/flux-full-1xh200.yaml"), changes)
    assert isinstance(recipe, FluxRecipe)
    return recipe


def prepare(recipe: FluxRecipe, config: Mapping[str, Any]) -> None:
    os.environ.pop("RAY_ADDRESS", None)
    precompute(
        recipe.data.shards,
        recipe.data.precomputed,
        encoders=StandInEncoders(
            config["in_channels"] // 4,
            recipe.max_tokens,
            config["joint_attention_dim"],
            config["pooled_projection_dim"],
        ),
        resolution=recipe.data.resolution,
        horizontal_flip=recipe.data.horizontal_flip,
        extra_prompts=recipe.sampling.prompts,
    )


def with_steps(recipe: FluxRecipe, steps: int) -> dict[str, Any]:
    settings = recipe.transformer.model_dump()
    settings["training"]["steps"] = steps
    return settings


def draw(model: Path, recipe: FluxRecipe, config: Mapping[str, Any], device: torch.device) -> bool:
    """Whether unmodified diffusers opens the exported model and draws from it."""
    without = dict.fromkeys(LEFT_OUT)
    pipeline = FluxPipeline.from_pretrained(model, dtype=torch.bfloat16, **without).to(device)
    pipeline.set_progress_bar_config(disable=True)
    with device:
        drawn = pipeline(
            prompt_embeds=torch.randn(1, recipe.max_tokens, config["joint_attention_dim"]).bfloat16(),
            pooled_prompt_embeds=torch.randn(1, config["pooled_projection_dim"]).bfloat16(),
            height=recipe.data.resolution,
            width=recipe.data.resolution,
            num_inference_steps=2,
            output_type="pt",
        )
    return bool(torch.isfinite(drawn.images).all())
