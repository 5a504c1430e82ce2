"""Real colonoscopy frames, small: their pixels serve as features where no extractor is needed."""

import functools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

FOLDER = Path(__file__).parents[2] / "data" / "colonoscopy" / "images"


@functools.cache
def frames(count: int, side: int) -> tuple[Image.Image, ...]:
    """The first `count` frames, RGB, `side` x `side`."""
    images = []
    for path in sorted(FOLDER.glob("*.jpg"))[:count]:
        with Image.open(path) as image:
            image.draft("RGB", (side * 2, side * 2))  # decodes at a fraction of the size: faster
            images.append(image.convert("RGB").resize((side, side), Image.Resampling.BOX))
    assert len(images) == count
    return tuple(images)


def pixels(images: tuple[Image.Image, ...]) -> NDArray[np.uint8]:
    """[N, H, W, 3]"""
    return np.stack([np.asarray(image) for image in images])


def pixel_features(images: tuple[Image.Image, ...], *, side: int = 8) -> NDArray[np.float32]:
    """Float32 [N, side * side * 3] in [0, 1]."""
    small = [np.asarray(image.resize((side, side), Image.Resampling.BOX)) for image in images]
    return np.stack(small).reshape(len(small), -1).astype(np.float32) / np.float32(255)


def blurred(images: tuple[Image.Image, ...], radius: float) -> tuple[Image.Image, ...]:
    return tuple(image.filter(ImageFilter.GaussianBlur(radius)) for image in images)
