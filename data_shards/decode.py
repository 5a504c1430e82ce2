"""Encoded images to pixels to tensors: one way for checking, hashing, previewing and training.

bytes -> `read_image`: upright 8-bit RGB -> `square`: what a model sees -> `decode`: the tensor
"""

import io
import sys
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.MpoImagePlugin import MpoImageFile
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from data_shards.image_kinds import APP1, APP2, AS_PNG, FRAME, FRAMES, is_dicom, jpeg_segments, why_unread

MAX_PIXELS = 100_000_000  # an image of more is a decompression bomb or belongs into tiles
# Pillow knows more, of which some start another program (EPS, Ghostscript) or are read by few and tested by fewer.
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000")
AS_THEY_ARE = {("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "L")}
KINDS = {"CMYK": "CMYK", "P": "palette", "PA": "palette", "1": "black and white", "LAB": "Lab", "F": "floating point"}
STRETCHED = ("16-bit grey", "16-bit colour", "32-bit grey", "floating point")
"""Conversions of images with more than 8 bits, which are shown from their own smallest to their largest value."""
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT, SUBFILE_TYPE, PLANAR = 258, 262, 339, 254, 284  # tags of TIFF
MP_ENTRIES = 0xB002  # of the multi-picture format
WHITE_IS_ZERO, UNSIGNED, SIGNED, SEPARATE = 0, 1, 2, 2


class ImageError(Exception):
    """An image that cannot be used; the message says why."""


class Decoded(NamedTuple):
    """A picture as everything here sees it."""

    pixels: NDArray[np.uint8]
    """RGB [H, W, 3], upright."""
    conversion: str | None = None
    """What the file had been; None for an 8-bit RGB or grey JPEG or PNG, which stays as it is."""
    text: Mapping[str, str] = MappingProxyType({})
    """The file's text fields."""


def read_image(data: bytes) -> Decoded:
    """Any container, depth, photometric meaning and padding to 8-bit RGB, upright.

    Grey is repeated in each channel. Integers of more than 8 bits and floats are stretched from their smallest to their
    largest finite value, over all channels at once, without what is transparent or padding. CMYK, Lab and palettes are
    converted; transparency is laid on black.

    Raises ImageError for what is no image, is damaged, or holds several pictures.
    """
    if (pixels := _plain_jpeg(data)) is not None:
        return Decoded(pixels)
    if not data:
        raise ImageError("empty file")
    if is_dicom(data):
        from data_shards.dicom import read_dicom  # pydicom takes a moment to import

        return Decoded(read_dicom(data), "DICOM")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _by_pillow(data)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"unreadable: {why_unread(data)}") from None
    except Exception as error:  # Pillow's decoders raise struct.error, IndexError and others for damaged files
        raise ImageError(f"unreadable: {error or type(error).__name__}") from None


def open_image(data: bytes) -> Image.Image:
    """The picture of `read_image`, with the file's text fields in `info`. Raises ImageError."""
    decoded = read_image(data)
    image = Image.fromarray(decoded.pixels)
    image.info.update(decoded.text)
    return image


def square(data: bytes, resolution: int) -> NDArray[np.uint8]:
    """What a model sees, RGB [resolution, resolution, 3]: the shorter side scaled (Lanczos, antialiased), then cropped
    to the centre. Raises ImageError."""
    pixels = read_image(data).pixels
    if pixels.shape[:2] == (resolution, resolution):
        return pixels
    image = Image.fromarray(pixels)
    return np.asarray(ImageOps.fit(image, (resolution, resolution), method=Image.Resampling.LANCZOS))


def decode(data: bytes, resolution: int) -> Tensor:
    """`square` as float32 [3, resolution, resolution] in [-1, 1]. Raises ImageError."""
    image = torch.empty(3, resolution, resolution)
    decode_into(image.numpy(), data)
    return image


def decode_into(out: NDArray[np.float32], data: bytes, *, mirrored: bool = False) -> None:
    """As `decode`, into `out` [3, R, R], such as an image's place in a batch."""
    pixels = square(data, out.shape[-1])
    if mirrored:
        pixels = pixels[:, ::-1]
    out[...] = pixels.transpose(2, 0, 1)  # and only then computed with: both at once take a quarter longer
    out /= np.float32(127.5)
    out -= 1


def check_size(width: int, height: int) -> None:
    """Raises ImageError for more than MAX_PIXELS; to be asked before pixels are decompressed."""
    if width * height > MAX_PIXELS:
        raise ImageError(f"too large: {width} x {height} pixels")


def stretched(values: NDArray[Any], is_seen: NDArray[np.bool_] | None = None) -> NDArray[np.uint8]:
    """Values of any kind to 0..255, from the smallest to the largest finite one of the pixels that are seen.

    What is not a number becomes 0, and so does a picture of one value. Raises ImageError if no value is finite.
    """
    counted = values if is_seen is None else values[is_seen]
    if values.dtype.kind == "f":
        counted = counted[np.isfinite(counted)]
    if not counted.size:
        raise ImageError("unreadable: no pixel has a finite value")
    low, high = float(counted.min()), float(counted.max())

    def grey(numbers: NDArray[Any]) -> NDArray[np.uint8]:
        levels = np.clip((numbers.astype(np.float64) - low) / (high - low or 1.0) * 255, 0, 255)
        return np.round(np.nan_to_num(levels, nan=0.0)).astype(np.uint8)

    if values.dtype.kind == "f" or values.dtype.itemsize > 2:
        return grey(values)
    kind = np.iinfo(values.dtype)  # a table of all values takes less memory, and less time, than arithmetic on pixels
    return grey(np.arange(kind.min, kind.max + 1))[values.astype(np.int32) - kind.min]


# --- JPEG ---


def _plain_jpeg(data: bytes) -> NDArray[np.uint8] | None:
    """Pixels [H, W, 3] of an upright JPEG in grey or of three colours; None for any other file, and for one with a
    fault.

    To the very pixels that Pillow gives, with fewer copies. Decoding large images to a part of their size, as
    libjpeg can, would be faster still, but is off by up to 50 grey levels at edges.
    """
    if not data.startswith(b"\xff\xd8\xff") or not _is_plain(data):
        return None
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None
    return pixels


def _is_plain(data: bytes) -> bool:
    """Whether a JPEG is no CMYK, and says no more of its picture, or of others, than libjpeg reads: EXIF and XMP hold
    its orientation, and the multi-picture format the places of more pictures."""
    try:
        segments = jpeg_segments(data)
    except ValueError:
        return False
    for marker, start in segments:
        if marker in FRAMES:
            height, width, num_colours = FRAME.unpack_from(data, start + 1)
            if num_colours not in (1, 3) or height * width > MAX_PIXELS:
                return False
        elif marker == APP1 or (marker == APP2 and data[start : start + 4] == b"MPF\0"):
            return False
    return True


# --- all other images, by Pillow ---


def _by_pillow(data: bytes) -> Decoded:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    check_size(image.width, image.height)
    _check_one_picture(image)
    if image.format == "JPEG2000" and len(image.mode) > 1 and not image.mode.startswith("I"):
        _check_depth_of_jpeg_2000(data)
    kind = _conversion(image)
    if kind == "16-bit colour":
        pixels = _sixteen_bit_colours(data, image)
    else:
        is_white_zero, sample_format, bits = _tiff_values(image)
        upright = _upright(image)
        pixels = np.asarray(upright)
        if kind in STRETCHED:
            values = pixels.view(np.uint32) if (bits, sample_format) == (32, UNSIGNED) else pixels
            pixels = _grey_values(values, image.info.get("transparency"), is_white_zero)
        elif upright.mode == "L" and sample_format == SIGNED:
            pixels = stretched(pixels.view(np.int8))
        else:
            pixels = np.asarray(_rgb(upright))
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    text = {str(name): value for name, value in image.info.items() if isinstance(value, str)}
    return Decoded(pixels, kind, text)


def _upright(image: Image.Image) -> Image.Image:
    """The image, decoded fully and turned as its EXIF or XMP says."""
    image.load()
    return ImageOps.exif_transpose(image)


def _check_one_picture(image: ImageFile.ImageFile) -> None:
    """Raises ImageError for an animation or several pages. A smaller copy of the picture in its file does no harm."""
    count = int(getattr(image, "n_frames", 1))
    if count > 1 and isinstance(image, MpoImageFile) and image.mpinfo:
        entries = image.mpinfo[MP_ENTRIES]
        count = sum("Thumbnail" not in str(entry["Attribute"]["MPType"]) for entry in entries)
    elif count > 1 and isinstance(image, TiffImageFile):
        count = 1 + sum(not _is_reduced(image, number) for number in range(1, count))
        image.seek(0)
    if count > 1:
        raise ImageError(f"multi-frame: {count} pictures in one {image.format} file; write each to a file of its own")


def _is_reduced(tiff: TiffImageFile, number: int) -> bool:
    tiff.seek(number)
    return bool(int(tiff.tag_v2.get(SUBFILE_TYPE, 0)) & 1)


def _conversion(image: ImageFile.ImageFile) -> str | None:
    """What an opened image is called if it does not stay as it is."""
    mode = image.mode
    if mode.startswith("I"):
        return "32-bit grey" if _tiff_values(image)[2] == 32 else "16-bit grey"
    if mode in ("RGB", "RGBA") and _is_of_sixteen_bits(image):
        return "16-bit colour"
    if "A" in mode.upper().removeprefix("LAB") or "transparency" in image.info:
        return "transparency"
    if (image.format, mode) in AS_THEY_ARE:
        return None
    return KINDS.get(mode, f"{image.format} file")


def _tiff_values(image: ImageFile.ImageFile) -> tuple[bool, int, int]:
    """Whether 0 is white, and the sample format and bits of a TIFF; Pillow heeds none of them for each of its modes."""
    if not isinstance(image, TiffImageFile):
        return False, 0, 0
    tags = image.tag_v2
    sample_format, bits = tags.get(SAMPLE_FORMAT, (UNSIGNED,)), tags.get(BITS_PER_SAMPLE, (1,))
    return tags.get(PHOTOMETRIC) == WHITE_IS_ZERO, sample_format[0], bits[0]


def _grey_values(values: NDArray[Any], transparent: object, is_white_zero: bool) -> NDArray[np.uint8]:
    """Stretched to [H, W], without the value that stands for transparency, which is black."""
    if is_white_zero:
        values = -values if values.dtype.kind == "f" else ~values
    if not isinstance(transparent, int):
        return stretched(values)
    is_seen = values != transparent
    return np.where(is_seen, stretched(values, is_seen), np.uint8(0))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "LAB":
        from PIL import ImageCms  # only this needs it

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(image)
    if image.mode == "La":
        image = image.convert("LA")
    if "A" in image.mode or "transparency" in image.info:
        return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


# --- 16-bit colours, of which Pillow keeps the upper bytes alone ---


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """How Pillow would unpack the pixels of an opened image."""
    args = image.tile[-1].args if image.tile else ""
    return args if isinstance(args, str) else str((args or [""])[0])


def _is_of_sixteen_bits(image: ImageFile.ImageFile) -> bool:
    if image.format == "PPM":
        args = image.tile[0].args
        return isinstance(args, tuple) and bool(args[-1] > 255)
    return ";16" in _raw_mode(image) or _tiff_values(image)[2] == 16


def _sixteen_bit_colours(data: bytes, image: ImageFile.ImageFile) -> NDArray[np.uint8]:
    """RGB [H, W, 3], or grey [H, W]."""
    values = _sixteen_bit_values(data, image)
    colours: NDArray[Any] = values[..., :3]
    alpha = None
    if values.shape[2] in (2, 4):
        colours, alpha = values[..., :-1], values[..., -1:] / np.float32(65535)
    if alpha is not None and "a" in _raw_mode(image):  # premultiplied
        colours = colours / np.maximum(alpha, np.float32(1 / 65535))
    if isinstance(transparent := image.info.get("transparency"), tuple):
        alpha = (colours != np.array(transparent)).any(axis=2, keepdims=True).astype(np.float32)
    if alpha is None:
        return stretched(colours)
    seen = stretched(colours, np.broadcast_to(alpha > 0, colours.shape)) * alpha
    return np.round(seen[..., 0] if seen.shape[2] == 1 else seen).astype(np.uint8)


def _sixteen_bit_values(data: bytes, image: ImageFile.ImageFile) -> NDArray[np.uint16]:
    """[H, W, C] of RGB, RGBA, or grey with alpha: the file is read once for the upper bytes and once, by the other byte
    order, for the lower."""
    codec, raw_mode = image.tile[-1].codec_name, _raw_mode(image)
    if isinstance(image, TiffImageFile) and image.tag_v2.get(PLANAR) == SEPARATE:
        raise ImageError(f"unreadable: a 16-bit TIFF with its colours in separate planes, which is not read: {AS_PNG}")
    if codec == "ppm_plain":
        raise ImageError(f"unreadable: a 16-bit PPM file of text, which is not read: {AS_PNG}")
    if raw_mode == "LA;16B":
        return _unpacked(data, "RGBA").view(">u2")
    kind, _, order = ("RGB;16B" if codec == "ppm" else raw_mode).partition(";16")
    first = sys.byteorder[0].upper() if order == "N" else order
    upper, lower = (
        _unpacked(data, f"{kind.replace('a', 'A')};16{order}") for order in (first, "L" if first == "B" else "B")
    )
    return (upper.astype(np.uint16) << 8 | lower).astype(np.uint16)


def _check_depth_of_jpeg_2000(data: bytes) -> None:
    """Raises ImageError for colours of more than 8 bits: their depth stands in the segment SIZ (ISO 15444-1, A.5.1)."""
    start = data.find(b"\xff\x4f\xff\x51")
    if start >= 0 and (bits := (data[start + 42 : start + 43] or b"\0")[0] % 128 + 1) > 8:
        raise ImageError(f"unreadable: a JPEG 2000 of {bits}-bit colours, which is not read: {AS_PNG}")


def _unpacked(data: bytes, raw_mode: str) -> NDArray[np.uint8]:
    """Pixels as Pillow unpacks them in `raw_mode`."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    for number, tile in enumerate(image.tile):
        if tile.codec_name == "ppm":
            image.tile[number] = tile._replace(codec_name="raw", args=(raw_mode, 0, 1))
        else:
            args = (raw_mode, *tile.args[1:]) if isinstance(tile.args, tuple) else raw_mode
            image.tile[number] = tile._replace(args=args)
    return np.asarray(_upright(image))
