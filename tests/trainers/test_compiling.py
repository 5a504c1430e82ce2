"""Compiled drawing: the same pictures but for rounding, compiled for once; and the option that asks for it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torch._dynamo.utils import counters
from typer.testing import CliRunner

from cluster.errors import UserError
from medsynth import app
from trainers.compiling import compile_blocks
from trainers.evaluate import Request
from trainers.generate import Model, load_model
from trainers.msdm import MSDMPipeline

PROMPTS = ["a polyp", "a large polyp", "no polyp"]
FLUX = {"height": 32, "width": 32, "max_sequence_length": 16}


@pytest.fixture
def model(pipeline: MSDMPipeline, tmp_path: Path) -> str:
    pipeline.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is to be compiled, and is not."""
    kinds: list[str] = []
    monkeypatch.setattr("trainers.generate.compile_blocks", lambda model: kinds.append(type(model).__name__))
    return kinds


def pixels(images: list[Image.Image]) -> NDArray[np.int16]:
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def draw(model: Model, numbers: list[int], **settings: Any) -> NDArray[np.int16]:
    chosen = {"num_inference_steps": 3, "guidance_scale": 3.5} | settings
    return pixels(model.draw([PROMPTS[number] for number in numbers], numbers, seed=0, settings=chosen))


@pytest.mark.slow
def test_compiled_pictures_are_the_same_and_nothing_is_compiled_twice(model: str) -> None:
    """To one of 255 levels, in bf16 to eight, two on average, as test_pipeline has it of bf16. Neither a smaller last
    batch, nor another sampler, nor other steps are compiled for."""
    torch.compiler.reset()
    eager, compiled = load_model(model, "cpu"), load_model(model, "cpu", compile_for=2)
    for precision, most, mean in (("fp32", 1, 0.01), ("bf16", 8, 2.0)):
        expected = draw(eager, [0, 1, 2], precision=precision)
        before = counters["stats"]["unique_graphs"]
        first = draw(compiled, [0, 1], precision=precision)
        known = counters["stats"]["unique_graphs"]
        assert known > before
        off = np.abs(np.concatenate([first, draw(compiled, [2], precision=precision)]) - expected)
        assert off.max() <= most
        assert off.mean() <= mean
        for sampler, steps in (("ddim", 4), ("ddpm", 2), ("dpm-solver++", 5)):
            draw(compiled, [1, 2], precision=precision, sampler=sampler, num_inference_steps=steps)
        assert counters["stats"]["unique_graphs"] == known


@pytest.mark.slow
def test_compiled_flux_draws_the_same(flux_folder: Path) -> None:
    eager, compiled = (load_model(str(flux_folder), "cpu", compile_for=size) for size in (None, 2))
    expected, found = draw(eager, [0, 1], **FLUX), draw(compiled, [0, 1], **FLUX)
    assert np.abs(expected - found).max() <= 1
    known = counters["stats"]["unique_graphs"]
    assert np.abs(draw(eager, [2], **FLUX) - draw(compiled, [2], **FLUX)).max() <= 1
    draw(compiled, [0, 1], **FLUX, num_inference_steps=2, true_cfg_scale=2.0, negative_prompt="no polyp")
    assert counters["stats"]["unique_graphs"] == known


def test_a_smaller_batch_is_filled_up(model: str, asked_for: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    eager, compiled = load_model(model, "cpu"), load_model(model, "cpu", compile_for=3)
    assert asked_for == ["UNet2DConditionModel"]
    sizes: list[int] = []
    compiled.pipeline.unet.register_forward_pre_hook(lambda unet, arguments: sizes.append(len(arguments[0])))
    for numbers in ([0, 1, 2], [2], [1, 2]):
        assert np.abs(draw(compiled, numbers) - draw(eager, numbers)).max() <= 1
    assert set(sizes) == {6}  # with and without the prompt


def test_of_flux_the_transformer_is_compiled(flux_folder: Path, asked_for: list[str]) -> None:
    load_model(str(flux_folder), "cpu", compile_for=1)
    assert asked_for == ["FluxTransformer2DModel"]


def test_generate_compiles_for_the_batches_it_draws(
    model: str, asked_for: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def noted(opened: Model, prompts: list[str], numbers: range, **given: Any) -> list[Image.Image]:
        sizes.append(opened.compiled_for or 0)
        return [Image.new("RGB", (8, 8))] * len(numbers)

    monkeypatch.setattr(Model, "draw", noted)
    command = ["generate", "--model", model, "--prompt", "a polyp", "--num-images", "3", "--overwrite"]
    for options in (["--compile"], ["--compile", "--batch-size", "2"], []):
        assert CliRunner().invoke(app, [*command, *options]).exit_code == 0
    assert sizes == [3, 2, 2, 0]
    assert len(asked_for) == 2


@pytest.mark.parametrize("command", ["evaluate", "promote"])
def test_an_evaluation_is_asked_to_compile(
    command: str, model: str, shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[Request] = []

    def judged(model: str, request: Request, folder: str, **given: Any) -> None:
        requests.append(request)
        raise UserError("enough")

    monkeypatch.setattr("trainers.evaluate.evaluate", judged)
    monkeypatch.setattr("trainers.promote.promote", lambda *given, evaluate, **named: evaluate("models:/m/1", "folder"))
    monkeypatch.setattr("trainers.promote_cli.check_model", lambda uri: None)
    asked = {"evaluate": model, "promote": "models:/m/1"}
    for options in (["--compile"], []):
        CliRunner().invoke(app, [command, asked[command], "--data", shards, *options])
    assert requests == [replace(requests[1], compile=True), requests[1]]
    assert not requests[1].compile


def test_without_a_compiler_it_is_told_at_once() -> None:
    torch.compiler.reset()
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(UserError, match=r"does not work for cpu here \(No working C\+\+ compiler") as error,
    ):
        compile_blocks(nn.Sequential(nn.Linear(2, 2)))
    assert "\n" not in str(error.value)
