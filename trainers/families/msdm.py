"""MSDM: the autoencoder, then the denoiser in its latents; both fit one device, so both are trained by DDP.

Models are imported where they are built: whoever launches a training imports this module and builds none.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import storage
from cluster.errors import UserError
from cluster.nodes import Node
from cluster.progress import OnProgress
from data_shards import Manifest
from trainers.families import check_splits, stream_from
from trainers.recipe import MSDMRecipe, Training
from trainers.run_folder import RunFolder, finished_model

if TYPE_CHECKING:
    import torch

    from data_shards import ShardStream
    from trainers.engines import Engine
    from trainers.stage import Stage

STAGES = ("vae", "denoiser")
NUM_VAE_EXAMPLES = 8
LATENT_STATISTICS_SAMPLES = 256
PREVIEW_PROMPTS_BYTES = 2**26


def training_of(recipe: MSDMRecipe, stage: str) -> Training:
    return recipe.vae.training if stage == "vae" else recipe.denoiser.training


def check(recipe: MSDMRecipe) -> Manifest:
    from trainers.msdm.text_encoder import check_text_encoder

    manifest = Manifest.load(recipe.data.shards)
    check_splits(recipe.data.shards, manifest)
    check_text_encoder(recipe.text_encoder)
    _check_autoencoder(recipe)
    return manifest


def _check_autoencoder(recipe: MSDMRecipe) -> None:
    """Raises UserError unless the autoencoder that is to be taken from another run is there, and of the same kind."""
    if recipe.vae.pretrained is None:
        return
    other = RunFolder(recipe.vae.pretrained)
    if not other.has_model("vae"):
        raise UserError(f"vae.pretrained: {other.uri} is no run with a finished autoencoder: name a run's folder")
    theirs = other.began_with()
    if not isinstance(theirs, MSDMRecipe) or theirs.vae.architecture != recipe.vae.architecture:
        raise UserError(f"vae.pretrained: the autoencoder of {other.uri} is not of this recipe's vae.architecture")
    if theirs.data.resolution != recipe.data.resolution:
        raise UserError(
            f"vae.pretrained: the autoencoder of {other.uri} is of resolution {theirs.data.resolution}, "
            f"this recipe's data.resolution is {recipe.data.resolution}"
        )


def check_fits(recipe: MSDMRecipe, nodes: Sequence[Node]) -> None:
    """Nothing is refused: what MSDM takes, any GPU made for training has."""


def prepare(recipe: MSDMRecipe, stage: str, run: RunFolder, on_progress: OnProgress) -> None:
    """For the denoiser: the latents' moments of all images and the embeddings of all prompts, by frozen encoders.

    For the autoencoder itself: nothing, unless it is another run's.
    """
    if stage == "vae":
        if recipe.vae.pretrained is not None:
            run.take_model(stage, RunFolder(recipe.vae.pretrained))
        return
    from data_shards.precompute import check_precomputed, precompute
    from trainers.msdm.encoders import MSDMEncoders

    encoders, data, prompts = MSDMEncoders.of(recipe, run), recipe.data, recipe.sampling.prompts
    if run.borrows_precomputed:
        try:
            check_precomputed(
                run.precomputed,
                shards=data.shards,
                encoders=encoders,
                resolution=data.resolution,
                horizontal_flip=data.horizontal_flip,
                prompts=prompts,
            )
        except UserError as error:
            if storage.is_outage(error):
                raise
            run.use_own_precomputed()  # this run draws other prompts than the one it would borrow from
        else:
            return
    precompute(
        data.shards,
        run.precomputed,
        encoders=encoders,
        resolution=data.resolution,
        horizontal_flip=data.horizontal_flip,
        extra_prompts=prompts,
        device="cuda" if recipe.cluster.use_gpu else "cpu",
        most_workers=recipe.cluster.max_workers,
        on_progress=on_progress,
    )


def open_stream(
    recipe: MSDMRecipe, stage: str, run: RunFolder, split: str, *, rank: int = 0, world_size: int = 1
) -> "ShardStream":
    training = training_of(recipe, stage)
    shards = recipe.data.shards if stage == "vae" else run.precomputed
    return stream_from(shards, recipe, training, split, rank=rank, world_size=world_size)


def build(recipe: MSDMRecipe, stage: str, run: RunFolder, device: "torch.device") -> "tuple[Stage, Engine]":
    from trainers.engines.ddp import DDPEngine

    built = _stage(recipe, stage, run, device)
    return built, DDPEngine(built.model, training_of(recipe, stage), device)


def export(recipe: MSDMRecipe, stage: str, run: RunFolder, checkpoint: Path, out: Path) -> None:
    from trainers.msdm.export import export_pipeline, export_vae

    if stage == "vae":
        steps = -(-LATENT_STATISTICS_SAMPLES // recipe.vae.training.global_batch_size)
        batches = islice(open_stream(recipe, stage, run, "train").batches(), steps)
        export_vae(recipe, checkpoint, [micro_batch for step in batches for micro_batch in step], out)
    else:
        with finished_model(run.model("vae")) as vae:
            export_pipeline(recipe, vae, checkpoint, out)


def _stage(recipe: MSDMRecipe, stage: str, run: RunFolder, device: "torch.device") -> "Stage":
    import torch
    from diffusers import AutoencoderKL

    from data_shards import PromptStore
    from trainers.msdm.stages import denoiser_stage, vae_stage

    if stage == "vae":
        examples = islice(open_stream(recipe, stage, run, "validation").one_pass(NUM_VAE_EXAMPLES), 1)
        return vae_stage(recipe, torch.cat([batch.images for batch in examples]), device)
    with finished_model(run.model("vae")) as folder:
        vae = AutoencoderKL.from_pretrained(folder)
    return denoiser_stage(recipe, vae, PromptStore(run.precomputed, PREVIEW_PROMPTS_BYTES), device)
