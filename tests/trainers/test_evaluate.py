"""Evaluations, whole: a model and folders of images beside real ones, cut off, and on several processes."""

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from cluster import storage
from cluster.errors import UserError
from cluster.evaluations import evaluation_document
from cluster.tracking import Tracker
from data_shards import Manifest, Settings, write_shards
from data_shards.manifest import read_index
from data_shards.reader import read_images
from data_shards.sources import medvqa_records
from tests.conftest import DATA
from trainers.evaluate import Request, evaluate, record_evaluation
from trainers.evaluate_cli import name_for
from trainers.fidelity.evaluation import Evaluation, features_uri
from trainers.fidelity.report import repeat_command
from trainers.model_source import pinned
from trainers.msdm import MSDMPipeline
from trainers.recipe import MSDMRecipe
from trainers.registration import register_model

NUM_IMAGES = 64


@pytest.fixture(scope="session")
def real_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Half of them to train on, half held out."""
    source, out = str(DATA / "colonoscopy"), str(tmp_path_factory.mktemp("real"))
    settings = Settings(name="real", splits={"train": 0.5, "validation": 0.5}, samples_per_shard=16, resize=32)
    records = list(medvqa_records(source))[:NUM_IMAGES]
    write_shards(records, out, settings, source={"format": "medvqa", "uri": source})
    return out


@pytest.fixture(scope="session")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A vision transformer of one narrow layer: quick, and read by the code that reads real ones."""
    folder = tmp_path_factory.mktemp("weights") / "tiny-vit"
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return f"transformers:{folder}"


@pytest.fixture
def model(pipeline: MSDMPipeline, tmp_path: Path) -> str:
    pipeline.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def request_(real_shards: str, extractor: str) -> Request:
    steps = {"num_inference_steps": 2, "guidance_scale": 1.5}
    return Request(real_shards, num_samples=20, extractors=(extractor,), settings=steps, batch_size=4)


@pytest.fixture
def judge(request_: Request, tmp_path: Path) -> Callable[..., Evaluation]:
    def run(model: str, out: str = "evaluation", *, num_workers: int = 1, **changes: object) -> Evaluation:
        asked = replace(request_, **changes)  # type: ignore[arg-type]
        return evaluate(model, asked, out, cache="features", device="cpu", num_workers=num_workers)

    return run


Judge = Callable[..., Evaluation]


def files(folder: str) -> dict[str, bytes]:
    return {name: Path(folder, name).read_bytes() for name in storage.list_files(folder)}


def real_images(shards: str, split: str, out: Path) -> list[str]:
    """The images of a split as files, and their keys."""
    keys = [entry.key for shard in Manifest.load(shards).split(split) for entry in read_index(shards, shard)]
    out.mkdir()
    for number, data in enumerate(read_images(shards, keys).values()):
        (out / f"{number:03d}.jpg").write_bytes(data)
    return keys


def test_a_model_is_judged(judge: Judge, model: str, real_shards: str, request_: Request, tmp_path: Path) -> None:
    found = judge(model)
    assert found == Evaluation.load("evaluation")
    assert found.model.family == "msdm"
    assert found.model.num_parameters is not None
    assert found.model.num_parameters > 10_000
    assert found.reference.digest == Manifest.load(real_shards).digest
    assert (found.reference.splits, found.reference.num_images) == (("validation",), 32)
    assert found.reference.num_training_images == 32
    assert found.generation is not None
    assert found.generation.settings == {
        "negative_prompt": "",
        "num_inference_steps": 2,
        "guidance_scale": 1.5,
        "sampler": "dpm-solver++",
    }
    metrics = {"fid", "fid_infinity", "kid", "cmmd", "precision", "recall", "f1", "density", "coverage"}
    copies = {"copy_rate", "nearer_to_training", "nearer_to_training_p_value", "caption_alignment"}
    assert found.measures.keys() == {f"{name}_transformers_tiny_vit" for name in metrics | copies} | {"ms_ssim"}
    assert len(found.samples) == 20

    # Prompts are captions of held-out images; each is drawn twice, and no picture is like another.
    prompts = [sample.prompt for sample in found.samples]
    assert prompts[0::2] == prompts[1::2]
    assert len({sample.prompt_key for sample in found.samples}) == 10
    pictures = [Image.open(f"evaluation/samples/{number:06d}.png") for number in range(20)]
    assert [picture.info["prompt"] for picture in pictures] == prompts
    assert len({picture.tobytes() for picture in pictures}) == 20
    features = safetensors.numpy.load_file(features_uri("evaluation", "transformers_tiny_vit"))["features"]
    assert features.shape == (20, 32)
    scores = safetensors.numpy.load_file("evaluation/scores.safetensors")["caption_alignment_transformers_tiny_vit"]
    assert np.nanmean(scores) == pytest.approx(found.measures["caption_alignment_transformers_tiny_vit"].value)
    page = Path("evaluation/report.html").read_text()
    shown = re.findall(r'src="data:image/\w+;base64,([^"]*)" alt="(\w+)', page)
    assert len(shown) > 20
    sizes = {(kind, *Image.open(io.BytesIO(base64.b64decode(data))).size) for data, kind in shown}
    side = found.generation.resolution
    assert sizes == {(kind, side, side) for kind in ("Generated", "Real", "Training")}, "cropped as they were compared"
    assert str(tmp_path) not in page


