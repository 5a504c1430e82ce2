"""The pipeline: guidance, seeds, and the diffusers layout."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from trainers.msdm import MSDMPipeline
from trainers.msdm.export import PIPELINE_FILE, export_pipeline
from trainers.msdm.unet import SAMPLERS, another_sampler, build_scheduler
from trainers.msdm.vae import decode_latents, set_channel_statistics, standardize
from trainers.recipe import MSDMRecipe


def draw(
    pipeline: MSDMPipeline,
    prompts: list[str],
    *,
    guidance_scale: float = 3.5,
    sampler: str | None = None,
    **settings: Any,
) -> Tensor:
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    images: Tensor = pipeline(
        prompts,
        guidance_scale=guidance_scale,
        num_inference_steps=3,
        sampler=sampler,
        generator=generators,
        output_type="pt",
        **settings,
    ).images
    return images


def test_guidance_of_one_is_the_conditional_prediction(pipeline: MSDMPipeline) -> None:
    """Against the plain sampling loop without any unconditional pass, written out here."""
    latents = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    drawn = pipeline(["a", "b"], guidance_scale=1.0, num_inference_steps=3, latents=latents, output_type="pt").images

    embeds, mask = pipeline.encode_prompts(["a", "b"])
    pipeline.scheduler.set_timesteps(3)
    with torch.no_grad():
        for timestep in pipeline.scheduler.timesteps:
            conditional = pipeline.unet(latents, timestep, embeds, encoder_attention_mask=mask).sample
            latents = pipeline.scheduler.step(conditional, timestep, latents).prev_sample
        expected = (decode_latents(pipeline.vae, latents) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(drawn, expected)


def test_guidance_moves_away_from_the_unconditional_picture(pipeline: MSDMPipeline) -> None:
    unconditional = draw(pipeline, [""], guidance_scale=1.0)
    distances = [
        float((draw(pipeline, ["a polyp"], guidance_scale=scale) - unconditional).norm()) for scale in (1.0, 4.0, 8.0)
    ]
    assert distances == sorted(distances)
    assert distances[0] > 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_without_options_it_draws_what_it_always_drew(pipeline: MSDMPipeline, sampler: str) -> None:
    """Bit for bit the loop of the first releases, written out here: every step guided, in the weights' precision."""
    prompts, steps = ["a", "b"], 3
    latents = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    given: dict[str, Any] = {"num_inference_steps": steps, "latents": latents, "output_type": "pt"}
    drawn = pipeline(prompts, sampler=sampler, generator=torch.Generator().manual_seed(4), **given).images

    embeds, mask = pipeline.encode_prompts(prompts)
    empty_embeds, empty_mask = pipeline.encode_prompts(["", ""])
    embeds, mask = torch.cat([empty_embeds, embeds]), torch.cat([empty_mask, mask])
    scheduler = another_sampler(pipeline.scheduler, sampler)
    scheduler.set_timesteps(steps)
    noise = {} if sampler == "dpm-solver++" else {"generator": torch.Generator().manual_seed(4)}
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            both = pipeline.unet(torch.cat([latents, latents]), timestep, embeds, encoder_attention_mask=mask).sample
            unconditional, conditional = both.chunk(2)
            guided = unconditional + 4.5 * (conditional - unconditional)
            latents = scheduler.step(guided, timestep, latents, **noise).prev_sample
        expected = (decode_latents(pipeline.vae, latents) / 2 + 0.5).clamp(0, 1)
    assert torch.equal(drawn, expected)


def test_bf16_draws_nearly_the_same(pipeline: MSDMPipeline) -> None:
    """Within 8 of 255 levels, less than 2 on average; with trained weights it is a tenth of that."""
    prompts = ["a polyp", "no polyp"]
    exact, rounded = draw(pipeline, prompts), draw(pipeline, prompts, precision="bf16")
    assert exact.dtype == rounded.dtype == torch.float32
    off = (exact - rounded).abs() * 255
    assert 0 < off.mean() < 2
    assert off.max() < 8
    assert torch.equal(draw(pipeline, prompts), exact)
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16"):
        draw(pipeline, prompts, precision="fp8")


def test_a_picture_depends_on_its_own_seed_alone(pipeline: MSDMPipeline) -> None:
    together = draw(pipeline, ["a polyp", "a polyp"])
    torch.testing.assert_close(draw(pipeline, ["a polyp"]), together[:1])
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "dpm-solver++"])
def test_every_sampler_repeats_itself(pipeline: MSDMPipeline, recipe: MSDMRecipe, scheduler: str) -> None:
    sampling = recipe.sampling.model_copy(update={"scheduler": scheduler})
    pipeline.scheduler = build_scheduler(recipe.denoiser.noise, sampling)
    first, second = draw(pipeline, ["a polyp"]), draw(pipeline, ["a polyp"])
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)


