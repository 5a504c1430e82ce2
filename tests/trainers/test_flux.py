"""FLUX end to end on real images: learn four by heart, get them back through the unmodified FluxPipeline."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import FluxPipeline
from torch import Tensor

from cluster.errors import UserError
from data_shards import Settings, derive_seed, write_shards
from data_shards.precompute import precompute
from data_shards.sources import Columns
from data_shards.sources.table import records_of
from tests.conftest import DATA
from tests.trainers.test_loop import CPU, Reports
from trainers.families import flux
from trainers.flux.encoders import FluxEncoders
from trainers.flux.export import export_adapters, write_safetensors
from trainers.generate import load_model
from trainers.pictures import to_pixels
from trainers.recipe import FluxRecipe, dump_recipe
from trainers.run_folder import RunFolder
from trainers.worker import train_rank

CAPTIONS = ("first", "second", "third", "fourth")
NUM_STEPS = 700
MIN_PSNR = 25.0  # dB; 31 to 33 were seen


@pytest.fixture
def four_images(flux_folder: Path, flux_document: dict[str, Any], tmp_path: Path) -> FluxRecipe:
    """A recipe for four real frames, each with a caption of its own, trained by plain DDP on one rank."""
    images = DATA / "colonoscopy" / "images"
    names = sorted(path.name for path in images.glob("*.jpg"))[:4]
    rows = [
        {"image": name, "caption": caption, "split": "train"} for name, caption in zip(names, CAPTIONS, strict=True)
    ]
    rows.append(
        {"image": sorted(path.name for path in images.glob("*.jpg"))[9], "caption": "other", "split": "validation"}
    )
    shards, cache = str(tmp_path / "four"), str(tmp_path / "four-precomputed")
    records = records_of(rows, str(images), Columns(split="split"))
    write_shards(records, shards, Settings(name="four", splits={}, samples_per_shard=2), source={})
    training = flux_document["transformer"]["training"]
    training |= {"steps": NUM_STEPS, "micro_batch_size": 4, "learning_rate": 2e-3, "learning_rate_schedule": "cosine"}
    training |= {"warmup_steps": 20, "ema_decay": 0.99} | {
        f"{what}_every_steps": NUM_STEPS for what in ("log", "validate", "preview", "checkpoint")
    }
    flux_document["transformer"] |= {"engine": "ddp", "caption_dropout": 0.0}
    flux_document["transformer"]["noise"] = {"resolution_shift": None}
    flux_document["data"] = {"shards": shards, "precomputed": cache, "resolution": 64}
    flux_document["sampling"] = {"num_inference_steps": 20, "guidance_scale": 1.0, "prompts": CAPTIONS}
    recipe = FluxRecipe.model_validate(flux_document)
    precompute(
        shards,
        cache,
        encoders=FluxEncoders.of(recipe),
        resolution=64,
        horizontal_flip=False,
        extra_prompts=CAPTIONS,
    )
    return recipe


def psnr(one: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1]."""
    return -10 * float(torch.log10((one - other).square().mean()))


def test_four_images_learned_by_heart_come_back(four_images: FluxRecipe, tmp_path: Path) -> None:
    """The objective, end to end: scaling, packing, target, timestep and guidance must all be FluxPipeline's own."""
    recipe, run, reports = four_images, RunFolder(str(tmp_path / "run")), Reports()
    train_rank(recipe, "transformer", run, device=CPU, report=reports, resume_from=None)
    flux.export(recipe, "transformer", run, reports.checkpoints[NUM_STEPS], tmp_path / "model")

    pipeline = FluxPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        list(CAPTIONS),
        height=64,
        width=64,
        num_inference_steps=20,
        guidance_scale=1.0,
        max_sequence_length=recipe.max_tokens,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    (batch,) = flux.open_stream(recipe, "transformer", run, "train").one_pass(4)
    vae = pipeline.vae
    with torch.no_grad():
        decoded = (vae.decode(batch.moments.chunk(2, dim=1)[0]).sample / 2 + 0.5).clamp(0, 1)
    originals = dict(zip(batch.captions, decoded, strict=True))
    found = [psnr(picture, originals[caption]) for picture, caption in zip(drawn, CAPTIONS, strict=True)]
    to_others = [
        psnr(picture, original)
        for picture, caption in zip(drawn, CAPTIONS, strict=True)
        for other, original in originals.items()
        if other != caption
    ]
    assert min(found) > MIN_PSNR, f"{found}"
    assert min(found) > max(to_others) + 3
    np.testing.assert_allclose(reports.pixels[NUM_STEPS].shape, (4, 64, 64, 3))