def test_the_first_images_do_not_depend_on_how_many_there_are(judge: Judge, model: str) -> None:
    judge(model, "some", num_samples=16)
    judge(model, "more", num_samples=20)
    some, more = files("some/samples"), files("more/samples")
    assert len(some) == 16
    assert some == {name: data for name, data in more.items() if name in some}


def test_cut_off_it_goes_on(judge: Judge, model: str) -> None:
    """Shares that are there are not drawn again; what is found is what an undisturbed evaluation finds."""
    undisturbed = judge(model, "undisturbed")
    shutil.copytree("undisturbed", "cut")
    Path("cut/evaluation.json").unlink()
    Path("cut/shares/000008.safetensors").unlink()
    kept, lost = Path("cut/samples/000000.png"), Path("cut/samples/000008.png")
    kept.write_bytes(kept.read_bytes() + b"untouched")
    lost.unlink()
    again = judge(model, "cut")
    assert kept.read_bytes().endswith(b"untouched")
    assert lost.read_bytes() == Path("undisturbed/samples/000008.png").read_bytes()
    assert again.measures == undisturbed.measures


def test_copies_of_training_images_are_found(judge: Judge, real_shards: str, tmp_path: Path) -> None:
    """The training images themselves are copies, to the last; held-out ones are not, and are as real as can be."""
    keys = real_images(real_shards, "train", tmp_path / "copies")
    real_images(real_shards, "validation", tmp_path / "honest")
    copied = judge(str(tmp_path / "copies"), "a", num_samples=32)
    honest = judge(str(tmp_path / "honest"), "b", num_samples=32)
    assert copied.generation is None
    assert copied.measures["copy_rate_transformers_tiny_vit"].value == 1
    assert honest.measures["copy_rate_transformers_tiny_vit"].value < 0.1
    assert all(near.is_suspicious and near.key == keys[near.sample] for near in copied.neighbours)
    assert honest.measures["fid_transformers_tiny_vit"].value == pytest.approx(0, abs=1e-3)
    assert honest.measures["fid_transformers_tiny_vit"].value < copied.measures["fid_transformers_tiny_vit"].value
    # Nobody said what they were drawn for, so nothing is measured that compares them with a prompt.
    assert not honest.measures.keys() & {"caption_alignment_transformers_tiny_vit", "ms_ssim"}


def test_another_request_does_not_mix_with_an_earlier_one(judge: Judge, model: str) -> None:
    judge(model)
    with pytest.raises(UserError, match=r"evaluation holds an evaluation whose seed, batch_size differ; .* --out"):
        judge(model, seed=1, batch_size=2)


def test_a_precision_is_part_of_how_the_images_were_drawn(judge: Judge, model: str, request_: Request) -> None:
    bf16 = {**request_.settings, "precision": "bf16"}
    found = judge(model, settings=bf16)
    assert found.generation is not None
    assert found.generation.settings["precision"] == "bf16"
    assert "--precision bf16" in repeat_command(found)
    with pytest.raises(UserError, match=r"evaluation holds an evaluation whose settings differ"):
        judge(model)


