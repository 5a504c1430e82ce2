"""Decoding: every kind of image becomes the same kind of tensor, and what is no image says so."""

import io
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from data_shards.decode import ImageError, decode, decode_into, open_image


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def gradient(height: int = 40, width: int = 60) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) % 256], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "1", "P", "RGBA", "LA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.fromarray(gradient()).convert(mode)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    tensor = decode(encoded(image, kind), 16)
    assert tensor.shape == (3, 16, 16)
    assert tensor.dtype == torch.float32
    assert -1 <= float(tensor.min()) < float(tensor.max()) <= 1


def test_pixels_map_to_minus_one_and_one() -> None:
    black_and_white = np.zeros((8, 8, 3), np.uint8)
    black_and_white[:, 4:] = 255
    tensor = decode(encoded(Image.fromarray(black_and_white), "PNG"), 8)
    assert tensor[:, :, 0].eq(-1).all()
    assert tensor[:, :, -1].eq(1).all()


def test_sixteen_bit_grey_is_stretched_over_its_own_range() -> None:
    """A radiograph of 12 significant bits would come out nearly black if its high byte were taken."""
    values = np.linspace(100, 4000, 64 * 64).reshape(64, 64).astype(np.uint16)
    rgb = np.asarray(open_image(encoded(Image.fromarray(values), "PNG")))
    expected = np.round((values.astype(np.float64) - 100) / 3900 * 255)
    assert np.abs(rgb - expected[..., None]).max() <= 1


def test_the_centre_is_kept_and_nothing_is_squeezed() -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255  # the centre square is white
    assert decode(encoded(Image.fromarray(wide), "PNG"), 20).min() > 0.99


def test_camera_rotation_is_undone() -> None:
    image = Image.fromarray(gradient())
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by 90 degrees
    file = io.BytesIO()
    image.save(file, "JPEG", exif=turned)
    assert open_image(file.getvalue()).size == (40, 60)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"not an image at all", "not an image"),
        (encoded(Image.fromarray(gradient()), "JPEG")[:300], "unreadable"),
    ],
)
def test_what_cannot_be_read_says_why(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode(data, 16)


def test_a_decompression_bomb_is_refused_before_it_opens() -> None:
    bomb = encoded(Image.new("1", (11_000, 10_000)), "PNG")
    assert len(bomb) < 100_000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="too large: 11000 x 10000"):
            decode(bomb, 16)


def turned_on_its_side() -> dict[str, Any]:
    exif = Image.Exif()
    exif[0x0112] = 6
    return {"exif": exif}


@pytest.mark.parametrize("resolution", [16, 40])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "how",
    [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 5}, turned_on_its_side()],
    ids=["plain", "444", "422", "progressive", "coarse", "turned"],
)
def test_a_jpeg_has_the_pixels_that_pillow_gives(mode: str, how: dict[str, Any], resolution: int) -> None:
    """Whichever way it is decoded, to the last bit, also where nothing is left to scale."""
    file = io.BytesIO()
    Image.fromarray(gradient(40, 40)).convert(mode).save(file, "JPEG", **how)
    image = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    pixels = np.asarray(ImageOps.fit(image, (resolution, resolution), method=Image.Resampling.LANCZOS))
    expected = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.equal(decode(file.getvalue(), resolution), expected)
    mirrored = np.empty((3, resolution, resolution), np.float32)
    decode_into(mirrored, file.getvalue(), mirrored=True)
    assert np.array_equal(mirrored, expected.flip(-1).numpy())
