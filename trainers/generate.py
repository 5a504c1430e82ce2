"""From a saved model to PNG files, for every family."""

import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline, FluxPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image, PngImagePlugin
from transformers.utils import logging as transformers_logging

from cluster import storage
from cluster.documents import parsing, read_json, read_yaml
from cluster.errors import UserError
from cluster.progress import OnProgress
from cluster.weights import folder_digest, local_weights
from data_shards import derive_seed
from trainers.compiling import compile_blocks
from trainers.drawing_settings import BATCH_SIZE, NUM_IMAGES, SEED, TRAIN_TIMESTEPS, check_prompt, check_settings
from trainers.model_source import ADAPTERS, INDEX, NO_SAMPLING, RECIPE, is_model, no_model, open_model
from trainers.msdm import MSDMPipeline
from trainers.msdm.pipeline import PRECISIONS
from trainers.msdm.unet import SAMPLERS, sampler_named
from trainers.tokens import unread_text

logger = logging.getLogger(__name__)

# Not what some models carry beside them for other programs, such as all weights once more in one file.
PIPELINE_FILES = ("model_index.json", "*/*")
FLUX_DEV_SAMPLING = {"guidance_scale": 3.5, "true_cfg_scale": 1.0, "num_inference_steps": 28}
FLUX_SAMPLERS = ("euler",)  # of its flow, as diffusers' FluxPipeline integrates it
FLUX_DEV_RESOLUTION, FLUX_DEV_MAX_TOKENS = 1024, 512
SOFTWARE = "medsynth"  # what a picture says that drew it
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
T = TypeVar("T")


