"""One picture from a file, whatever its container, depth, photometric meaning and padding, and whoever asks for it."""

import io
import struct
import tarfile
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydicom
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms, TiffImagePlugin

from data_shards import Manifest, Settings, overview, write_shards
from data_shards.decode import ImageError, _by_pillow, decode, open_image, read_image, square
from data_shards.duplicates import perceptual_hash
from data_shards.reader import ShardReader, encoded_image
from data_shards.sources import Columns, table_records
from tests.data_shards.test_dicom import encoded as as_dicom
from tests.data_shards.test_dicom import radiograph

ORIENTATION = 0x0112
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


def saved(image: Image.Image, kind: str, **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def pixels(data: bytes) -> NDArray[np.uint8]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_image(data).pixels
    assert found.shape == (*found.shape[:2], 3)
    assert found.dtype == np.uint8
    return found


def radiograph_of_12_bits(height: int = 24, width: int = 32) -> NDArray[np.uint16]:
    """Values of 37 to 4000 whose two bytes both count."""
    rows, columns = np.mgrid[:height, :width]
    return np.asarray(37 + (rows * 97 + columns * 61) % 3964, dtype=np.uint16)


def stretched(values: np.ndarray) -> NDArray[np.float64]:
    values = values.astype(np.float64)
    return np.asarray(np.round((values - values.min()) / (values.max() - values.min()) * 255))


# --- what writes the odd files: small encoders of the tests' own, by the formats' documents ---


def png(values: np.ndarray, colour_type: int, depth: int = 16, chunks: bytes = b"", interlaced: bool = False) -> bytes:
    """Unfiltered; `values` [H, W, C], or [H, W * C] of packed bytes below 8 bits."""
    height, width = values.shape[:2]
    dtype = {16: ">u2", 8: "u1"}[depth]
    passes = [values]
    if interlaced:  # Adam7
        starts = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
        passes = [values[y::dy, x::dx] for y, x, dy, dx in starts]
    rows = b"".join(b"\0" + row.astype(dtype).tobytes() for part in passes if part.size for row in part)
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, int(interlaced))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunks + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND")


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def tiff(
    values: np.ndarray,
    *,
    photometric: int,
    order: Literal["<", ">"] = "<",
    sample_format: int = 1,
    extra: int | None = None,
    deflated: bool = False,
    more: Sequence[tuple[int, int, int]] = (),
) -> bytes:
    """One strip of `values` [H, W] or [H, W, C]; `more` are tags of one SHORT or LONG."""
    values = values if values.ndim == 3 else values[..., None]
    height, width, samples = values.shape
    strip = values.astype(values.dtype.newbyteorder(order)).tobytes()
    strip = zlib.compress(strip) if deflated else strip
    after = 8 + len(strip) + len(strip) % 2
    bits = struct.pack(f"{order}{samples}H", *[values.dtype.itemsize * 8] * samples)
    formats = struct.pack(f"{order}{samples}H", *[sample_format] * samples)
    tags: list[tuple[int, int, int, int | bytes]] = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, samples, bits),
        (259, 3, 1, 8 if deflated else 1),
        (262, 3, 1, photometric),
        (273, 4, 1, 8),
        (277, 3, 1, samples),
        (278, 4, 1, height),
        (279, 4, 1, len(strip)),
        (339, 3, samples, formats),
        *((tag, kind, 1, value) for tag, kind, value in more),
    ]
    if extra is not None:
        tags.append((338, 3, 1, extra))
    start = after + 2 + 12 * len(tags) + 4
    directory, tail = struct.pack(f"{order}H", len(tags)), b""
    for tag, kind, count, value in sorted(tags):
        if isinstance(value, bytes) and len(value) > 4:
            value, tail = struct.pack(f"{order}I", start + len(tail)), tail + value
        elif isinstance(value, int):
            value = struct.pack(f"{order}{'HI'[kind == 4]}", value)
        directory += struct.pack(f"{order}HHI", tag, kind, count) + value.ljust(4, b"\0")
    magic = b"II*\0" if order == "<" else b"MM\0*"
    head = magic + struct.pack(f"{order}I", after) + strip + b"\0" * (len(strip) % 2)
    return head + directory + bytes(4) + tail


# --- depth: the same content from any container ---


