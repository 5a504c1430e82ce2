"""DICOM to pixels as a viewer shows them; nothing else of a file is kept, and no message repeats what a file says.

stored values -> modality LUT -> VOI LUT or window -> 8-bit grey, MONOCHROME1 inverted, padding black
stored colours -> palette or YBR to RGB -> 8-bit RGB
-> square pixels
"""

import io
import logging
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pydicom
import pydicom.config
from PIL import Image
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi
from pydicom.pixels.utils import pixel_array
from pydicom.uid import (
    AllTransferSyntaxes,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from data_shards.decode import ImageError, check_size, stretched

# What pydicom warns and logs quotes values. The filter is set with each file, as threads that open other images put
# back the filters that they found.
logging.getLogger("pydicom").setLevel(logging.CRITICAL)
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

GREY = ("MONOCHROME1", "MONOCHROME2")
COLOURS = ("RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
SPACINGS = ("PixelAspectRatio", "PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
"""Pairs of vertical and horizontal, the first that is there counts."""
NEARLY_SQUARE, MOST_OBLONG = 1.01, 20.0


def read_dicom(data: bytes) -> np.ndarray:
    """The one frame of a DICOM file, RGB uint8 [H, W, 3]. Raises ImageError, which never quotes the file: its values
    may name a patient."""
    try:
        warnings.filterwarnings("ignore", module="pydicom")
        dataset = _dataset(data)
        _check(dataset)
        image = Image.fromarray(_pixels(dataset))
        size = _square_size(dataset, *image.size)
        return np.asarray(
            (image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)).convert("RGB")
        )
    except ImageError:
        raise
    except Exception as error:  # of many kinds; their messages quote values, so their kind must do
        raise ImageError(f"unreadable: damaged or unusual DICOM file ({type(error).__name__})") from None


def window(values: np.ndarray, centre: float, width: float, function: str = "LINEAR") -> np.ndarray:
    """Values to grey 0..255 in float64, by PS3.3 C.11.2.1.2.1 (LINEAR) and C.11.2.1.3 (SIGMOID, LINEAR_EXACT)."""
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(centre) or not np.isfinite(width) or (width < 1 if function == "LINEAR" else width <= 0):
        raise ValueError("window")
    if function == "SIGMOID":
        return np.asarray(255 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700))))
    if function == "LINEAR_EXACT":
        return np.asarray(np.clip(((values - centre) / width + 0.5) * 255, 0, 255))
    if function != "LINEAR":
        raise ValueError("VOI LUT function")
    if width == 1:  # a threshold: between its ends the formula would divide by nothing
        return np.where(values <= centre - 0.5, 0.0, 255.0)
    return np.asarray(np.clip(((values - (centre - 0.5)) / (width - 1) + 0.5) * 255, 0, 255))


def _dataset(data: bytes) -> pydicom.Dataset:
    """A file, or a bare data set, whose transfer syntax is how it was found to be encoded."""
    preamble = bytes(128) if data.startswith(b"DICM") else b""
    dataset = pydicom.dcmread(io.BytesIO(preamble + data), force=True)
    if "TransferSyntaxUID" not in dataset.file_meta:
        is_implicit, is_little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if is_little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if is_implicit else explicit
    return dataset


def _check(dataset: pydicom.Dataset) -> None:
    """Raise ImageError for what is not to be shown, before anything is decompressed."""
    if str(dataset.get("BurnedInAnnotation", "")).strip().upper() == "YES":
        raise ImageError("burned-in annotation: the file says that its pixels show who the patient is")
    if "PixelData" not in dataset:
        raise ImageError("unreadable: DICOM file without pixels")
    if (frames := int(dataset.get("NumberOfFrames") or 1)) > 1:
        raise ImageError(f"multi-frame: {frames} frames in one DICOM file; write each to a file of its own")
    check_size(int(dataset.Columns), int(dataset.Rows))
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax == DeflatedExplicitVRLittleEndian:
        raise ImageError("unreadable: deflated DICOM files are not read; write it with another transfer syntax")
    if dataset.PhotometricInterpretation not in GREY + COLOURS:
        raise ImageError("unreadable: DICOM file of another photometric interpretation than grey, palette, RGB or YBR")
    if syntax in AllTransferSyntaxes and syntax.is_compressed and not get_decoder(syntax).is_available:
        raise ImageError(
            f"unreadable: no decoder for {syntax.name}: install pylibjpeg-libjpeg, pylibjpeg-openjpeg or python-gdcm"
        )


