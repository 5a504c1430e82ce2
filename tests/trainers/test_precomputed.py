"""MSDM's denoiser is trained on precomputed moments and prompt embeddings: what it would be trained on from images."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from cluster import storage
from data_shards import Batch, Manifest, PromptStore, derive_seed
from data_shards.manifest import MANIFEST
from data_shards.prompts import PromptIndex
from tests.trainers.test_loop import CPU, prepare_denoiser, run, vae_model, with_training
from trainers import randomness
from trainers.families import msdm, stream_from
from trainers.msdm import MSDMPipeline
from trainers.msdm.encoders import MSDMEncoders
from trainers.msdm.stages import denoiser_stage
from trainers.msdm.unet import build_scheduler
from trainers.recipe import MSDMRecipe
from trainers.run_folder import RunFolder
from trainers.stage import Stage

__all__ = ["run"]  # a fixture


def mirrored(recipe: MSDMRecipe, **changes: Any) -> MSDMRecipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"horizontal_flip": True, **changes})})


def given(stage: Stage, batch: Batch, is_training: bool) -> dict[str, Tensor]:
    """What the denoiser's objective is given."""
    return {name: value for name, value in stage.prepare(batch, is_training).items() if value is not None}


def encoded(recipe: MSDMRecipe, captions: list[str]) -> tuple[Tensor, Tensor]:
    """By transformers alone."""
    settings = recipe.text_encoder
    tokenizer = AutoTokenizer.from_pretrained(settings.pretrained)
    tokens = tokenizer(
        captions, padding="max_length", truncation=True, max_length=settings.max_tokens, return_tensors="pt"
    )
    model = AutoModel.from_pretrained(settings.pretrained).eval()
    with torch.no_grad():
        return model(**tokens).last_hidden_state, tokens["attention_mask"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_denoiser_sees_what_it_would_see_from_images(recipe: MSDMRecipe, run: RunFolder, world_size: int) -> None:
    recipe = mirrored(recipe)
    prepare_denoiser(recipe, run)
    vae = AutoencoderKL.from_pretrained(run.model("vae")).eval()
    stage, _ = msdm.build(recipe, "denoiser", run, CPU)
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1)
    num_dropped = 0
    for rank in range(world_size):
        ranks = {"rank": rank, "world_size": world_size}
        ours = msdm.open_stream(recipe, "denoiser", run, "train", **ranks).batches()
        images = stream_from(recipe.data.shards, recipe, recipe.denoiser.training, "train", **ranks).batches()
        for _ in range(8):
            for batch, seen in zip(next(ours), next(images), strict=True):
                assert (batch.keys, batch.captions, batch.seeds) == (seen.keys, seen.captions, seen.seeds)
                prepared = given(stage, batch, True)
                with torch.no_grad():
                    posterior = vae.encode(seen.images).latent_dist
                noise = randomness.normal(seen.seeds, "posterior", posterior.mean.shape[1:])
                expected = (posterior.mean + posterior.std * noise - mean) / std
                torch.testing.assert_close(prepared["latents"], expected, rtol=1e-4, atol=1e-4)
                dropout = randomness.uniform(seen.seeds, "caption_dropout") < recipe.denoiser.caption_dropout
                num_dropped += int(dropout.sum())
                captions = ["" if drop else c for c, drop in zip(seen.captions, dropout.tolist(), strict=True)]
                embeds, mask = encoded(recipe, captions)
                ulp = 2**-8  # float32 values that differ in their last bits may round to neighbours in bfloat16
                torch.testing.assert_close(prepared["prompt_embeds"], embeds, rtol=ulp, atol=1e-5)
                assert torch.equal(prepared["prompt_mask"], mask.float())
    assert num_dropped > 0


def test_validation_drops_no_caption(recipe: MSDMRecipe, run: RunFolder) -> None:
    document = recipe.model_dump()
    document["denoiser"]["caption_dropout"] = 0.99
    recipe = MSDMRecipe.model_validate(document)
    stage, _ = msdm.build(recipe, "denoiser", run, CPU)
    for batch in msdm.open_stream(recipe, "denoiser", run, "validation").one_pass(4):
        embeds = given(stage, batch, False)["prompt_embeds"]
        assert torch.equal(embeds, batch.prompts["prompt_embeds"].float())


def test_rounded_embeddings_are_the_same_to_a_denoiser_in_bf16(recipe: MSDMRecipe, run: RunFolder) -> None:
    """Only its projections to keys and values read them, and these round what they read."""
    stage, engine = msdm.build(with_training(recipe, "denoiser", precision="bf16"), "denoiser", run, CPU)
    [batch, *_] = next(msdm.open_stream(recipe, "denoiser", run, "train").batches())
    prepared = given(stage, batch, False)
    exact, mask = encoded(recipe, batch.captions)
    assert not torch.equal(prepared["prompt_embeds"], exact)
    losses = []
    for embeds in (exact.bfloat16().float(), exact):
        with engine.autocast(), torch.no_grad():
            losses.append(stage.objective(engine.model, **prepared | {"prompt_embeds": embeds, "prompt_mask": mask}))
    assert torch.equal(*losses)