GREY = radiograph_of_12_bits()
COLOURS = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=2)
OPAQUE = np.full((*GREY.shape, 1), 65535, np.uint16)
SAME_GREY = {
    "png": lambda: png(GREY[..., None], 0),
    "png of three equal colours": lambda: png(np.stack([GREY] * 3, axis=2), 2),
    "png with alpha": lambda: png(np.concatenate([GREY[..., None], OPAQUE], axis=2), 4),
    "interlaced png": lambda: png(GREY[..., None], 0, interlaced=True),
    "tiff": lambda: tiff(GREY, photometric=1),
    "big-endian tiff": lambda: tiff(GREY, photometric=1, order=">"),
    "deflated tiff": lambda: tiff(GREY, photometric=1, deflated=True),
    "tiff, white is zero": lambda: tiff(5000 - GREY, photometric=0),
    "deflated tiff, white is zero": lambda: tiff(5000 - GREY, photometric=0, deflated=True),
    "signed tiff": lambda: tiff(GREY.astype(np.int16) - 2000, photometric=1, sample_format=2),
    "32-bit tiff": lambda: tiff(GREY.astype(np.uint32) * 2**20, photometric=1),
    "signed 32-bit tiff": lambda: tiff(GREY.astype(np.int32) - 2000, photometric=1, sample_format=2),
    "float tiff": lambda: tiff(GREY.astype(np.float32) * 1e-12, photometric=1, sample_format=3),
    "float tiff, white is zero": lambda: tiff(-GREY.astype(np.float32), photometric=0, sample_format=3),
    "pgm": lambda: saved(Image.fromarray(GREY), "PPM"),
    "ppm of three equal colours": lambda: ppm(np.stack([GREY] * 3, axis=2)),
    "jpeg 2000": lambda: saved(Image.fromarray(GREY), "JPEG2000"),
    "dicom": lambda: as_dicom(dicom_of(GREY)),
    "dicom, MONOCHROME1": lambda: as_dicom(dicom_of(4050 - GREY, PhotometricInterpretation="MONOCHROME1")),
    "dicom, signed": lambda: as_dicom(
        dicom_of(GREY - 2000, PixelRepresentation=1, BitsStored=16, HighBit=15, RescaleSlope="2", RescaleIntercept="9")
    ),
    "dicom of colours": lambda: as_dicom(dicom_of_colours(np.stack([GREY] * 3, axis=2))),
}
SAME_COLOURS = {
    "png": lambda: png(COLOURS, 2),
    "interlaced png": lambda: png(COLOURS, 2, interlaced=True),
    "png with alpha": lambda: png(np.concatenate([COLOURS, OPAQUE], axis=2), 6),
    "tiff": lambda: tiff(COLOURS, photometric=2),
    "big-endian tiff": lambda: tiff(COLOURS, photometric=2, order=">"),
    "deflated tiff": lambda: tiff(COLOURS, photometric=2, deflated=True),
    "big-endian deflated tiff": lambda: tiff(COLOURS, photometric=2, order=">", deflated=True),
    "tiff with alpha": lambda: tiff(np.concatenate([COLOURS, OPAQUE], axis=2), photometric=2, extra=2),
    "tiff with premultiplied alpha": lambda: tiff(np.concatenate([COLOURS, OPAQUE], axis=2), photometric=2, extra=1),
    "tiff with more than colours": lambda: tiff(np.concatenate([COLOURS, OPAQUE], axis=2), photometric=2, extra=0),
    "ppm": lambda: ppm(COLOURS),
    "dicom": lambda: as_dicom(dicom_of_colours(COLOURS)),
}


def ppm(values: np.ndarray) -> bytes:
    return b"P6 %d %d 4095\n" % (values.shape[1], values.shape[0]) + values.astype(">u2").tobytes()


def dicom_of(values: np.ndarray, **changes: Any) -> pydicom.Dataset:
    dataset = radiograph(Rows=values.shape[0], Columns=values.shape[1], **changes)
    dataset.PixelData = values.astype("<u2").tobytes()
    return dataset


def dicom_of_colours(values: np.ndarray) -> pydicom.Dataset:
    return dicom_of(
        values, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0, BitsStored=16, HighBit=15
    )


@pytest.mark.parametrize("kind", SAME_GREY)
def test_grey_of_many_bits_is_the_same_from_any_container(kind: str) -> None:
    assert np.abs(pixels(SAME_GREY[kind]()) - stretched(GREY)[..., None]).max() <= 1


