"""Encoded images to pixels to tensors."""

import io
import warnings

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

EXIF_WITHIN = 2**16  # bytes: its segment comes before the image's
MAX_PIXELS = 100_000_000  # an image of more is a decompression bomb or belongs into tiles
# Pillow knows more, of which some start another program (EPS, Ghostscript) or are read by few and tested by fewer.
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000")


DICOM_PREFIX = slice(128, 132)
"""Where a DICOM file says `DICM`, by PS3.10."""


class ImageError(Exception):
    """An image that cannot be used; the message says why."""


def is_dicom(data: bytes) -> bool:
    return data[DICOM_PREFIX] == b"DICM"


def open_image(data: bytes) -> Image.Image:
    """Decode an image fully and turn it upright. Raises ImageError."""
    if not data:
        raise ImageError("empty file")
    if is_dicom(data):
        from data_shards.dicom import open_dicom  # pydicom takes a moment to import

        return open_dicom(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            check_size(image.width, image.height)
            image.load()
            return ImageOps.exif_transpose(image)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("unreadable: not an image") from None
    except Exception as error:  # Pillow's decoders raise struct.error, IndexError and others for damaged files
        raise ImageError(f"unreadable: {error or type(error).__name__}") from None


def check_size(width: int, height: int) -> None:
    """Raises ImageError for more than MAX_PIXELS; to be asked before pixels are decompressed."""
    if width * height > MAX_PIXELS:
        raise ImageError(f"too large: {width} x {height} pixels")


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB. Grey is repeated in each channel; 16-bit grey is stretched from its darkest to its brightest
    value; CMYK and palettes are converted; transparency is laid on black. Raises ImageError for what has no RGB."""
    try:
        return _to_rgb(image)
    except ValueError as error:
        raise ImageError(f"unreadable: {error}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        span = max(float(values.max() - values.min()), 1e-9)
        grey = np.round((values - values.min()) / span * 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if "A" in image.mode or "transparency" in image.info:
        return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def decode(data: bytes, resolution: int) -> Tensor:
    """Image float32 [3, resolution, resolution] in [-1, 1]: the shorter side scaled (Lanczos, antialiased), then
    cropped to the centre. Raises ImageError."""
    image = torch.empty(3, resolution, resolution)
    decode_into(image.numpy(), data)
    return image


def decode_into(out: NDArray[np.float32], data: bytes, *, mirrored: bool = False) -> None:
    """As `decode`, into `out` [3, R, R], such as an image's place in a batch."""
    pixels = _square(data, out.shape[-1])
    if mirrored:
        pixels = pixels[:, ::-1]
    out[...] = pixels.transpose(2, 0, 1)  # and only then computed with: both at once take a quarter longer
    out /= np.float32(127.5)
    out -= 1


def _square(data: bytes, resolution: int) -> NDArray[np.uint8]:
    """Pixels [resolution, resolution, 3]."""
    pixels = _plain_jpeg(data)
    if pixels is not None and pixels.shape[:2] == (resolution, resolution):
        return pixels
    image = to_rgb(open_image(data)) if pixels is None else Image.fromarray(pixels)
    return np.asarray(ImageOps.fit(image, (resolution, resolution), method=Image.Resampling.LANCZOS))


def _plain_jpeg(data: bytes) -> NDArray[np.uint8] | None:
    """Pixels [H, W, 3] of an upright JPEG in grey or YCbCr; None for any other file, and for one with a fault.

    To the very pixels that Pillow gives, with fewer copies. Decoding large images to a part of their size, as
    libjpeg can, would be faster still, but is off by up to 50 grey levels at edges.
    """
    if not data.startswith(b"\xff\xd8\xff") or b"Exif\0\0" in data[:EXIF_WITHIN]:
        return None
    try:
        height, width, colourspace, _ = simplejpeg.decode_jpeg_header(data)
        if colourspace not in ("Gray", "YCbCr") or height * width > MAX_PIXELS:
            return None
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None
    return pixels
