"""The images that are judged: drawn by a model or found in a folder, in shares that any number of workers take.

A share that is done lies at EVALUATION/shares/, so an evaluation that was cut off goes on where it was.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from cluster import storage
from cluster.documents import parsing, read_json
from cluster.errors import UserError
from data_shards.decode import ImageError, open_image
from trainers.fidelity.extractors import Extractor, kept_extractor
from trainers.generate import Model, about_pictures, load_model, png

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg")
Share = Sequence[int]
Pictures = Callable[[Share], list[tuple[Image.Image, Mapping[str, str]]]]
"""Sample numbers -> (image, what its file says of it) of each."""


class Source(Protocol):
    """Where images come from. Sent to workers, each of which opens it once."""

    def open(self) -> Pictures: ...


@dataclass(frozen=True)
class Drawn:
    """Images that a model draws: that of number i depends on the model, prompts[i], the seed and i alone."""

    model_uri: str
    prompts: tuple[str, ...]
    seed: int
    settings: Mapping[str, Any]
    device: str
    tracking_uri: str
    """Where registered models are found, for workers that have another environment."""
    compile_for: int | None = None
    """How many images at a time the denoiser is compiled for, if it is to be."""

    def open(self) -> Pictures:
        os.environ.setdefault("MLFLOW_TRACKING_URI", self.tracking_uri)
        model = load_model(self.model_uri, self.device, compile_for=self.compile_for)
        if self.compile_for:  # now, for it is no part of the seconds that an image takes
            once = {**self.settings, "num_inference_steps": 1}
            model.draw(self.prompts[:1], [0], seed=self.seed, settings=once)
        return self.by(model)

    def by(self, model: Model) -> Pictures:
        """As `open`, where the model is open already."""
        arguments = model.drawing.arguments(self.settings)

        def pictures(share: Share) -> list[tuple[Image.Image, Mapping[str, str]]]:
            prompts = [self.prompts[number] for number in share]
            images = model.draw(prompts, share, seed=self.seed, settings=self.settings)
            about = [about_pictures(self.model_uri, prompt, self.seed, arguments) for prompt in prompts]
            return [
                (image, told | {"number": str(number)})
                for image, told, number in zip(images, about, share, strict=True)
            ]

        return pictures


@dataclass(frozen=True)
class Found:
    """Images of a folder, whoever drew them, scaled and cropped to a square as real images are."""

    folder: str
    names: tuple[str, ...]
    prompts: tuple[str, ...]
    """What each image says it was drawn for; empty where it does not say."""
    resolution: int
    digest: str
    """SHA-256 over the images, in their order."""

    @classmethod
    def in_folder(cls, folder: str, limit: int) -> "Found":
        """The first `limit` images of a folder by name, at the shorter side of the smallest.

        Raises UserError if there are fewer: figures of fewer images would not be those that were asked for.
        """
        names = sorted(name for name in storage.list_files(folder) if name.lower().endswith(IMAGE_ENDINGS))
        if not names:
            raise UserError(f"{folder} holds neither a model nor images")
        if len(names) < limit:
            raise UserError(f"{folder} holds {len(names)} images; judge them with --num-samples {len(names)}")
        digest = hashlib.sha256()
        prompts: list[str] = []
        sides: list[int] = []
        for name in names[:limit]:
            uri = storage.join(folder, name)
            data = storage.read_bytes(uri)
            image = _decoded(data, uri)
            digest.update(hashlib.sha256(data).digest())
            prompts.append(str(image.info.get("prompt", "")))
            sides.append(min(image.size))
        return cls(folder, tuple(names[:limit]), tuple(prompts), min(sides), digest.hexdigest())

    def open(self) -> Pictures:
        def pictures(share: Share) -> list[tuple[Image.Image, Mapping[str, str]]]:
            side = (self.resolution, self.resolution)
            found: list[tuple[Image.Image, Mapping[str, str]]] = []
            for name in (self.names[number] for number in share):
                uri = storage.join(self.folder, name)
                image = _decoded(storage.read_bytes(uri), uri)
                told = {str(key): value for key, value in image.info.items() if isinstance(value, str)}
                found.append((ImageOps.fit(image, side, method=Image.Resampling.LANCZOS), told | {"file": name}))
            return found

        return pictures


@dataclass(frozen=True)
class ShareWorker:
    """Makes a worker: a function that draws a share's images, extracts their features and puts both into `out`."""

    source: Source
    extractors: tuple[str, ...]
    device: str
    out: str

    def __call__(self) -> Callable[[Share], None]:
        pictures = self.source.open()
        extractors = [kept_extractor(uri, self.device) for uri in self.extractors]

        return lambda share: draw_share(share, pictures, extractors, self.out)


def draw_share(share: Share, pictures: Pictures, extractors: Sequence[Extractor], out: str) -> None:
    """Draw a share's images, extract their features and put both into `out`, if they are not there."""
    if storage.exists(share_uri(out, share)):
        return
    started = time.perf_counter()
    drawn = pictures(share)
    seconds = time.perf_counter() - started
    for number, (image, about) in zip(share, drawn, strict=True):
        storage.write_bytes(sample_uri(out, number), png(image, about))
    pixels = torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image, _ in drawn])
    seen = {"seconds": np.array([seconds])}
    for extractor in extractors:
        seen |= _features(extractor, pixels)
    storage.write_bytes(share_uri(out, share), safetensors.numpy.save(seen))


def _features(extractor: Extractor, pixels: Tensor) -> dict[str, NDArray[np.float32]]:
    return {extractor.label: extractor.features(pixels).numpy()}


def shares_of(count: int, size: int) -> list[Share]:
    """Numbers 0 to `count` in runs of `size`: fixed whoever works on them, for a batch of another size may round
    another way."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def collect(out: str, shares: Sequence[Share]) -> dict[str, NDArray[np.float32]]:
    """All shares' arrays in the order of samples; `seconds` is one number a share."""
    parts = [safetensors.numpy.load(storage.read_bytes(share_uri(out, share))) for share in shares]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def begin(out: str, request: Mapping[str, Any]) -> None:
    """Claim the folder for a request. Raises UserError if it holds one that differs."""
    storage.check_writable(out)
    marker = storage.join(out, "request.json")
    asked = json.loads(json.dumps(request))
    if storage.exists(marker):
        begun = read_json(marker)
        with parsing(marker):
            changed = [key for key in begun | asked if begun.get(key) != asked.get(key)]
        if changed:
            raise UserError(f"{out} holds an evaluation whose {', '.join(changed)} differ; choose another --out")
    else:
        storage.write_bytes(marker, json.dumps(asked, indent=1).encode())


def sample_uri(out: str, number: int) -> str:
    return storage.join(out, "samples", f"{number:06d}.png")


def share_uri(out: str, share: Share) -> str:
    return storage.join(out, "shares", f"{share[0]:06d}.safetensors")


def _decoded(data: bytes, uri: str) -> Image.Image:
    try:
        return open_image(data)
    except ImageError as error:
        raise UserError(f"{uri}: {error}") from None


def read_sample(out: str, number: int) -> Image.Image:
    """A generated image, as it was written."""
    uri = sample_uri(out, number)
    return _decoded(storage.read_bytes(uri), uri)