@pytest.mark.parametrize("kind", SAME_COLOURS)
def test_colours_of_many_bits_are_the_same_from_any_container(kind: str) -> None:
    """Also in their lower bytes, and with the hue that they had: all channels are stretched by one range."""
    decoded = read_image(SAME_COLOURS[kind]())
    assert np.abs(decoded.pixels - stretched(COLOURS)).max() <= 1
    assert decoded.conversion == ("DICOM" if kind == "dicom" else "16-bit colour")


def test_what_is_transparent_does_not_count_for_the_range() -> None:
    """By an alpha channel, or by the value that stands for transparency."""
    values = COLOURS.copy()
    values[:4] = 65535
    alpha = OPAQUE.copy()
    alpha[:4] = 0
    key = chunk(b"tRNS", struct.pack(">HHH", 65535, 65535, 65535))
    grey = GREY.copy()
    grey[:4] = 65535
    expected = np.vstack([np.zeros_like(COLOURS[:4]), stretched(COLOURS[4:])])
    for data in (png(np.concatenate([values, alpha], axis=2), 6), png(values, 2, chunks=key)):
        assert np.abs(pixels(data) - expected).max() <= 1
    expected = np.vstack([np.zeros_like(GREY[:4]), stretched(GREY[4:])])[..., None]
    for data in (
        png(np.concatenate([grey[..., None], alpha], axis=2), 4),
        png(grey[..., None], 0, chunks=chunk(b"tRNS", struct.pack(">H", 65535))),
    ):
        assert np.abs(pixels(data) - expected).max() <= 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("white", [0, 1])
def test_what_is_not_finite_does_not_darken_the_rest(bad: float, white: int) -> None:
    values = np.linspace(-3, 5, 48, dtype=np.float32).reshape(6, 8)
    values[2, 3] = bad
    found = pixels(tiff(values, photometric=white, sample_format=3))
    shown = np.where(np.isfinite(values), (values + 3) / 8 * 255, 0)
    shown = shown if white else np.where(np.isfinite(values), 255 - shown, 0)
    is_finite = np.isfinite(values)
    assert np.abs(found - shown[..., None])[is_finite].max() <= 1
    brightest = bad == np.inf if white else bad == -np.inf
    assert (found[~is_finite] == (255 if brightest else 0)).all()


def test_a_picture_without_a_finite_value_is_no_picture() -> None:
    for bad in (np.nan, np.inf):
        with pytest.raises(ImageError, match="no pixel has a finite value"):
            read_image(tiff(np.full((4, 4), bad, np.float32), photometric=1, sample_format=3))


def test_a_picture_of_one_value_is_black_whatever_its_container() -> None:
    for value in (0, 900):
        grey = np.full((4, 5), value, np.uint16)
        for data in (png(grey[..., None], 0), png(np.stack([grey] * 3, axis=2), 2), tiff(grey, photometric=1)):
            assert not pixels(data).any()
        assert not pixels(tiff(grey.astype(np.float32), photometric=1, sample_format=3)).any()
        assert not pixels(as_dicom(dicom_of(grey))).any()


def test_eight_bits_are_never_stretched() -> None:
    """Neither in a PNG nor in a DICOM file without a window."""
    grey = np.arange(60, 180, dtype=np.uint8).reshape(10, 12)
    small = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "Rows": 10, "Columns": 12}
    files = [
        png(grey[..., None], 0, depth=8),
        tiff(grey, photometric=1),
        tiff(255 - grey, photometric=0),
        as_dicom(radiograph(**small, PixelData=grey.tobytes())),
        as_dicom(radiograph(**small, PixelData=grey.tobytes(), RescaleSlope="1", RescaleIntercept="0")),
        as_dicom(radiograph(**small, PixelData=(255 - grey).tobytes(), PhotometricInterpretation="MONOCHROME1")),
    ]
    for data in files:
        assert np.array_equal(pixels(data), np.stack([grey] * 3, axis=2))


def test_signed_eight_bits_keep_their_sign() -> None:
    values = np.arange(-60, 60, dtype=np.int8).reshape(10, 12)
    data = tiff(values, photometric=1, sample_format=2)
    assert np.abs(pixels(data) - stretched(values)[..., None]).max() <= 1


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("white", [0, 1])
def test_few_bits_are_spread_over_all_grey_levels(bits: int, white: int) -> None:
    levels = 2**bits
    grey = np.arange(levels * 8).reshape(levels, 8) % levels
    row = np.packbits(np.unpackbits(grey.astype(np.uint8)[..., None], axis=2)[..., -bits:].reshape(levels, -1), axis=1)
    head = struct.pack(">IIBBBBB", 8, levels, bits, 0, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + one.tobytes() for one in row))
    as_png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND")
    expected = np.round(grey / (levels - 1) * 255)
    assert np.array_equal(pixels(as_png)[..., 0], expected)
    as_tiff = tiff(row, photometric=white)
    # The same bytes, said to hold pixels of fewer bits each.
    for tag, old, new in ((256, row.shape[1], 8), (258, 8, bits)):
        kind = 4 if tag == 256 else 3
        before, after = (struct.pack("<HHII", tag, kind, 1, value) for value in (old, new))
        assert as_tiff.count(before) == 1
        as_tiff = as_tiff.replace(before, after)
    assert np.array_equal(pixels(as_tiff)[..., 0], expected if white else 255 - expected)