@dataclass(frozen=True)
class Drawing:
    """How a model draws unless it is told otherwise: known without its weights."""

    family: str
    resolution: int
    defaults: Mapping[str, Any]
    samplers: tuple[str, ...]
    """That the setting `sampler` may name."""
    precisions: tuple[str, ...] = ()
    """That the setting `precision` may name, its default first; none where it is not the user's to choose."""
    most_steps: int = TRAIN_TIMESTEPS
    """Timesteps that it was trained with: more steps than that there are not."""

    def arguments(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The defaults, with `settings` in their place; the default precision is not named.

        Raises UserError for a setting that the model does not know, a number out of bounds, or a sampler that it is not
        drawn with.
        """
        known = [*self.defaults, *(["precision"] if self.precisions else [])]
        if unknown := sorted(settings.keys() - known):
            raise UserError(f"this model is not drawn with {', '.join(unknown)}: it knows {', '.join(known)}")
        arguments = check_settings({**self.defaults, **settings}, most_steps=self.most_steps)
        if arguments["sampler"] not in self.samplers:
            raise UserError(
                f"this model has no sampler '{arguments['sampler']}': choose one of {', '.join(self.samplers)}"
            )
        if "precision" in arguments and arguments["precision"] not in self.precisions:
            raise UserError(
                f"this model has no precision '{arguments['precision']}': choose one of {', '.join(self.precisions)}"
            )
        if self.precisions and arguments.get("precision") == self.precisions[0]:
            del arguments["precision"]  # pictures and records are the same whether it was asked for or not
        return arguments


@dataclass(frozen=True)
class Model:
    """A pipeline that draws."""

    pipeline: DiffusionPipeline
    drawing: Drawing
    compiled_for: int | None = None
    """How many pictures at a time its denoiser is compiled for, if it is: fewer are drawn among copies of the last,
    which takes a batch's time, where another shape would take a compilation's."""

    def compiled(self, batch_size: int) -> "Model":
        """The same with its denoiser compiled. Raises UserError if nothing can be compiled."""
        compile_blocks(self.denoiser)
        return replace(self, compiled_for=batch_size)

    @property
    def denoiser(self) -> torch.nn.Module:
        denoiser: torch.nn.Module = self.pipeline.transformer if self.drawing.family == "flux" else self.pipeline.unet
        return denoiser

    def draw(
        self,
        prompts: Sequence[str],
        numbers: Sequence[int],
        *,
        seed: int,
        settings: Mapping[str, Any],
        on_step: Callable[[], None] = lambda: None,
    ) -> list[Image.Image]:
        """A picture of each prompt, all at a time. The picture of number i depends on its prompt, `seed` and i.

        `on_step` is called after each sampling step; what it raises ends the drawing.
        """
        arguments = self.drawing.arguments(settings)
        if self.drawing.family == "flux":
            del arguments["sampler"]  # it has one alone
        filled = _filled(prompts, self.compiled_for)
        seeds = _filled([derive_seed(seed, "generate", number) for number in numbers], self.compiled_for)

        def after_step(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step()
            return {}

        images: list[Image.Image] = self.pipeline(
            filled,
            **arguments | {"negative_prompt": [arguments["negative_prompt"]] * len(filled)},
            generator=[torch.Generator().manual_seed(one) for one in seeds],
            callback_on_step_end=after_step,
        ).images
        return images[: len(prompts)]

    def unread(self, prompt: str) -> str:
        """The words at the end of a prompt that the model does not read, for its text encoder takes so many tokens."""
        if self.drawing.family == "flux":
            return unread_text(self.pipeline.tokenizer_2, prompt, self.drawing.defaults["max_sequence_length"])
        return unread_text(self.pipeline.tokenizer, prompt, self.pipeline.tokenizer.model_max_length)


def load_model(model_uri: str, device: str | None = None, *, compile_for: int | None = None) -> Model:
    """Open a model on `device`, or on a GPU if there is one; `model_uri` as in trainers.model_source.open_model.

    With `compile_for`, its denoiser is compiled for so many pictures at a time, when it first draws. The pictures are
    the same but for rounding.

    Raises UserError when there is no such model, it is of no known kind, or nothing can be compiled.
    """
    with open_model(model_uri) as source:
        model = load_pipeline(source.folder, device, name=model_uri, sampling=source.sampling)
    return model if compile_for is None else model.compiled(compile_for)


def load_pipeline(
    folder: Path, device: str | None = None, *, name: str, sampling: Mapping[str, Any] = NO_SAMPLING
) -> Model:
    """Open the model in a local folder; errors call it `name`. `sampling` takes the place of its own defaults."""
    diffusers_logging.disable_progress_bar()  # opening is quick; the pictures have a bar of their own
    transformers_logging.disable_progress_bar()
    drawing = drawing_of(folder, name=name, sampling=sampling)
    device = device or default_device()
    # FLUX was published in bf16 and takes 24 GB so; a CPU is slow in it and exact in fp32.
    precision = {"dtype": torch.float32 if device == "cpu" else torch.bfloat16}
    # Pickled weights beside or in place of the others are never taken.
    with parsing(f"the model {name}"):
        if (folder / ADAPTERS).is_file():
            with local_weights(_recipe(folder)["pretrained"], PIPELINE_FILES) as base:
                pipeline = FluxPipeline.from_pretrained(base, use_safetensors=True, **precision)
            pipeline.load_lora_weights(folder, weight_name=ADAPTERS)
        elif drawing.family == "flux":
            pipeline = FluxPipeline.from_pretrained(folder, use_safetensors=True, **precision)
        else:
            pipeline = MSDMPipeline.from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return Model(pipeline.to(device), drawing)


def drawing_of(folder: Path, *, name: str, sampling: Mapping[str, Any] = NO_SAMPLING) -> Drawing:
    """How the model in a local folder draws; `sampling` takes the place of its own defaults.

    Raises UserError, which calls it `name`, if it is of no known kind, or is not drawn with what `sampling` holds.
    """
    own = _own_drawing(folder, name)
    return replace(own, defaults=own.arguments(sampling))


def _own_drawing(folder: Path, name: str) -> Drawing:
    if not is_model(folder):
        raise UserError(no_model(name))
    if (folder / ADAPTERS).is_file():
        with parsing(f"the model {name}"):
            return _flux_drawing(_recipe(folder))
    index = read_json(str(folder / INDEX))
    with parsing(f"the model {name}"):
        kind = index["_class_name"]
        kind = kind[-1] if isinstance(kind, list) else kind  # [file, class] where a pipeline brings its own code
        if kind == MSDMPipeline.__name__:
            return _msdm_drawing(folder, index)
        if kind == FluxPipeline.__name__:
            return _flux_drawing(_recipe(folder) if (folder / RECIPE).is_file() else None)
    raise UserError(f"{name} holds a {kind}; known are {MSDMPipeline.__name__} and {FluxPipeline.__name__}")


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


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
    compile: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress = lambda what, done, total: None,
) -> list[Path]:
    """Draw `num_images` pictures of `prompt` and write them as out/0000.png, out/0001.png, ...

    Picture i depends on (seed, i) alone. Each file carries what made it in its text fields. `settings` are
    negative_prompt, guidance_scale, true_cfg_scale, num_inference_steps, sampler and precision, as far as they are not
    the model's own. Compiling takes a minute or more, and pays where many are drawn.

    Pictures that the same command wrote to `out` before are not drawn again. `overwrite` removes those that `generate`
    wrote there for another one.

    Raises UserError if nothing can be written to `out`, it holds pictures of another command, a number is out of
    bounds, the prompt is no text, or the model does not know a setting.
    """
    check_prompt(prompt)
    for bounds, name, value in (
        (SEED, "seed", seed),
        (NUM_IMAGES, "num_images", num_images),
        (BATCH_SIZE, "batch_size", batch_size),
    ):
        bounds.check(name, value)
    check_settings(settings)  # before the model is opened, which takes long
    storage.check_writable(str(out))
    with open_model(model_uri) as source:
        drawing = drawing_of(source.folder, name=model_uri, sampling=source.sampling)
        arguments = drawing.arguments(settings)
        about = about_pictures(model_uri, prompt, seed, arguments)
        about["model_digest"] = folder_digest(source.folder)
        if overwrite:
            for path in pictures_in(out):
                if _text_of(path).get("Software") == SOFTWARE:
                    path.unlink()
        else:
            check_pictures(out, about)
        paths = [out / picture_name(number) for number in range(num_images)]
        missing = [number for number, path in enumerate(paths) if not path.exists()]
        if not missing:
            return paths
        model = load_pipeline(source.folder, device, name=model_uri, sampling=source.sampling)
    for what, text in (("prompt", prompt), ("negative prompt", str(settings.get("negative_prompt", "")))):
        if unread := model.unread(text):
            logger.warning("the %s is too long for the model, which does not read the words: %s", what, unread)
    if compile:
        model = model.compiled(min(batch_size, len(missing)))
    steps_done, steps = 0, -(-len(missing) // batch_size) * arguments["num_inference_steps"]

    def note_step() -> None:
        nonlocal steps_done
        steps_done += 1
        on_progress("drawing, in sampling steps", steps_done, steps)

    on_progress("drawing, in sampling steps", 0, steps)
    for start in range(0, len(missing), batch_size):
        numbers = missing[start : start + batch_size]
        images = model.draw([prompt] * len(numbers), numbers, seed=seed, settings=settings, on_step=note_step)
        for number, image in zip(numbers, images, strict=True):
            storage.write_bytes(str(paths[number]), png(image, about | {"number": str(number)}))
    return paths


def picture_name(number: int) -> str:
    return f"{number:04d}.png"


def pictures_in(folder: Path) -> list[Path]:
    """Files that look like pictures, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_ENDINGS and path.is_file())


