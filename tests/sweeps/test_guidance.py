"""Sweeps over how a trained model draws: the same noise, the choice, going on, and what is remembered of it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from mlflow import MlflowClient
from PIL import Image
from rich.console import Console

import sweeps.guidance
from cluster import storage
from cluster.errors import UserError
from cluster.evaluations import KIND, PARENT
from cluster.registry import RegisteredModel
from cluster.tracking import Tracker
from data_shards import Manifest
from sweeps.guidance import (
    Point,
    recommend,
    record_guidance_sweep,
    setting_name,
    settings_of,
    sweep_guidance,
)
from sweeps.guidance_cli import run_guidance_sweep
from sweeps.guidance_document import GuidanceSweep
from sweeps.guidance_spec import GuidanceSpec, load_guidance_spec
from trainers.evaluate import Request, evaluate
from trainers.fidelity.samples import read_sample
from trainers.generate import Drawing, Model, drawing_of, generate, load_model
from trainers.model_source import open_model
from trainers.msdm import MSDMPipeline
from trainers.recipe import MSDMRecipe
from trainers.registration import register_model

NUM_SAMPLES = 16
Sweep = Callable[..., GuidanceSweep]


@pytest.fixture
def model(pipeline: MSDMPipeline, tmp_path: Path) -> str:
    pipeline.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def sweep(real_shards: str, extractor: str) -> Sweep:
    def run(model: str, out: str = "sweep", **changes: Any) -> GuidanceSweep:
        asked: dict[str, Any] = {
            "guidance_scales": [1, 4],
            "num_inference_steps": [1],
            "num_samples": NUM_SAMPLES,
            "extractors": [extractor],
            "cache": "features",
            "device": "cpu",
        }
        return sweep_guidance(model, real_shards, out, **asked | changes)

    return run


def test_a_model_is_judged_with_every_setting(sweep: Sweep, model: str) -> None:
    found = sweep(model, num_inference_steps=[1, 2])
    assert found == GuidanceSweep.load("sweep")
    names = [f"guidance-{scale}_steps-{steps}_dpm-solver++" for scale in (1, 4) for steps in (1, 2)]
    assert [result.name for result in found.settings] == names
    assert found.settings[3].setting == {"guidance_scale": 4, "num_inference_steps": 2, "sampler": "dpm-solver++"}
    assert found.fidelity == "kid_transformers_tiny_vit"
    assert found.alignment == "caption_alignment_transformers_tiny_vit"
    losses = [found.result(name).measures[found.fidelity].value for name in found.front]
    assert losses == sorted(losses)
    assert found.recommended in names
    for name in ("front.png", "grid.png"):
        assert min(Image.open(Path("sweep", name)).size) > 200


def test_a_setting_is_what_an_evaluation_finds_with_it(
    sweep: Sweep, model: str, real_shards: str, extractor: str
) -> None:
    found = sweep(model, guidance_scales=[1.5], num_inference_steps=[2], samplers=["ddim"])
    settings = {"guidance_scale": 1.5, "num_inference_steps": 2, "sampler": "ddim"}
    request = Request(real_shards, num_samples=NUM_SAMPLES, extractors=(extractor,), settings=settings)
    alone = evaluate(model, request, "alone", cache="features", device="cpu")
    assert alone.samples == found.samples
    assert found.best.measures == {name: alone.measures[name] for name in found.best.measures}
    assert len(found.best.measures) >= 10
    one, other = (read_sample(place, 3).tobytes() for place in ("alone", f"sweep/settings/{found.recommended}"))
    assert one == other


def test_all_settings_begin_with_the_same_noise(sweep: Sweep, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the denoiser is first given: the same latents, whatever the scale, the sampler and the steps."""
    begun: list[torch.Tensor] = []
    denoise = MSDMPipeline.initial_latents

    def noted(self: MSDMPipeline, count: int, generator: Any) -> torch.Tensor:
        begun.append(denoise(self, count, generator))
        return begun[-1]

    monkeypatch.setattr(MSDMPipeline, "initial_latents", noted)
    sweep(model, samplers=["ddpm", "ddim"], batch_size=NUM_SAMPLES)
    assert len(begun) == 4
    assert all(torch.equal(noise, begun[0]) for noise in begun)
    assert len({noise.numpy().tobytes() for noise in begun[0]}) == NUM_SAMPLES


