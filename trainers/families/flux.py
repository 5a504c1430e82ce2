"""FLUX: one stage, its transformer, cut over the ranks by ZeRO-3 or, with adapters, replicated by DDP.

Models and engines are imported where they are built: whoever launches a training imports this module and builds none.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cluster.errors import UserError
from cluster.nodes import Node
from cluster.progress import OnProgress
from data_shards import Manifest, PromptStore, ShardStream, check_precomputed
from trainers.engines import Engine
from trainers.families import check_splits, stream_from
from trainers.flux.encoders import FluxEncoders
from trainers.flux.load import load_decoding_parts, transformer_config, transformer_weights
from trainers.recipe import FluxRecipe, Training
from trainers.run_folder import RunFolder
from trainers.stage import Stage

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

STAGES = ("transformer",)
PREVIEW_PROMPTS_BYTES = 2**27


def training_of(recipe: FluxRecipe, stage: str) -> Training:
    return recipe.transformer.training


def check(recipe: FluxRecipe) -> Manifest:
    is_guided = bool(transformer_config(recipe.pretrained)["guidance_embeds"])
    if is_guided != (recipe.transformer.guidance_embedding is not None):
        wanted = "a number such as 1.0" if is_guided else "null"
        raise UserError(
            f"transformer.guidance_embedding: '{recipe.pretrained}' "
            f"{'is' if is_guided else 'is not'} told a guidance, so give {wanted}"
        )
    settings = recipe.transformer
    if settings.engine == "zero3":
        from trainers.engines.deepspeed_config import deepspeed_config

        deepspeed_config(
            settings.training,
            recipe.cluster.max_workers,
            optimizer_states=settings.optimizer_states,
            keys=settings.deepspeed,
        )
    manifest = Manifest.load(recipe.data.shards)
    precomputed = check_precomputed(
        recipe.data.precomputed,
        shards=recipe.data.shards,
        encoders=FluxEncoders.of(recipe),
        resolution=recipe.data.resolution,
        horizontal_flip=recipe.data.horizontal_flip,
        prompts=recipe.sampling.prompts,
    )
    check_splits(recipe.data.precomputed, precomputed)
    return manifest


def check_fits(recipe: FluxRecipe, nodes: Sequence[Node]) -> None:
    from trainers import plan

    plan.check_fits(recipe, nodes)


def prepare(recipe: FluxRecipe, stage: str, run: RunFolder, on_progress: OnProgress) -> None:
    """Nothing: `check` has found it prepared, by `medsynth shards precompute`."""


def open_stream(
    recipe: FluxRecipe, stage: str, run: RunFolder, split: str, *, rank: int = 0, world_size: int = 1
) -> ShardStream:
    training = recipe.transformer.training
    return stream_from(recipe.data.precomputed, recipe, training, split, rank=rank, world_size=world_size)


def build(recipe: FluxRecipe, stage: str, run: RunFolder, device: torch.device) -> tuple[Stage, Engine]:
    from trainers.flux.checkpointing import set_activation_checkpointing
    from trainers.flux.stages import transformer_stage

    transformer = _transformer(recipe, device)
    set_activation_checkpointing(transformer, recipe.transformer.activation_checkpointing)
    vae, scheduler = load_decoding_parts(recipe.pretrained)
    prompts = PromptStore(recipe.data.precomputed, max_bytes=PREVIEW_PROMPTS_BYTES)
    # FluxPipeline hands the decoder latents in the transformer's precision.
    built = transformer_stage(recipe, transformer, vae.to(device, _precision(recipe)), scheduler, prompts, device)
    return built, _engine(recipe, transformer, device)


def export(recipe: FluxRecipe, stage: str, run: RunFolder, checkpoint: Path, out: Path) -> None:
    from trainers.flux.export import export_adapters, export_pipeline

    write = export_pipeline if recipe.transformer.lora is None else export_adapters
    write(recipe, checkpoint, out)


def _precision(recipe: FluxRecipe) -> torch.dtype:
    return torch.bfloat16 if recipe.transformer.training.precision == "bf16" else torch.float32


def _transformer(recipe: FluxRecipe, device: torch.device) -> "FluxTransformer2DModel":
    """The pretrained transformer; under ZeRO-3 this rank's part of each weight."""
    from diffusers import FluxTransformer2DModel

    from trainers.engines.partitioned import load_partitioned
    from trainers.flux.export import lora_config

    config, weights = transformer_config(recipe.pretrained), transformer_weights(recipe.pretrained)
    settings = recipe.transformer
    if settings.engine == "zero3":
        from trainers.engines.zero3 import zero3_partitioned

        with zero3_partitioned(
            settings.training, optimizer_states=settings.optimizer_states, deepspeed_keys=settings.deepspeed
        ):
            transformer = FluxTransformer2DModel.from_config(config)
        load_partitioned(transformer, weights)
        return transformer
    # On the device and in its precision from the start: the host would need 48 GB for each rank.
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(config)
    transformer = transformer.to(_precision(recipe)).to_empty(device=device)
    load_partitioned(transformer, weights)
    if settings.lora is not None:
        transformer.requires_grad_(False)
        torch.manual_seed(recipe.seed)  # adapters begin the same on each rank
        transformer.add_adapter(lora_config(settings.lora))
        # peft gives adapters their base's precision, but bf16 would round small updates of trained weights away.
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return transformer


def _engine(recipe: FluxRecipe, transformer: "FluxTransformer2DModel", device: torch.device) -> Engine:
    settings = recipe.transformer
    if settings.engine == "ddp":
        from trainers.engines.ddp import DDPEngine

        return DDPEngine(transformer, settings.training, device)
    from trainers.engines.zero3 import Zero3Engine

    return Zero3Engine(
        transformer,
        settings.training,
        device,
        optimizer_states=settings.optimizer_states,
        deepspeed_keys=settings.deepspeed,
    )