def check_pictures(folder: Path, about: Mapping[str, str]) -> None:
    """Raise UserError if a folder holds a picture that is not one of a series: `about` with the number of its name."""
    for path in pictures_in(folder):
        told = _text_of(path)
        number = told.get("number", "")
        if told != {**about, "number": number} or not number.isdecimal() or path.name != picture_name(int(number)):
            differs = [name for name in told.keys() | about if name != "number" and told.get(name) != about.get(name)]
            names = ", ".join(sorted(differs) or ["name"])
            of = f"made with another {names}" if "Software" in told else "of another origin"
            raise UserError(
                f"{folder} holds pictures {of}, such as {path.name}: choose another --out, or give --overwrite to "
                "replace those that medsynth drew"
            )


def _text_of(path: Path) -> dict[str, str]:
    """The text fields of a picture's file; none of one that cannot be read to its end."""
    try:
        with Image.open(path) as image:
            image.load()
            return {str(name): value for name, value in image.info.items() if isinstance(value, str)}
    except (OSError, ValueError, SyntaxError):
        return {}


def about_pictures(model_uri: str, prompt: str, seed: int, arguments: Mapping[str, Any]) -> dict[str, str]:
    """What a picture says of itself in its text fields."""
    return {
        "Software": SOFTWARE,
        "Description": "Synthetic image, made by a generative model",
        "model": model_uri,
        "prompt": prompt,
        "seed": str(seed),
        **{name: str(value) for name, value in arguments.items()},
    }