@pytest.mark.parametrize("own", ["ddpm", "ddim", "dpm-solver++"])
def test_another_sampler_keeps_the_noise_schedule(
    pipeline: MSDMPipeline, recipe: MSDMRecipe, tmp_path: Path, own: str
) -> None:
    """A saved model draws by each sampler as if it had been saved with it, whichever is its own."""
    noise = recipe.denoiser.noise.model_copy(update={"beta_end": 0.015, "zero_terminal_snr": True})

    def with_scheduler(name: str) -> MSDMPipeline:
        pipeline.scheduler = build_scheduler(noise, recipe.sampling.model_copy(update={"scheduler": name}))
        return pipeline

    with_scheduler(own).save_pretrained(tmp_path)
    saved = MSDMPipeline.from_pretrained(tmp_path)
    saved.set_progress_bar_config(disable=True)
    before = draw(saved, ["a polyp"])
    drawn = {name: draw(saved, ["a polyp"], sampler=name) for name in SAMPLERS}
    assert torch.equal(drawn[own], before)
    for name, picture in drawn.items():
        assert torch.equal(picture, draw(with_scheduler(name), ["a polyp"])), name
    assert torch.equal(draw(saved, ["a polyp"]), before)  # the model's own is as it was
    assert len({picture.numpy().tobytes() for picture in drawn.values()}) == len(SAMPLERS)


def test_padding_tokens_do_not_reach_the_picture(pipeline: MSDMPipeline) -> None:
    embeds, mask = pipeline.encode_prompts(["a polyp"])
    changed = torch.where(mask[..., None].bool(), embeds, torch.full_like(embeds, 7.0))
    latents = torch.randn(1, 8, 8, 8)
    with torch.no_grad():
        one = pipeline.unet(latents, 5, embeds, encoder_attention_mask=mask).sample
        other = pipeline.unet(latents, 5, changed, encoder_attention_mask=mask).sample
    torch.testing.assert_close(one, other)


def test_saved_and_loaded_it_draws_the_same(pipeline: MSDMPipeline, tmp_path: Path) -> None:
    before = draw(pipeline, ["a polyp"])
    pipeline.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.bin"))
    loaded = MSDMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded, ["a polyp"]), before)


def test_diffusers_alone_opens_the_folder(pipeline: MSDMPipeline, recipe: MSDMRecipe, tmp_path: Path) -> None:
    """What registration ships: the layout that DiffusionPipeline.from_pretrained reads, with our class by name."""
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "pipeline.py").write_text(PIPELINE_FILE)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(tmp_path), trust_remote_code=True)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded, ["a polyp"]), draw(pipeline, ["a polyp"]))


def test_a_caption_of_two_thousand_words_is_cut(pipeline: MSDMPipeline, recipe: MSDMRecipe) -> None:
    embeds, mask = pipeline.encode_prompts(["polyp " * 2000, ""])
    assert embeds.shape == (2, recipe.text_encoder.max_tokens, 32)
    assert int(mask[0].sum()) == recipe.text_encoder.max_tokens
    assert int(mask[1].sum()) == 2
    assert torch.isfinite(embeds).all()


def test_latents_are_standardised_and_decoding_undoes_it(pipeline: MSDMPipeline) -> None:
    draws = torch.randn(64, 8, 8, 8) * torch.arange(1, 9).view(1, 8, 1, 1) + 2
    set_channel_statistics(pipeline.vae, draws)
    latents = standardize(pipeline.vae, draws)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(8), atol=1e-3, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(
            decode_latents(pipeline.vae, latents[:2]),
            pipeline.vae.decode(draws[:2]).sample,
            atol=1e-3,
            rtol=1e-3,
        )


def test_an_exported_model_does_not_depend_on_where_it_was_made(
    pipeline: MSDMPipeline, recipe: MSDMRecipe, text_encoder_folder: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    safetensors.torch.save_file(pipeline.unet.state_dict(), checkpoint / "ema.safetensors")
    (checkpoint / "state.json").write_text('{"step": 6, "ema_updates": 6}')
    exports = []
    for place in (tmp_path / "here", tmp_path / "over" / "there"):
        pipeline.vae.save_pretrained(place / "vae")
        shutil.copytree(text_encoder_folder, place / "text_encoder")
        elsewhere = recipe.text_encoder.model_copy(update={"pretrained": str(place / "text_encoder")})
        moved = recipe.model_copy(update={"text_encoder": elsewhere})
        export_pipeline(moved, place / "vae", checkpoint, place / "model")
        files = {path.relative_to(place / "model"): path for path in (place / "model").rglob("*") if path.is_file()}
        del files[Path("recipe.yaml")]  # which does name the text encoder's place
        exports.append({str(name): path.read_bytes() for name, path in files.items()})
    assert len(exports[0]) > 8
    assert exports[0].keys() == exports[1].keys()
    assert [name for name in exports[0] if exports[0][name] != exports[1][name]] == []