def test_true_guidance_and_embedded_guidance_both_change_the_picture(flux_folder: Path) -> None:
    model = load_model(str(flux_folder), device="cpu")

    def draw(**settings: Any) -> Tensor:
        arguments = {
            **{name: value for name, value in model.drawing.defaults.items() if name != "sampler"},
            "height": 32,
            "width": 32,
            "num_inference_steps": 2,
            "max_sequence_length": 16,
        }
        images: Tensor = model.pipeline(
            "a polyp", **arguments | settings, generator=torch.Generator().manual_seed(0), output_type="pt"
        ).images
        return images

    plain = draw()
    assert torch.equal(plain, draw())
    assert not torch.equal(plain, draw(guidance_scale=7.0))
    assert not torch.equal(plain, draw(true_cfg_scale=4.0))
    assert not torch.equal(draw(true_cfg_scale=4.0), draw(true_cfg_scale=4.0, negative_prompt="a normal colon"))


def test_it_has_one_sampler(flux_folder: Path) -> None:
    model = load_model(str(flux_folder), device="cpu")
    settings = {"num_inference_steps": 1, "height": 32, "width": 32, "max_sequence_length": 16}
    pictures = [
        model.draw(["a polyp"], [0], seed=0, settings=settings | chosen)[0].tobytes()
        for chosen in ({}, {"sampler": "euler"})
    ]
    assert pictures[0] == pictures[1]
    with pytest.raises(UserError, match="has no sampler 'ddim': choose one of euler"):
        model.drawing.arguments({"sampler": "ddim"})
    with pytest.raises(UserError, match="is not drawn with precision: it knows negative_prompt, guidance_scale"):
        model.drawing.arguments({"precision": "bf16"})  # the weights' own, which the device decides


def test_a_wrong_guidance_embedding_is_told_before_training(flux_recipe: FluxRecipe) -> None:
    transformer = flux_recipe.transformer.model_copy(update={"guidance_embedding": None})
    with pytest.raises(UserError, match="is told a guidance, so give a number"):
        flux.check(flux_recipe.model_copy(update={"transformer": transformer}))


def test_files_of_a_model_stay_below_the_limit_and_diffusers_reads_them(flux_folder: Path, tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    original = FluxTransformer2DModel.from_pretrained(flux_folder, subfolder="transformer")
    weights = original.state_dict()
    limit = 500_000
    write_safetensors(iter(weights.items()), tmp_path / "transformer", max_file_bytes=limit)
    files = sorted((tmp_path / "transformer").glob("*.safetensors"))
    assert len(files) > 2
    assert all(path.stat().st_size < limit + 100_000 for path in files)
    original.save_config(tmp_path / "transformer")
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer")
    assert loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())


def changed(document: dict[str, Any], *, training: dict[str, Any], **transformer: Any) -> FluxRecipe:
    """The recipe with keys of `transformer` and of its `training` replaced."""
    whole = {**document["transformer"], **transformer}
    return FluxRecipe.model_validate({**document, "transformer": whole | {"training": whole["training"] | training}})


def previews(pipeline: FluxPipeline, recipe: FluxRecipe) -> Tensor:
    """The recipe's previews, drawn by a saved model: int32 [N, H, W, 3]."""
    prompts = recipe.sampling.prompts
    drawn = pipeline(
        list(prompts),
        height=recipe.data.resolution,
        width=recipe.data.resolution,
        num_inference_steps=recipe.sampling.num_inference_steps,
        guidance_scale=recipe.sampling.guidance_scale,
        max_sequence_length=recipe.max_tokens,
        generator=[torch.Generator().manual_seed(derive_seed(recipe.seed, "preview", i)) for i in range(len(prompts))],
        output_type="pt",
    ).images
    return to_pixels(drawn * 2 - 1).int()