def test_colours_of_other_spaces_are_converted() -> None:
    image = Image.fromarray((COLOURS // 16).astype(np.uint8))
    lab = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    to_lab = ImageCms.buildTransform(lab[1], lab[0], "RGB", "LAB")
    flat = Image.new("RGB", (8, 8), (200, 60, 90))
    assert np.abs(pixels(saved(to_lab.apply(flat), "TIFF")).astype(int) - (200, 60, 90)).max() <= 3
    assert read_image(saved(to_lab.apply(image), "TIFF")).conversion == "Lab"
    cmyk = image.convert("CMYK")
    for data in (saved(cmyk, "TIFF"), saved(cmyk, "TIFF", compression="tiff_lzw")):
        assert np.abs(pixels(data).astype(int) - np.asarray(cmyk.convert("RGB"))).max() <= 1


def test_transparency_is_black_in_each_of_its_ways() -> None:
    colours = np.full((6, 8, 3), 200, np.uint8)
    alpha = np.full((6, 8, 1), 255, np.uint8)
    alpha[:3] = 0
    image = Image.fromarray(np.concatenate([colours, alpha], axis=2))
    palette = Image.fromarray((alpha[..., 0] == 0).astype(np.uint8), "P")
    palette.putpalette([200, 200, 200, 9, 9, 9])
    files = [
        saved(image, "PNG"),
        saved(image, "TIFF"),
        saved(image, "WEBP", lossless=True),
        saved(image.convert("LA"), "PNG"),
        saved(palette, "PNG", transparency=b"\xff\x00"),
        saved(palette, "GIF", transparency=1),
    ]
    for data in files:
        assert (pixels(data)[:3] == 0).all()
        assert (pixels(data)[3:] == 200).all()


# --- several pictures in one file ---


def frames(kind: str, count: int, **how: Any) -> bytes:
    pictures = [Image.fromarray(np.full((16, 16, 3), 60 * n, np.uint8)) for n in range(count)]
    return saved(pictures[0], kind, save_all=True, append_images=pictures[1:], **how)


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "WEBP", "PNG", "MPO"])
def test_several_pictures_in_one_file_are_refused(kind: str) -> None:
    with pytest.raises(ImageError, match=rf"^multi-frame: 3 pictures in one {kind} file; write each to a file"):
        read_image(frames(kind, 3))
    assert pixels(frames(kind, 1)).shape == (16, 16, 3)


def test_a_smaller_copy_in_a_tiff_is_no_second_picture() -> None:
    large, small = Image.fromarray(COLOURS.astype(np.uint8)), Image.new("RGB", (8, 8), "red")
    is_reduced = TiffImagePlugin.ImageFileDirectory_v2()
    is_reduced[254] = 1
    file = io.BytesIO()
    with TiffImagePlugin.AppendingTiffWriter(file, new=True) as writer:
        large.save(writer, "TIFF")
        writer.newFrame()
        small.save(writer, "TIFF", tiffinfo=is_reduced)
    assert np.array_equal(pixels(file.getvalue()), np.asarray(large))


# --- JPEG: one picture by both decoders ---


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def exif(orientation: int, order: str = "<") -> bytes:
    magic = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(f"{order}HHIHH", ORIENTATION, 3, 1, orientation, 0)
    return segment(0xE1, b"Exif\0\0" + magic + struct.pack(f"{order}IH", 8, 1) + entry + bytes(4))


def xmp(orientation: int) -> bytes:
    return segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation="%d"/>' % orientation)


def picture(height: int, width: int, seed: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, 3))
    return (np.stack([rows * 5, columns * 4, rows + columns], axis=2) + noise).clip(0, 255).astype(np.uint8)