def test_previews_are_those_of_the_whole_pipeline(recipe: MSDMRecipe, run: RunFolder) -> None:
    """Which encodes the prompts itself."""
    vae = AutoencoderKL.from_pretrained(run.model("vae"))
    stage = denoiser_stage(recipe, vae, PromptStore(run.precomputed, 0), CPU)
    drawn = stage.preview(stage.model, range(stage.num_previews))
    sampling = recipe.sampling
    settings = recipe.text_encoder
    pipeline = MSDMPipeline(
        vae=vae,
        text_encoder=AutoModel.from_pretrained(settings.pretrained).eval(),
        tokenizer=AutoTokenizer.from_pretrained(settings.pretrained, model_max_length=settings.max_tokens),
        unet=stage.model,
        scheduler=build_scheduler(recipe.denoiser.noise, sampling),
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        list(sampling.prompts),
        guidance_scale=sampling.guidance_scale,
        num_inference_steps=sampling.num_inference_steps,
        generator=[
            torch.Generator().manual_seed(derive_seed(recipe.seed, "preview", i)) for i in range(len(sampling.prompts))
        ],
        output_type="np",
    ).images
    difference = drawn.float() - torch.from_numpy(expected).mul(255).round()
    assert difference.abs().max() <= 4  # of 255: embeddings are stored in bfloat16


# --- made once ---


def encoding(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which encoders are opened from now on."""
    opened: list[str] = []
    for name in ("image_encoder", "prompt_encoder"):
        original = getattr(MSDMEncoders, name)

        def noted(self: MSDMEncoders, device: str, name: str = name, original: Any = original) -> Any:
            opened.append(name)
            return original(self, device)

        monkeypatch.setattr(MSDMEncoders, name, noted)
    return opened


def test_what_is_there_is_not_encoded_again(
    recipe: MSDMRecipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = encoding(monkeypatch)
    prepare_denoiser(recipe, run)
    assert opened == []
    sampling = recipe.sampling.model_copy(update={"prompts": ("a unicorn",)})
    prepare_denoiser(recipe.model_copy(update={"sampling": sampling}), run)
    assert opened == ["prompt_encoder"]
    PromptStore(run.precomputed, 0).get(["a unicorn"])


def test_an_outage_is_no_reason_to_encode_anew(
    recipe: MSDMRecipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    borrower = RunFolder(str(tmp_path / "borrower"))
    shutil.copytree(run.model("vae"), borrower.model("vae"))
    borrower.borrow_precomputed(run)
    before = Manifest.load(run.precomputed)

    def unanswered(uri: str) -> PromptIndex:
        raise storage.StorageError(f"cannot read {uri}: 503")

    opened = encoding(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(PromptIndex, "load", unanswered)
        for one in (run, borrower):
            with pytest.raises(storage.StorageError, match="503"):
                prepare_denoiser(recipe, one)
    assert opened == []
    assert borrower.borrows_precomputed
    assert Manifest.load(run.precomputed) == before


def test_another_autoencoder_makes_another_set(
    recipe: MSDMRecipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = Manifest.load(run.precomputed)
    shutil.rmtree(run.model("vae"))
    vae_model(recipe.model_copy(update={"seed": 1}), run)
    opened = encoding(monkeypatch)
    prepare_denoiser(recipe, run)
    assert opened == ["image_encoder"]
    after = Manifest.load(run.precomputed)
    assert after.digest != before.digest
    assert after.order_digest == before.order_digest


def test_runs_that_share_an_autoencoder_share_the_set(
    recipe: MSDMRecipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    borrower = RunFolder(str(tmp_path / "borrower"))
    shutil.copytree(run.model("vae"), borrower.model("vae"))
    opened = encoding(monkeypatch)
    borrower.borrow_precomputed(run)
    prepare_denoiser(recipe, borrower)
    assert opened == []
    assert borrower.precomputed == run.precomputed
    assert not storage.exists(str(tmp_path / "borrower/precomputed"))

    # What it draws may be of its own; then it must not change what others are reading.
    lent = storage.read_bytes(storage.join(run.precomputed, MANIFEST))
    sampling = recipe.sampling.model_copy(update={"prompts": ("a unicorn",)})
    prepare_denoiser(recipe.model_copy(update={"sampling": sampling}), borrower)
    assert borrower.precomputed == str(tmp_path / "borrower/precomputed")
    assert storage.read_bytes(storage.join(run.precomputed, MANIFEST)) == lent
