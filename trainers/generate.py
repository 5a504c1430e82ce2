"""From a saved model to PNG files, for every family."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DiffusionPipeline, FluxPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image, PngImagePlugin
from transformers.utils import logging as transformers_logging

from cluster.errors import UserError
from cluster.registry import model_folder
from cluster.weights import local_weights
from data_shards import derive_seed
from trainers.msdm import MSDMPipeline

RECIPE = "recipe.yaml"
# Not what some models carry beside them for other programs, such as all weights once more in one file.
PIPELINE_FILES = ("model_index.json", "*/*")
ADAPTERS = "pytorch_lora_weights.safetensors"
PIPELINES: dict[str, type[DiffusionPipeline]] = {"MSDMPipeline": MSDMPipeline, "FluxPipeline": FluxPipeline}


@dataclass(frozen=True)
class Model:
    """A pipeline and how it draws unless it is told otherwise."""

    pipeline: DiffusionPipeline
    defaults: Mapping[str, Any]

    def arguments(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What the model is drawn with. Raises UserError if it does not know a setting."""
        arguments = {**self.defaults, **settings}
        if unknown := sorted(arguments.keys() - self.defaults.keys()):
            raise UserError(f"the model is not drawn with {', '.join(unknown)}: it knows {', '.join(self.defaults)}")
        return arguments

    def draw(
        self, prompts: Sequence[str], numbers: Sequence[int], *, seed: int, settings: Mapping[str, Any]
    ) -> list[Image.Image]:
        """One picture for each prompt; that of number i depends on its prompt and on (seed, i) alone."""
        arguments = self.arguments(settings)
        drawn = self.pipeline(
            list(prompts),
            **arguments | {"negative_prompt": [arguments["negative_prompt"]] * len(prompts)},
            generator=[torch.Generator().manual_seed(derive_seed(seed, "generate", number)) for number in numbers],
        )
        images: list[Image.Image] = drawn.images
        return images


def load_model(model_uri: str, device: str | None = None) -> Model:
    """Open a model on `device`, or on a GPU if there is one; `model_uri` as in cluster.registry.model_folder.

    Raises UserError when there is no such model or it is of no known kind.
    """
    diffusers_logging.disable_progress_bar()  # opening is quick; the pictures have a bar of their own
    transformers_logging.disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    # FLUX was published in bf16 and takes 24 GB so; a CPU is slow in it and exact in fp32.
    precision = {"dtype": torch.float32 if device == "cpu" else torch.bfloat16}
    with model_folder(model_uri) as folder:
        recipe = yaml.safe_load((folder / RECIPE).read_text()) if (folder / RECIPE).is_file() else None
        if (folder / ADAPTERS).is_file() and recipe is not None:
            with local_weights(recipe["pretrained"], PIPELINE_FILES) as base:
                pipeline = FluxPipeline.from_pretrained(base, **precision)
            pipeline.load_lora_weights(folder)
        else:
            kind = _pipeline_class(folder, model_uri)
            pipeline = kind.from_pretrained(folder, **(precision if kind is FluxPipeline else {}))
    pipeline.set_progress_bar_config(disable=True)
    defaults = _flux_defaults(recipe) if isinstance(pipeline, FluxPipeline) else _msdm_defaults(pipeline)
    return Model(pipeline.to(device), defaults)


def generate(
    model_uri: str,
    prompt: str,
    out: Path,
    *,
    num_images: int,
    batch_size: int,
    seed: int,
    device: str | None,
    settings: Mapping[str, Any],
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Path]:
    """Draw `num_images` pictures of `prompt` and write them as out/0000.png, out/0001.png, ...

    Picture i depends on (seed, i) alone. Each file carries what made it in its text fields. `settings` are
    negative_prompt, guidance_scale, true_cfg_scale and num_inference_steps, as far as they are not the model's own.

    Raises UserError if nothing can be written to `out`, or the model does not know a setting.
    """
    _check_writable(out)
    model = load_model(model_uri, device)
    about = about_pictures(model_uri, prompt, seed, model.arguments(settings))
    written: list[Path] = []
    for start in range(0, num_images, batch_size):
        numbers = range(start, min(start + batch_size, num_images))
        images = model.draw([prompt] * len(numbers), numbers, seed=seed, settings=settings)
        for number, image in zip(numbers, images, strict=True):
            written.append(out / f"{number:04d}.png")
            written[-1].write_bytes(png(image, about | {"number": str(number)}))
        on_progress(len(written))
    return written


def about_pictures(model_uri: str, prompt: str, seed: int, arguments: Mapping[str, Any]) -> dict[str, str]:
    """What a picture's file says of it."""
    return {
        "Software": "medsynth",
        "Description": "Synthetic image, made by a generative model",
        "model": model_uri,
        "prompt": prompt,
        "seed": str(seed),
        **{name: str(value) for name, value in arguments.items()},
    }


def png(image: Image.Image, about: Mapping[str, str]) -> bytes:
    """The image as a PNG file with text fields."""
    png_info = PngImagePlugin.PngInfo()
    for key, value in about.items():
        png_info.add_itxt(key, value)
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=png_info)
    return file.getvalue()


def _pipeline_class(folder: Path, model_uri: str) -> type[DiffusionPipeline]:
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"{model_uri} holds no diffusers pipeline: model_index.json is not there")
    name = json.loads(index.read_text())["_class_name"]
    name = name[-1] if isinstance(name, list) else name  # [file, class] where a pipeline brings its own code
    if name not in PIPELINES:
        raise UserError(f"{model_uri} holds a {name}; known are {', '.join(PIPELINES)}")
    return PIPELINES[name]


def _msdm_defaults(pipeline: MSDMPipeline) -> dict[str, Any]:
    return {
        "negative_prompt": "",
        "guidance_scale": pipeline.config.default_guidance_scale,
        "num_inference_steps": pipeline.config.default_num_inference_steps,
    }


def _flux_defaults(recipe: dict[str, Any] | None) -> dict[str, Any]:
    """Of the recipe that made the model; without one, what FLUX.1-dev's authors advise."""
    if recipe is None:
        return {
            "negative_prompt": "",
            "guidance_scale": 3.5,
            "true_cfg_scale": 1.0,
            "num_inference_steps": 28,
            "height": 1024,
            "width": 1024,
            "max_sequence_length": 512,
        }
    sampling, resolution = recipe["sampling"], recipe["data"]["resolution"]
    return {
        "negative_prompt": "",
        "guidance_scale": sampling["guidance_scale"],
        "true_cfg_scale": sampling["true_cfg_scale"],
        "num_inference_steps": sampling["num_inference_steps"],
        "height": resolution,
        "width": resolution,
        "max_sequence_length": recipe["max_tokens"],
    }


def _check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another --out") from None