def test_without_guidance_the_negative_prompt_does_not_count(sweep: Sweep, model: str) -> None:
    """Two sweeps, each with settings of its own beside it, draw the same with scale 1, to the bit, at half the cost."""
    drawn = []
    for out, scales in (("a", [1, 4]), ("b", [2, 1.0])):
        sweep(model, out, guidance_scales=scales)
        place = f"{out}/settings/guidance-1_steps-1_dpm-solver++"
        drawn.append([read_sample(place, number).tobytes() for number in range(NUM_SAMPLES)])
    assert drawn[0] == drawn[1]
    opened = load_model(model, "cpu")
    seen: list[int] = []
    opened.pipeline.unet.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    for scale in (1.0, 4.0):
        opened.draw(["a"], [0], seed=0, settings={"guidance_scale": scale, "num_inference_steps": 1})
    assert seen == [1, 2]


def test_a_sweep_goes_on_and_grows(sweep: Sweep, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is not drawn again, even where only a part of a setting was drawn; the model may stay shut."""
    whole = sweep(model, "whole")
    shutil.copytree("whole", "cut")
    first, last = (f"cut/settings/{whole.settings[i].name}" for i in (0, 1))
    Path(last, "measured.json").unlink()
    Path(last, "shares/000008.safetensors").unlink()
    Path("cut/sweep.json").unlink()
    untouched = Path(first, "samples/000000.png").read_bytes() + b"untouched"
    Path(first, "samples/000000.png").write_bytes(untouched)
    drawn: list[list[int]] = []
    draw = Model.draw

    def noted(self: Model, prompts: Any, numbers: Any, **arguments: Any) -> Any:
        drawn.append(list(numbers))
        return draw(self, prompts, numbers, **arguments)

    monkeypatch.setattr(Model, "draw", noted)
    again = sweep(model, "cut")
    assert drawn == [list(range(8, 16))]
    assert Path(first, "samples/000000.png").read_bytes() == untouched
    assert again.recommended == whole.recommended
    assert [result.measures for result in again.settings] == [result.measures for result in whole.settings]

    grown = sweep(model, "cut", guidance_scales=[1, 2, 4])
    assert len(drawn) == 1 + 2
    assert [result.setting["guidance_scale"] for result in grown.settings] == [1, 2, 4]
    monkeypatch.setattr(sweeps.guidance, "load_model", None)
    assert sweep(model, "whole") == whole.model_copy(update={"created": GuidanceSweep.load("whole").created})


def test_mistakes_are_told_before_anything_is_drawn(sweep: Sweep, model: str, tmp_path: Path) -> None:
    for changes, said in (
        ({"samplers": ["ddim", "euler"]}, "has no sampler 'euler': choose one of ddpm, ddim, dpm-solver"),
        ({"true_cfg_scales": [2]}, "is not drawn with true_cfg_scale: it knows negative_prompt"),
        ({"guidance_scales": [1.0, float("inf")]}, "guidance_scale must be a number from 0 to 100, not inf"),
        ({"num_inference_steps": [1001]}, "num_inference_steps must be a whole number from 1 to 1000, not 1001"),
        ({"guidance_scales": [-1]}, "guidance_scale must be a number from 0 to 100, not -1"),
        ({"num_inference_steps": [0]}, "num_inference_steps must be a whole number from 1 to 1000, not 0"),
        ({"fidelity": "kdi"}, "there is no fidelity 'kdi' to sweep by: choose one of fid, kid"),
        ({"num_samples": 8}, "32 real images in validation and 8 samples: figures need at least 16 of each"),
    ):
        with pytest.raises(UserError, match=said):
            sweep(model, str(tmp_path / said[:8]), **changes)
    (tmp_path / "images").mkdir()
    for number in range(NUM_SAMPLES):
        Image.new("RGB", (16, 16)).save(tmp_path / "images" / f"{number}.png")
    with pytest.raises(UserError, match=r"a folder of images, .*: name a model"):
        sweep(str(tmp_path / "images"))
    sweep(model, guidance_scales=[1])
    with pytest.raises(UserError, match=r"sweep holds an evaluation whose seed differ; choose another --out"):
        sweep(model, seed=1)
    assert not [path for path in tmp_path.glob("*/settings/*") if path.parts[-3] != "sweep"]


def test_axes_make_a_grid() -> None:
    msdm = Drawing("msdm", 64, {"guidance_scale": 3.5, "num_inference_steps": 30, "sampler": "ddim"}, ("ddpm", "ddim"))
    assert list(settings_of(msdm, {})) == ["guidance-3.5_steps-30_ddim"]
    grid = settings_of(msdm, {"guidance_scale": [1, 1.0, 2], "sampler": ["ddpm", "ddim"]})
    assert [setting_name(setting) for setting in grid.values()] == list(grid)
    assert len(grid) == 4
    flux = Drawing("flux", 64, {**msdm.defaults, "true_cfg_scale": 1.0, "sampler": "euler"}, ("euler",))
    both = settings_of(flux, {"guidance_scale": [2.5, 3.5], "true_cfg_scale": [1.0, 4.0]})
    assert list(both) == [f"guidance-{g}_cfg-{c}_steps-30_euler" for g in (2.5, 3.5) for c in (1, 4)]
    with pytest.raises(UserError, match="true_cfg_scale must be a number from 1 to 100, not 0"):
        settings_of(flux, {"true_cfg_scale": [0]})


def never(one: int, other: int) -> bool:
    return False


BASE = Point(loss=1.0, alignment=0.5, lowest_alignment=0.4, num_inference_steps=20)


@pytest.mark.parametrize(
    ("others", "tied", "chosen"),
    [
        ([], never, 0),
        ([replace(BASE, loss=0.5)], never, 1),
        # More faithful, but below what the best-aligned one may be by chance.
        ([replace(BASE, loss=0.5, alignment=0.39, lowest_alignment=0.3)], never, 0),
        ([replace(BASE, loss=0.5, alignment=0.40, lowest_alignment=0.3)], never, 1),
        # As good, as far as can be told: the one with fewer steps.
        ([replace(BASE, loss=0.5), replace(BASE, loss=0.6, num_inference_steps=10)], lambda i, j: True, 2),
        ([replace(BASE, loss=0.5), replace(BASE, loss=0.6, num_inference_steps=10)], never, 1),
        ([replace(BASE, loss=0.5), replace(BASE, loss=0.6)], lambda i, j: True, 1),
        # What obeys too little takes no part, however few its steps.
        ([replace(BASE, loss=0.5, alignment=0.1, num_inference_steps=1)], lambda i, j: True, 0),
    ],
)
def test_the_rule(others: list[Point], tied: Callable[[int, int], bool], chosen: int) -> None:
    assert recommend([BASE, *others], tied) == chosen


def test_more_is_better_of_some_measures(sweep: Sweep, model: str) -> None:
    found = sweep(model, fidelity="precision")
    name = found.fidelity
    for result in found.settings:
        assert Point.of(result, name, found.alignment).loss == -result.measures[name].value


def test_it_is_a_run_and_becomes_the_version_s_default(
    sweep: Sweep, pipeline: MSDMPipeline, recipe: MSDMRecipe, tracking_uri: str, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path / "exported")
    training = Tracker.start(experiment="e", run_name="training", tags={})
    register_model(recipe, Manifest.load(recipe.data.shards), str(tmp_path / "exported"), training, name="tiny")
    MlflowClient().set_registered_model_alias("tiny", "candidate", "1")
    uri = "models:/tiny@candidate"
    grid = {"guidance_scales": [2.5], "samplers": ["ddpm"], "num_inference_steps": [3]}
    tracker = record_guidance_sweep(sweep(uri, **grid), "sweep")

    assert tracker.experiment() == "e"
    tags = MlflowClient().get_run(tracker.run_id).data.tags
    assert (tags[KIND], tags[PARENT]) == ("guidance-sweep", training.run_id)
    assert tracker.params()["recommended.sampler"] == "ddpm"
    assert {"kid_transformers_tiny_vit", "recommended/kid_transformers_tiny_vit"} <= tracker.last_metrics().keys()
    assert json.loads(tracker.read_text("guidance-sweep/sweep.json"))["recommended"] == "guidance-2.5_steps-3_ddpm"
    artifacts = [entry.path for entry in MlflowClient().list_artifacts(tracker.run_id, "guidance-sweep")]
    assert artifacts == [f"guidance-sweep/{name}" for name in ("front.png", "grid.png", "sweep.json")]

    # From now on it is drawn so; what a user asks for wins, and other versions and folders are as they were.
    _, version = RegisteredModel.of(uri)
    assert version.tags["sampling.guidance_scale"] == "2.5"
    assert version.tags["sampling.sweep"] == tracker.run_id

    def about(model: str, out: str, **settings: Any) -> list[str]:
        (path,) = generate(
            model, "a", tmp_path / out, num_images=1, batch_size=1, seed=0, settings=settings, device="cpu"
        )
        told = Image.open(path).info
        return [told[name] for name in ("guidance_scale", "num_inference_steps", "sampler")]

    assert about(uri, "default") == ["2.5", "3", "ddpm"]
    assert about(uri, "own", guidance_scale=1.5, sampler="ddim") == ["1.5", "3", "ddim"]
    assert about(str(tmp_path / "exported"), "folder") == ["4.5", "30", "dpm-solver++"]
    with open_model(uri) as source:
        assert drawing_of(source.folder, name=uri, sampling=source.sampling).defaults["guidance_scale"] == 2.5
    MlflowClient().set_model_version_tag("tiny", "1", "sampling.num_inference_steps", "many")
    with pytest.raises(UserError, match=r"tag sampling.num_inference_steps is 'many': make it a number, or remove it"):
        about(uri, "wrong")


def test_of_a_folder_a_specification_is_run_and_told(
    model: str, real_shards: str, extractor: str, tracking_uri: str
) -> None:
    """A folder has no tags: nothing is registered, and the run stands alone."""
    spec = GuidanceSpec(
        model=model,
        data=real_shards,
        guidance_scales=(1, 2),
        num_inference_steps=(1,),
        num_samples=NUM_SAMPLES,
        extractors=(extractor,),
    )
    told = StringIO()
    found = run_guidance_sweep(spec, Console(file=told, width=100), out="sweep", device="cpu")
    assert found == GuidanceSweep.load("sweep")
    text = told.getvalue()
    assert "Drawing: 4/4" in text
    assert text.count("★") == 1
    assert f"Recommended: guidance_scale {found.best.setting['guidance_scale']}" in text
    experiment = MlflowClient().get_experiment_by_name("evaluations")
    assert experiment is not None
    (run,) = MlflowClient().search_runs([experiment.experiment_id])
    assert run.data.tags[KIND] == "guidance-sweep"
    assert PARENT not in run.data.tags
    assert not MlflowClient().search_registered_models()


def test_the_specification_names_real_keys(tmp_path: Path) -> None:
    shipped = Path(__file__).parents[2] / "sweeps" / "specs" / "msdm-guidance.yaml"
    spec = load_guidance_spec(str(shipped), ["num_samples=16", "data=elsewhere"])
    assert (spec.num_samples, spec.data, spec.samplers) == (16, "elsewhere", ("ddpm", "ddim", "dpm-solver++"))
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(yaml.safe_load(shipped.read_text()) | {"guidance_scale": [1]}))
    with pytest.raises(UserError, match=r"unknown key 'guidance_scale': did you mean 'guidance_scales'"):
        load_guidance_spec(str(wrong))


@pytest.mark.slow
def test_two_actors_find_what_one_process_finds(sweep: Sweep, model: str) -> None:
    alone, together = sweep(model, "alone"), sweep(model, "together", num_workers=2)
    for name in (result.name for result in alone.settings):
        ours, theirs = (storage.list_files(f"{out}/settings/{name}") for out in ("alone", "together"))
        assert ours == theirs
        one, other = (np.asarray(read_sample(f"{out}/settings/{name}", 5)) for out in ("alone", "together"))
        assert np.array_equal(one, other)
    assert together.recommended == alone.recommended
