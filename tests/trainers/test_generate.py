"""From a saved model to PNG files."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.errors import UserError
from trainers.generate import generate
from trainers.msdm import MSDMPipeline


@pytest.fixture
def model(pipeline: MSDMPipeline, tmp_path: Path) -> str:
    pipeline.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def draw(
    model: str,
    out: Path,
    *,
    num_images: int = 3,
    batch_size: int = 2,
    seed: int = 0,
    overwrite: bool = False,
    **settings: Any,
) -> list[Path]:
    return generate(
        model,
        "a large polyp",
        out,
        num_images=num_images,
        batch_size=batch_size,
        seed=seed,
        settings={"guidance_scale": 3.5, "num_inference_steps": 2} | settings,
        device="cpu",
        overwrite=overwrite,
    )


def test_the_same_seed_writes_the_same_files(model: str, tmp_path: Path) -> None:
    first, second = draw(model, tmp_path / "a"), draw(model, tmp_path / "b")
    assert [path.name for path in first] == ["0000.png", "0001.png", "0002.png"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    others = draw(model, tmp_path / "c", seed=1)
    assert all(path.read_bytes() != other.read_bytes() for path, other in zip(first, others, strict=True))


def test_a_picture_does_not_depend_on_how_many_are_drawn(model: str, tmp_path: Path) -> None:
    """Up to one of 255 levels: another batch size may take another summation order."""
    three = draw(model, tmp_path / "three", batch_size=3)
    one = draw(model, tmp_path / "one", num_images=1, batch_size=1)
    pixels = [np.asarray(Image.open(path), dtype=np.int16) for path in (three[0], one[0])]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1


def test_a_picture_says_what_made_it(model: str, tmp_path: Path) -> None:
    last = Image.open(draw(model, tmp_path / "out", seed=5)[-1])
    assert last.info["prompt"] == "a large polyp"
    assert last.info["Description"] == "Synthetic image, made by a generative model"
    made_with = [last.info[name] for name in ("seed", "number", "guidance_scale", "num_inference_steps", "model")]
    assert made_with == ["5", "2", "3.5", "2", model]


def test_a_sampler_is_chosen_and_recorded(model: str, tmp_path: Path) -> None:
    steps: dict[str, Any] = {"num_inference_steps": 4}  # in two, DPM-Solver++ takes the very steps of DDIM
    (path,) = draw(model, tmp_path / "own", num_images=1, **steps)
    own = Image.open(path)
    same, other = (
        Image.open(draw(model, tmp_path / name, num_images=1, sampler=name, **steps)[0])
        for name in ("dpm-solver++", "ddim")
    )
    assert [picture.info["sampler"] for picture in (own, same, other)] == ["dpm-solver++", "dpm-solver++", "ddim"]
    assert own.tobytes() == same.tobytes() != other.tobytes()
    with pytest.raises(UserError, match=r"has no sampler 'ddmi': choose one of ddpm, ddim, dpm-solver\+\+"):
        draw(model, tmp_path / "wrong", sampler="ddmi")
    assert not list((tmp_path / "wrong").glob("*.png"))


def test_a_precision_is_chosen_and_recorded_unless_it_is_the_default(model: str, tmp_path: Path) -> None:
    (own,) = draw(model, tmp_path / "own", num_images=1)
    (fp32,), (bf16,) = (draw(model, tmp_path / name, num_images=1, precision=name) for name in ("fp32", "bf16"))
    assert own.read_bytes() == fp32.read_bytes()
    assert "precision" not in Image.open(own).info
    assert Image.open(bf16).info["precision"] == "bf16"
    pixels = [np.asarray(Image.open(path), dtype=np.int16) for path in (own, bf16)]
    assert 0 < np.abs(pixels[0] - pixels[1]).mean() < 2  # of 255 levels
    with pytest.raises(UserError, match="has no precision 'fp8': choose one of fp32, bf16"):
        draw(model, tmp_path / "wrong", precision="fp8")
    assert not list((tmp_path / "wrong").glob("*.png"))


def test_the_same_command_goes_on_where_it_was_cut_off(model: str, tmp_path: Path) -> None:
    paths = draw(model, tmp_path / "out")
    whole = [path.read_bytes() for path in paths]
    paths[1].unlink()
    os.utime(paths[0], (1, 1))
    assert [path.read_bytes() for path in draw(model, tmp_path / "out")] == whole
    assert paths[0].stat().st_mtime == 1, "it was not drawn again"
    assert len(draw(model, tmp_path / "out", num_images=5)) == 5, "the series may grow"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "made with another seed"),
        ({"guidance_scale": 2.0}, "made with another guidance_scale"),
        ({"num_inference_steps": 3}, "made with another num_inference_steps"),
        ({"negative_prompt": "text"}, "made with another negative_prompt"),
    ],
)
def test_pictures_of_another_command_are_neither_mixed_nor_overwritten(
    model: str, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    out = tmp_path / "out"
    before = {path.name: path.read_bytes() for path in draw(model, out)}
    with pytest.raises(UserError, match=f"{said}.*such as 0000.png: choose another --out, or give --overwrite"):
        draw(model, out, num_images=1, **change)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    draw(model, out, num_images=1, overwrite=True, **change)
    assert [path.name for path in out.iterdir()] == ["0000.png"], "none of the other command is left"
    assert (out / "0000.png").read_bytes() != before["0000.png"]


def test_another_model_at_the_same_place_is_another_command(model: str, tmp_path: Path, pipeline: MSDMPipeline) -> None:
    draw(model, tmp_path / "out")
    with torch.no_grad():
        pipeline.unet.conv_out.bias += 1
    pipeline.save_pretrained(model)
    with pytest.raises(UserError, match="made with another model_digest"):
        draw(model, tmp_path / "out")


def test_pictures_of_somebody_else_are_left_alone(model: str, tmp_path: Path) -> None:
    photo = tmp_path / "out" / "photo.JPG"
    photo.parent.mkdir()
    Image.new("RGB", (8, 8)).save(photo, "JPEG")
    (tmp_path / "out" / "notes.txt").write_text("no picture")
    content = photo.read_bytes()
    with pytest.raises(UserError, match=r"of another origin, such as photo\.JPG"):
        draw(model, tmp_path / "out")
    draw(model, tmp_path / "out", overwrite=True)
    assert photo.read_bytes() == content


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"guidance_scale": float("inf")}, "guidance_scale must be a number from 0 to 100, not inf"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number from 0 to 100, not nan"),
        ({"guidance_scale": 1e308}, "guidance_scale must be a number from 0 to 100, not 1e+308"),
        ({"guidance_scale": -0.1}, "guidance_scale must be a number from 0 to 100, not -0.1"),
        ({"guidance_scale": "3.5"}, "guidance_scale must be a number from 0 to 100, not '3.5'"),
        ({"guidance_scale": True}, "guidance_scale must be a number from 0 to 100, not True"),
        ({"num_inference_steps": 1001}, "num_inference_steps must be a whole number from 1 to 1000, not 1001"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be a whole number from 1 to"),
        ({"num_inference_steps": 10**400}, "num_inference_steps must be a whole number from 1 to"),
        ({"negative_prompt": 5}, "negative_prompt must be text, not 5"),
        ({"seed": -1}, "seed must be a whole number from 0 to"),
        ({"seed": 2**63}, "seed must be a whole number from 0 to"),
        ({"num_images": 0}, "num_images must be a whole number from 1 to"),
        ({"batch_size": 10**9}, "batch_size must be a whole number from 1 to"),
    ],
)
def test_numbers_out_of_bounds_are_refused_in_a_line(
    model: str, tmp_path: Path, setting: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError) as refused:
        draw(model, tmp_path / "out", **setting)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("prompt", ["", " \n", "a" * 10_001, "half \ud83d", "nul \0"])
def test_a_prompt_must_be_text_of_bounded_length(model: str, tmp_path: Path, prompt: str) -> None:
    with pytest.raises(UserError, match=r"^prompt "):
        generate(model, prompt, tmp_path, num_images=1, batch_size=1, seed=0, settings={}, device="cpu")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no diffusers pipeline"):
        draw(str(tmp_path / "empty"), tmp_path / "out")


def test_an_output_folder_in_which_nothing_can_be_written_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file in the way")
    with pytest.raises(UserError, match="cannot write"):
        draw("models:/none/1", tmp_path / "out")


def test_progress_is_told_after_each_sampling_step(model: str, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    generate(
        model,
        "a polyp",
        tmp_path / "out",
        num_images=3,
        batch_size=2,
        seed=0,
        settings={"num_inference_steps": 2},
        device="cpu",
        on_progress=lambda *news: told.append(news),
    )
    assert [(done, total) for _, done, total in told] == [(done, 4) for done in range(5)]