def _pixels(dataset: pydicom.Dataset) -> np.ndarray:
    """uint8 [H, W] or [H, W, 3]."""
    stored = pixel_array(dataset, raw=False)  # YBR becomes RGB
    if dataset.PhotometricInterpretation in GREY:
        return _grey(stored, dataset)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        return _eight_bits(
            apply_color_lut(stored, dataset)[..., :3], int(dataset.RedPaletteColorLookupTableDescriptor[2])
        )
    if int(dataset.BitsStored) > 8:  # as other images of 16-bit colours
        return stretched(stored)
    return _eight_bits(stored, int(dataset.BitsStored))


def _grey(stored: np.ndarray, dataset: pydicom.Dataset) -> np.ndarray:
    is_inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
    is_padding = _padding(stored, dataset)
    values = _modality_values(stored, dataset)
    if not np.isfinite(values).all():
        raise ValueError("values")
    if dataset.get("VOILUTSequence"):
        bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
        grey = apply_voi(values, dataset).astype(np.float64) / (2**bits - 1) * 255
    elif dataset.get("WindowCenter") is not None and dataset.get("WindowWidth") is not None:
        centre, width = (_first(dataset[name].value) for name in ("WindowCenter", "WindowWidth"))
        grey = window(values, centre, width, str(dataset.get("VOILUTFunction") or "LINEAR"))
    elif _is_eight_bits(dataset):
        grey = values / (2 ** int(dataset.BitsStored) - 1) * 255
    else:
        grey = stretched(values, ~is_padding)
    if is_inverted:
        grey = 255 - grey
    return np.asarray(np.round(np.where(is_padding, 0, np.clip(grey, 0, 255))), dtype=np.uint8)


def _modality_values(stored: np.ndarray, dataset: pydicom.Dataset) -> np.ndarray:
    """Stored values by the modality LUT, or times the slope plus the intercept; one that is empty changes nothing."""
    if dataset.get("ModalityLUTSequence"):
        return np.asarray(apply_modality_lut(stored, dataset))
    slope, intercept = (dataset.get(name) for name in ("RescaleSlope", "RescaleIntercept"))
    if slope is None and intercept is None:
        return stored
    return stored * float(slope or 1) + float(intercept or 0)


def _is_eight_bits(dataset: pydicom.Dataset) -> bool:
    """Whether stored values are grey levels of at most 8 bits, as those of other files, which are not stretched."""
    is_rescaled = (dataset.get("RescaleSlope") or 1, dataset.get("RescaleIntercept") or 0) != (1, 0)
    is_plain = not int(dataset.PixelRepresentation) and not dataset.get("ModalityLUTSequence") and not is_rescaled
    return is_plain and int(dataset.BitsStored) <= 8


def _padding(stored: np.ndarray, dataset: pydicom.Dataset) -> np.ndarray:
    """Where there is no image, by PS3.3 C.7.5.1.1.2: one stored value, or a range of them, its ends in either order."""
    ends = [dataset.get(name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if ends[0] is None:
        return np.zeros(stored.shape, dtype=bool)
    sign_bit = 2 ** (int(dataset.BitsStored) - 1)

    def told(values: np.ndarray) -> np.ndarray:
        """By the bits that are stored alone: files state padding beyond them, or with the wrong sign."""
        low_bits = values.astype(np.int64) & (2 * sign_bit - 1)
        return np.asarray(low_bits - 2 * (low_bits & sign_bit) if int(dataset.PixelRepresentation) else low_bits)

    values, given = told(stored), told(np.array([_first(end) for end in ends if end is not None]))
    return np.asarray((values >= given.min()) & (values <= given.max()))


def _square_size(dataset: pydicom.Dataset, width: int, height: int) -> tuple[int, int]:
    """Width and height of the image with square pixels: the side along which pixels are longer grows."""
    given = (dataset.get(name) for name in SPACINGS)
    vertical, horizontal = next((map(float, pair) for pair in given if pair and len(pair) == 2), (1.0, 1.0))
    ratio = vertical / horizontal if min(vertical, horizontal) > 0 else 1.0
    if 1 / NEARLY_SQUARE < ratio < NEARLY_SQUARE:
        return width, height
    if not 1 / MOST_OBLONG <= ratio <= MOST_OBLONG:
        raise ValueError("aspect ratio")
    size = (round(width / min(ratio, 1)), round(height * max(ratio, 1)))
    check_size(*size)
    return size


def _first(value: Any) -> float:
    """Of several windows, the first is the one to begin with."""
    return float(value[0] if isinstance(value, Sequence) and not isinstance(value, str) else value)


def _eight_bits(colours: np.ndarray, bits: int) -> np.ndarray:
    if not 1 <= bits <= 16:
        raise ValueError("bits")
    return np.asarray(np.round(colours.astype(np.float64) / (2**bits - 1) * 255).clip(0, 255), dtype=np.uint8)