def test_bf16_trains_and_draws(flux_document: dict[str, Any], tmp_path: Path) -> None:
    """As every recipe for GPUs does: the decoder must take what the transformer gives."""
    recipe = changed(flux_document, engine="ddp", lora={"rank": 2}, training={"precision": "bf16", "steps": 2})
    reports = Reports()
    train_rank(recipe, "transformer", RunFolder(str(tmp_path / "run")), device=CPU, report=reports, resume_from=None)
    assert reports.pixels[2].shape == (3, 32, 32, 3)
    assert np.isfinite(reports.metrics[2]["validation_loss"])


def test_adapters_draw_as_they_were_trained(flux_document: dict[str, Any], tmp_path: Path) -> None:
    """Also with an alpha that is not the rank: the exported adapters on the pretrained model are the trained model."""
    lora, training = {"rank": 2, "alpha": 16.0}, {"learning_rate": 3e-2, "ema_decay": 0.0}
    recipe = changed(flux_document, engine="ddp", lora=lora, training=training)
    run, reports = RunFolder(str(tmp_path / "run")), Reports()
    train_rank(recipe, "transformer", run, device=CPU, report=reports, resume_from=None)
    checkpoint = reports.checkpoints[6]
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 1_000_000, "frozen weights need not be kept"
    flux.export(recipe, "transformer", run, checkpoint, tmp_path / "adapters")
    trained = reports.pixels[6].int()
    drawn = previews(load_model(str(tmp_path / "adapters"), device="cpu").pipeline, recipe)
    before = previews(load_model(recipe.pretrained, device="cpu").pipeline, recipe)
    assert int((drawn - trained).abs().max()) <= 3  # of 255: embeddings are kept in bf16 for training
    assert int((before - trained).abs().max()) > 20


def test_adapters_are_the_same_file_at_every_export(flux_document: dict[str, Any], tmp_path: Path) -> None:
    modules = [f"to_{i}" for i in range(12)]  # of a set, the order of so many is sorted by no accident
    recipe = changed(flux_document, engine="ddp", lora={"rank": 2, "target_modules": modules[::-1]}, training={})
    name = "transformer_blocks.0.attn.to_q.lora_A.default.weight"
    safetensors.torch.save_file({name: torch.ones(2, 8)}, tmp_path / "ema.safetensors")
    files = set()
    for attempt in range(12):  # safetensors orders several entries of metadata by chance
        export_adapters(recipe, tmp_path, tmp_path / str(attempt))
        files.add((tmp_path / str(attempt) / "pytorch_lora_weights.safetensors").read_bytes())
    assert len(files) == 1
    read, about = FluxPipeline.lora_state_dict(tmp_path / "0", return_lora_metadata=True)
    assert list(read) == ["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"]
    assert about["transformer.target_modules"] == sorted(modules)
    assert (about["transformer.r"], about["transformer.lora_alpha"]) == (2, 16.0)


def test_replicas_are_not_trained_in_bf16_without_masters(flux_document: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="engine: ddp without lora"):
        changed(flux_document, engine="ddp", training={"precision": "bf16"})


def test_zero3_compiles_for_one_worker_alone(flux_document: dict[str, Any]) -> None:
    assert changed(flux_document, training={"compile": True}).transformer.training.compile
    flux_document["cluster"]["num_workers"] = [1, 2]
    with pytest.raises(ValueError, match=r"compile under engine: zero3 needs cluster.num_workers: 1"):
        changed(flux_document, training={"compile": True})


def test_adapters_under_ddp_leave_deepspeed_alone(flux_document: dict[str, Any], tmp_path: Path) -> None:
    """Its import sets DS_ACCELERATOR, for this process and all that it starts."""
    recipe = changed(flux_document, engine="ddp", lora={"rank": 2}, training={"precision": "fp32"})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    code = """
import os, sys, torch
from trainers.families.flux import _engine, _transformer
from trainers.recipe import load_recipe
recipe, device = load_recipe("recipe.yaml"), torch.device("cpu")
engine = _engine(recipe, _transformer(recipe, device), device)
print(type(engine).__name__, "deepspeed" in sys.modules, "DS_ACCELERATOR" in os.environ)
"""
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.stdout.split() == ["DDPEngine", "False", "False"], found.stderr
