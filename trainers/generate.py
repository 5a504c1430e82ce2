"""From a saved model to PNG files."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from PIL import PngImagePlugin

from cluster.errors import UserError
from cluster.tracking import model_folder
from data_shards import derive_seed
from trainers.msdm import MSDMPipeline


def load_pipeline(model_uri: str, device: str | None = None) -> MSDMPipeline:
    """Open a model on `device`, or on a GPU if there is one; `model_uri` as in cluster.tracking.model_folder.

    Raises UserError when there is no such model or it is none of ours.
    """
    with model_folder(model_uri) as folder:
        if not (folder / "model_index.json").is_file():
            raise UserError(f"{model_uri} holds no diffusers pipeline: model_index.json is not there")
        diffusers_logging.disable_progress_bar()  # opening is quick; the pictures have a bar of their own
        pipeline = MSDMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    placed: MSDMPipeline = pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return placed


def generate(
    model_uri: str,
    prompt: str,
    out: Path,
    *,
    negative_prompt: str = "",
    num_images: int,
    batch_size: int,
    seed: int,
    guidance_scale: float | None,
    num_inference_steps: int | None,
    device: str | None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Path]:
    """Draw `num_images` pictures of `prompt` and write them as out/0000.png, out/0001.png, ...

    Picture i depends on (seed, i) alone. Each file carries what made it in its text fields.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another --out") from None
    pipeline = load_pipeline(model_uri, device)
    settings = {
        "Software": "medsynth",
        "Description": "Synthetic image, made by a generative model",
        "model": model_uri,
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "guidance_scale": str(guidance_scale if guidance_scale is not None else pipeline.config.default_guidance_scale),
        "num_inference_steps": str(num_inference_steps or pipeline.config.default_num_inference_steps),
    }
    written: list[Path] = []
    for start in range(0, num_images, batch_size):
        numbers = range(start, min(start + batch_size, num_images))
        drawn = pipeline(
            [prompt] * len(numbers),
            negative_prompt=negative_prompt,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            generator=[torch.Generator().manual_seed(derive_seed(seed, "generate", i)) for i in numbers],
        )
        for number, image in zip(numbers, drawn.images, strict=True):
            about = PngImagePlugin.PngInfo()
            for key, value in (settings | {"seed": str(seed), "number": str(number)}).items():
                about.add_itxt(key, value)
            path = out / f"{number:04d}.png"
            image.save(path, pnginfo=about)
            written.append(path)
        on_progress(len(written))
    return written