def png(image: Image.Image, about: Mapping[str, str]) -> bytes:
    """The picture as a PNG file with text fields."""
    info = PngImagePlugin.PngInfo()
    for key, value in about.items():
        info.add_itxt(key, value)
    data = io.BytesIO()
    image.save(data, "PNG", pnginfo=info)
    return data.getvalue()


def _filled(items: Sequence[T], size: int | None) -> list[T]:
    """`items`, and the last of them again until there are `size`."""
    return [*items, *[items[-1]] * ((size or 0) - len(items))]


def _recipe(folder: Path) -> dict[str, Any]:
    uri = str(folder / RECIPE)
    recipe = read_yaml(uri)
    if not isinstance(recipe, dict):
        raise UserError(f"{uri} holds no recipe")
    return recipe


def _msdm_drawing(folder: Path, index: Mapping[str, Any]) -> Drawing:
    unet, vae = (read_json(str(folder / component / "config.json")) for component in ("unet", "vae"))
    noise = read_json(str(folder / "scheduler" / "scheduler_config.json"))
    scheduler = noise["_class_name"]
    sampler = sampler_named(scheduler)
    if sampler is None:
        raise UserError(f"the model's sampler is {scheduler}; known are {', '.join(SAMPLERS)}")
    defaults = {
        "negative_prompt": "",
        "guidance_scale": index["default_guidance_scale"],
        "num_inference_steps": index["default_num_inference_steps"],
        "sampler": sampler,
    }
    resolution = unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
    most_steps = noise.get("num_train_timesteps", TRAIN_TIMESTEPS)
    return Drawing("msdm", resolution, defaults, tuple(SAMPLERS), PRECISIONS, most_steps)


def _flux_drawing(recipe: Mapping[str, Any] | None) -> Drawing:
    """That of the recipe that made the model; without one, what FLUX.1-dev's authors advise."""
    sampling: Mapping[str, Any] = recipe["sampling"] if recipe else FLUX_DEV_SAMPLING
    resolution = recipe["data"]["resolution"] if recipe else FLUX_DEV_RESOLUTION
    defaults = {
        "negative_prompt": "",
        "guidance_scale": sampling["guidance_scale"],
        "true_cfg_scale": sampling["true_cfg_scale"],
        "num_inference_steps": sampling["num_inference_steps"],
        "sampler": FLUX_SAMPLERS[0],
        "height": resolution,
        "width": resolution,
        "max_sequence_length": recipe["max_tokens"] if recipe else FLUX_DEV_MAX_TOKENS,
    }
    return Drawing("flux", resolution, defaults, FLUX_SAMPLERS)
