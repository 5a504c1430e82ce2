"""Grids of pictures, as people look at them."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP = 2  # pixels between pictures
CAPTION_WIDTH, CAPTION_SIZE, MOST_LINES = 128, 11, 6  # pixels: room for some words a line, and a height that is read


def grid(pixels: Tensor, columns: int = 8, captions: Sequence[str] | None = None) -> Image.Image:
    """Lay pixels uint8 [N, H, W, 3] out in rows of at most `columns`, on white; each has its caption [N] below.

    Pictures with captions are enlarged, by a whole number, until words fit below.
    """
    if captions is not None:
        pixels = _enlarged(pixels)
    count, height, width, _ = pixels.shape
    columns = min(columns, count)
    written = [] if captions is None else [_wrapped(caption, width) for caption in captions]
    below = max((_height(text) for text in written), default=0)
    rows = -(-count // columns)
    size = (columns * (width + GAP) - GAP, rows * (height + below + GAP) - GAP)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for number, picture in enumerate(pixels):
        top, left = (number // columns) * (height + below + GAP), (number % columns) * (width + GAP)
        canvas.paste(Image.fromarray(picture.numpy()), (left, top))
        if written:
            draw.multiline_text((left + 2, top + height + 2), written[number], fill="black", font=_font())
    return canvas


def to_pixels(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] -> pixels uint8 [B, H, W, 3] on the CPU."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu()


def _enlarged(pixels: Tensor) -> Tensor:
    times = max(1, -(-CAPTION_WIDTH // pixels.shape[2]))
    return pixels.repeat_interleave(times, dim=1).repeat_interleave(times, dim=2)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(CAPTION_SIZE)


def _height(text: str) -> int:
    """Pixels that a caption takes below its picture."""
    draw = ImageDraw.Draw(Image.new("L", (1, 1)))
    return int(draw.multiline_textbbox((2, 2), text, font=_font())[3]) + 4


def _wrapped(text: str, width: int) -> str:
    """In lines of at most `width` pixels, a long word cut; beyond MOST_LINES it ends in dots."""
    lines = [""]
    for word in text.split():
        if _fits(f"{lines[-1]} {word}".strip(), width):
            lines[-1] = f"{lines[-1]} {word}".strip()
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            lines += [] if _fits(lines[-1] + letter, width) else [""]
            lines[-1] += letter
    return "\n".join(lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], "…"])


def _fits(line: str, width: int) -> bool:
    return _font().getlength(line) <= width - 4