def test_compiled_pictures_are_not_mixed_with_others(judge: Judge, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.generate.compile_blocks", lambda unet: None)
    eager = judge(model, "eager")
    compiled = judge(model, "compiled", compile=True)
    assert eager.generation is not None
    assert compiled.generation is not None
    assert (eager.generation.compiled, compiled.generation.compiled) == (False, True)
    assert eager.generation.settings == compiled.generation.settings
    assert repeat_command(compiled) == f"{repeat_command(eager)} --compile"
    assert "on cpu, compiled" in Path("compiled/report.html").read_text()
    for out, compile in (("eager", True), ("compiled", False)):
        with pytest.raises(UserError, match=f"{out} holds an evaluation whose compile differ"):
            judge(model, out, compile=compile)
    # A folder of before compiling could be asked for is one of its kind.
    assert "compile" not in json.loads(Path("eager/request.json").read_text())


def test_mistakes_are_told_before_anything_is_drawn(judge: Judge, model: str, precomputed: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="have no split 'valdation', only train, validation; did you mean"):
        judge(model, splits=("valdation",))
    with pytest.raises(UserError, match="is not drawn with true_cfg_scale: it knows negative_prompt"):
        judge(model, settings={"true_cfg_scale": 2.0})
    with pytest.raises(UserError, match=r"there is no feature extractor 'inceptoin'.*did you mean 'inception'"):
        judge(model, extractors=("inceptoin:x",))
    with pytest.raises(UserError, match="holds latents, not images"):
        judge(model, shards=precomputed)
    with pytest.raises(UserError, match="figures need at least 16 of each"):
        judge(model, num_samples=15)
    with pytest.raises(UserError, match="would both be called dinov2 in the figures"):
        judge(model, extractors=("dinov2:base", "dinov2:large"))
    (tmp_path / "few").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "few" / "1.png")
    with pytest.raises(UserError, match="few holds 1 images; judge them with --num-samples 1"):
        judge(str(tmp_path / "few"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds neither a model nor images"):
        judge(str(tmp_path / "empty"))
    assert not Path("evaluation/samples").exists()


def test_an_evaluation_is_a_run_below_the_one_that_trained_the_model(
    judge: Judge, model: str, tracking_uri: str
) -> None:
    training = Tracker.start(experiment="e", run_name="training", tags={})
    found = judge(model)
    known = found.model_copy(update={"model": found.model.model_copy(update={"run_id": training.run_id})})
    tracker = record_evaluation(known, "evaluation")
    assert tracker.experiment() == "e"
    assert tracker.last_metrics() == {name: measure.value for name, measure in known.measures.items()}
    assert tracker.params()["settings.num_inference_steps"] == "2"
    assert Evaluation.parse(evaluation_document(training.run_id), "MLflow") == found
    assert record_evaluation(known, "evaluation").run_id == tracker.run_id, "recorded once"
    assert tracker.read_text("evaluation/report.html").startswith("<!doctype html>")


@pytest.mark.slow
def test_two_actors_find_what_one_process_finds(judge: Judge, model: str) -> None:
    alone = judge(model, "alone")
    shutil.rmtree("features")
    together = judge(model, "together", num_workers=2)
    assert files("together/samples") == files("alone/samples")
    for name, measure in alone.measures.items():
        assert together.measures[name].value == pytest.approx(measure.value, rel=1e-9, abs=1e-9)


def test_names_mean_the_same_in_every_process(
    judge: Judge, pipeline: MSDMPipeline, recipe: MSDMRecipe, tracking_uri: str, tmp_path: Path
) -> None:
    """An alias is looked up once: it may move while the evaluation goes on."""
    pipeline.save_pretrained(tmp_path / "exported")
    tracker = Tracker.start(experiment="e", run_name="r", tags={})
    register_model(recipe, Manifest.load(recipe.data.shards), str(tmp_path / "exported"), tracker, name="tiny")
    tracker.client.set_registered_model_alias("tiny", "champion", "1")
    assert pinned("models:/tiny@champion") == pinned("models:/tiny/latest") == "models:/tiny/1"
    assert pinned("some/folder") == str(tmp_path / "some/folder")
    found = judge("models:/tiny@champion")
    assert (found.model.uri, found.model.name, found.model.run_id) == (
        "models:/tiny@champion",
        "tiny 1",
        tracker.run_id,
    )
    assert name_for("models:/tiny@champion") == "tiny-champion"