FILLING = st.sampled_from(
    [segment(0xFE, b"a comment"), segment(0xE2, b"ICC_PROFILE\0\x01\x01" + bytes(65_000)), segment(0xED, bytes(40_000))]
)
CODING = st.sampled_from(
    [
        *({"subsampling": s} for s in (0, 1, 2)),
        {"progressive": True},
        {"keep_rgb": True},
        {"restart_marker_blocks": 2},
        {"quality": 3},
        *({"with": s} for s in ("411", "440", "422", "gray")),
    ]
)
SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))


@settings(max_examples=80, deadline=None)
@given(
    size=SIZES,
    mode=st.sampled_from(["RGB", "L", "CMYK"]),
    coding=CODING,
    filling=st.lists(FILLING, max_size=4),
    turned=st.sampled_from([None, exif, xmp]),
    orientation=st.integers(1, 8),
    twice=st.booleans(),
    fill_bytes=st.integers(0, 2),
    lost=st.sampled_from([0, 0, 0, 2, 40]),
)
def test_a_jpeg_is_one_picture_however_it_is_decoded(
    size: tuple[int, int],
    mode: str,
    coding: dict[str, Any],
    filling: list[bytes],
    turned: Callable[[int], bytes] | None,
    orientation: int,
    twice: bool,
    fill_bytes: int,
    lost: int,
) -> None:
    """With its orientation anywhere, twice, or in XMP; whatever other segments, however coded, and also cut short."""
    image = picture(*size, seed=sum(size))
    if "with" in coding:
        space = "GRAY" if coding["with"] == "gray" else "RGB"
        data = simplejpeg.encode_jpeg(image if space == "RGB" else image[..., :1].copy(), 90, space, coding["with"])
    else:
        data = saved(Image.fromarray(image).convert(mode), "JPEG", **coding)
    plain = data[:2] + data[2:]
    speaking = [turned(orientation)] * (1 + twice) if turned else []
    data = data[:2] + b"".join([*filling, *speaking]) + b"\xff" * fill_bytes + data[2:]
    data = data[: len(data) - lost]
    if lost:
        assert outcome(read_image, data) == outcome(_by_pillow, data)
        return
    expected = np.asarray(Image.open(io.BytesIO(plain)).convert("RGB"))
    expected = TURNS[orientation if turned else 1](expected)
    assert np.array_equal(read_image(data).pixels, expected)
    assert np.array_equal(_by_pillow(data).pixels, expected)


def outcome(read: Callable[[bytes], Any], data: bytes) -> str | bytes:
    try:
        return bytes(read(data).pixels)
    except (ImageError, OSError):
        return "an error"


def test_the_orientation_of_other_formats_is_heeded() -> None:
    image = Image.fromarray(picture(20, 30, 0))
    side = Image.Exif()
    side[ORIENTATION] = 6
    for data in (
        saved(image, "PNG", exif=side),
        saved(image, "TIFF", exif=side),
        saved(image, "TIFF", exif=side, compression="tiff_lzw"),
        saved(image, "WEBP", exif=side, lossless=True),
    ):
        assert np.array_equal(pixels(data), np.rot90(np.asarray(image), -1))
    turned = tiff(COLOURS, photometric=2, more=[(274, 3, 6)])
    assert np.abs(pixels(turned) - np.rot90(stretched(COLOURS), -1)).max() <= 1


# --- files of other kinds ---

SOS = segment(0xDA, bytes(6))
OTHERS = {
    b"\0\0\0\x18ftypheic\0\0\0\0mif1heic": "a HEIC photo, which is not read: convert it to PNG",
    b"\0\0\0\x1cftypavif\0\0\0\0avifmif1": "an AVIF image, which is not read: convert it to PNG",
    b"\0\0\0\x20ftypisom\0\0\x02\0isomiso2": "an MP4 or QuickTime video, .*: write its frames as PNG",
    b"RIFF\0\0\0\0AVI LIST": "an AVI video",
    struct.pack("<i", 348) + bytes(340) + b"n+1\0": "a NIfTI volume, which is not read: write its slices as PNG",
    zlib.compress(struct.pack("<i", 348) + bytes(340) + b"n+1\0" + bytes(999), wbits=31): "a NIfTI volume",
    zlib.compress(b"anything", wbits=31): "a gzip file, which is not read: unpack it",
    b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>': "an SVG drawing, .*: convert it to PNG",
    b"%PDF-1.7\n": "a PDF document, which is not read: export its pages as PNG",
    b"PK\x03\x04\x14\0": "a zip archive, which is not read: unpack it",
    b"<!DOCTYPE html><html>404</html>": "a web page, no image: fetch the image again",
    b"version https://git-lfs.github.com/spec/v1\noid": "a pointer of Git LFS, .* git lfs pull",
    b"II*\0" + bytes(40): "a damaged TIFF file, or one of a kind that is not read: convert it to PNG",
    b"\xff\xd8" + segment(0xC1, struct.pack(">BHHB", 12, 8, 8, 1) + b"\1\x11\0") + SOS: "a JPEG of 12 bits",
    b"\xff\xd8" + segment(0xC3, struct.pack(">BHHB", 16, 8, 8, 1) + b"\1\x11\0") + SOS: "a lossless JPEG",
    b"\x93NUMPY\x01\0": "a NumPy array",
    b"%!PS-Adobe-3.0": "a PostScript document, not an image, .*: convert it to PNG",
    b"nothing of the kind": "not an image",
}


