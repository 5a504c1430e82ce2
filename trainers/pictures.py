"""Grids of pictures, as people look at them."""

import torch
from PIL import Image
from torch import Tensor

GAP = 2  # pixels between pictures


def grid(pixels: Tensor, columns: int = 8) -> Image.Image:
    """Lay pixels uint8 [N, H, W, 3] out in rows of at most `columns`, on white."""
    count, height, width, _ = pixels.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    canvas = torch.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, dtype=torch.uint8)
    for number, picture in enumerate(pixels):
        top, left = (number // columns) * (height + GAP), (number % columns) * (width + GAP)
        canvas[top : top + height, left : left + width] = picture
    return Image.fromarray(canvas.numpy())


def to_pixels(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] -> pixels uint8 [B, H, W, 3] on the CPU."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu()
