"""Pixels to what an extractor's network reads.

Every resize is antialiased: images resized without it give another FID, by as much as another model would (Parmar et
al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation").
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from cluster.errors import UserError

RESIZING_THREADS = 4  # Pillow resizes outside the interpreter's lock

IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)


class Preprocessing(Protocol):
    @property
    def resize(self) -> str:
        """How images are brought to the network's size, for ExtractorRecord."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that its result depends on, as plain data."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels uint8 [B, H, W, 3] -> float32 [B, 3, S, S]."""


@dataclass(frozen=True)
class SquareResize:
    """Pillow's bicubic on float32, channel by channel and never rounded, as clean-fid resizes (Parmar et al. 2022)."""

    side: int
    mean: tuple[float, float, float]
    """In units of pixels, 0 to 255."""
    std: tuple[float, float, float]

    @property
    def resize(self) -> str:
        return f"antialiased bicubic to {self.side} × {self.side} in float32 (Pillow, as clean-fid)"

    @property
    def settings(self) -> dict[str, Any]:
        return asdict(self) | {"filter": "bicubic"}

    def __call__(self, pixels: Tensor) -> Tensor:
        with ThreadPoolExecutor(RESIZING_THREADS) as pool:
            resized = torch.from_numpy(np.stack(list(pool.map(self._resized, pixels.numpy()))))  # [B, 3, S, S]
        return (resized - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(self.std).view(3, 1, 1)

    def _resized(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        channels = (Image.fromarray(channel) for channel in pixels.astype(np.float32).transpose(2, 0, 1))
        size = (self.side, self.side)
        return np.stack([np.asarray(channel.resize(size, Image.Resampling.BICUBIC)) for channel in channels])


class ProcessorResize:
    """What a transformers model's own preprocessor_config.json asks for, by transformers' Pillow processors.

    Those on torchvision, the default where it is installed, give slightly other pixels.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        if not processor.do_resize or processor.resample == Image.Resampling.NEAREST:
            raise UserError("its preprocessor_config.json asks for no antialiased resize; set do_resize and resample 3")

    @classmethod
    def from_folder(cls, folder: Path) -> "ProcessorResize":
        """Raises OSError or ValueError where there is none that transformers can read."""
        return cls(AutoImageProcessor.from_pretrained(folder, backend="pil"))

    @property
    def resize(self) -> str:
        size, crop = dict(self._processor.size), getattr(self._processor, "crop_size", None)
        edge = size.get("shortest_edge")
        target = f"shorter side {edge}" if edge else f"{size.get('height')} × {size.get('width')}"
        cropped = f", then centre crop {crop['height']} × {crop['width']}" if self._is_cropped and crop else ""
        kind = Image.Resampling(self._processor.resample).name.lower()
        return f"antialiased {kind} to {target}{cropped} in uint8 (Pillow)"

    @property
    def _is_cropped(self) -> bool:
        return bool(getattr(self._processor, "do_center_crop", False))

    @property
    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = self._processor.to_dict()
        return settings

    def __call__(self, pixels: Tensor) -> Tensor:
        images = list(pixels.numpy())
        processed = self._processor(images=images, return_tensors="pt", input_data_format="channels_last")
        pixel_values: Tensor = processed["pixel_values"]
        return pixel_values