@pytest.mark.parametrize("data", OTHERS)
def test_a_file_of_another_kind_is_named_with_the_remedy(data: bytes) -> None:
    with pytest.raises(ImageError, match=OTHERS[data]):
        read_image(data)


def test_colours_that_would_lose_their_lower_bits_are_refused() -> None:
    planes = tiff(COLOURS, photometric=2, more=[(284, 3, 2)])
    text = b"P3 1 1 4095\n1 2 3\n"
    deep = saved(Image.fromarray(picture(8, 8, 0)), "JPEG2000", no_jp2=True)
    at = deep.index(b"\xff\x4f\xff\x51") + 42
    deep = deep[:at] + b"\x0b\1\1\x0b\1\1\x0b\1\1" + deep[at + 9 :]
    for data, reason in (
        (planes, "separate planes"),
        (text, "PPM file of text"),
        (deep, "JPEG 2000 of 12-bit colours"),
    ):
        with pytest.raises(ImageError, match=f"{reason}.*convert it to PNG"):
            read_image(data)


# --- all who look at a picture see the same one ---


def test_checking_hashing_previewing_and_training_see_one_picture(tmp_path: Path) -> None:
    turned = saved(Image.fromarray(picture(40, 56, 1)), "JPEG")
    late = turned[:2] + segment(0xED, bytes(65_000)) * 2 + exif(6) + turned[2:]
    files = {
        "late-exif.jpg": late,
        "deep.png": png(COLOURS, 2),
        "alpha.png": png(np.concatenate([COLOURS, OPAQUE // 2], axis=2), 6),
        "white-zero.tif": tiff(5000 - GREY, photometric=0),
        "nan.tif": tiff(np.where(GREY > 3900, np.nan, GREY).astype(np.float32), photometric=1, sample_format=3),
        "cmyk.jpg": saved(Image.fromarray(picture(40, 30, 2)).convert("CMYK"), "JPEG"),
        "palette.gif": saved(Image.fromarray(picture(30, 40, 3)).convert("P"), "GIF"),
        "padded.dcm": as_dicom(dicom_of(GREY, PixelPaddingValue=37, PixelAspectRatio=["2", "1"])),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"{name},a picture\n" for name in files))
    out = str(tmp_path / "out")
    manifest = write_shards(
        table_records(str(tmp_path / "t.csv"), str(tmp_path), Columns()), out, Settings("set", {"train": 1}), source={}
    )
    assert manifest == Manifest.load(out)
    assert not manifest.quarantined
    [shard] = manifest.shards
    samples = {sample.key: sample for sample in ShardReader(out).read(shard)}
    assert len(samples) == len(files)
    for name, data in files.items():
        [sample] = [sample for key, sample in samples.items() if key.startswith(name.partition(".")[0])]
        stored = encoded_image(sample)
        assert np.array_equal(read_image(stored).pixels, pixels(data))
        assert perceptual_hash(open_image(stored)) == perceptual_hash(open_image(data))
        seen = square(data, 16)
        assert np.array_equal(
            np.asarray(decode(stored, 16)), np.float32(seen.transpose(2, 0, 1)) / np.float32(127.5) - 1
        )
        assert np.array_equal(np.asarray(overview._thumbnail(sample, overview.CELL)), square(data, overview.CELL))
    assert manifest.conversions == {
        "16-bit colour": 2,
        "16-bit grey": 1,
        "floating point": 1,
        "CMYK": 1,
        "palette": 1,
        "DICOM": 1,
    }
    with tarfile.open(Path(out) / shard.name) as tar:
        assert "late-exif.jpg" in tar.getnames()
