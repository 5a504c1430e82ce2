"""DICOM to pixels as a viewer shows them; nothing else of a file is kept, and no message repeats what a file says.

stored values -> modality LUT -> VOI LUT or window -> 8-bit grey, MONOCHROME1 inverted
stored colours -> palette or YBR to RGB -> 8-bit RGB
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
from pydicom.uid import AllTransferSyntaxes, DeflatedExplicitVRLittleEndian

from data_shards.decode import ImageError, check_size

# What pydicom warns and logs quotes values. The filter is set with each file, as threads that open other images put
# back the filters that they found.
logging.getLogger("pydicom").setLevel(logging.CRITICAL)
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

GREY = ("MONOCHROME1", "MONOCHROME2")
COLOURS = ("RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")


def open_dicom(data: bytes) -> Image.Image:
    """The one frame of a DICOM file, 8-bit grey or RGB. Raises ImageError, which never quotes the file: its values
    may name a patient."""
    try:
        warnings.filterwarnings("ignore", module="pydicom")
        dataset = pydicom.dcmread(io.BytesIO(data))
        _check(dataset)
        return Image.fromarray(_pixels(dataset))
    except ImageError:
        raise
    except Exception as error:  # of many kinds; their messages quote values, so their kind must do
        raise ImageError(f"unreadable: damaged or unusual DICOM file ({type(error).__name__})") from None


def window(values: np.ndarray, centre: float, width: float, function: str = "LINEAR") -> np.ndarray:
    """Values to grey 0..255 in float64, by PS3.3 C.11.2.1.2.1 (LINEAR) and C.11.2.1.3 (SIGMOID, LINEAR_EXACT)."""
    values = np.asarray(values, dtype=np.float64)
    if width < 1 if function == "LINEAR" else width <= 0:
        raise ValueError("window width")
    if function == "SIGMOID":
        return np.asarray(255 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700))))
    if function == "LINEAR_EXACT":
        return np.asarray(np.clip(((values - centre) / width + 0.5) * 255, 0, 255))
    if function != "LINEAR":
        raise ValueError("VOI LUT function")
    if width == 1:  # a threshold: between its ends the formula would divide by nothing
        return np.where(values <= centre - 0.5, 0.0, 255.0)
    return np.asarray(np.clip(((values - (centre - 0.5)) / (width - 1) + 0.5) * 255, 0, 255))


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
    return _eight_bits(stored, int(dataset.BitsStored))


def _grey(stored: np.ndarray, dataset: pydicom.Dataset) -> np.ndarray:
    values = apply_modality_lut(stored, dataset)
    if dataset.get("VOILUTSequence"):
        bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
        grey = apply_voi(values, dataset).astype(np.float64) / (2**bits - 1) * 255
    elif dataset.get("WindowCenter") is not None and dataset.get("WindowWidth") is not None:
        centre, width = (_first(dataset[name].value) for name in ("WindowCenter", "WindowWidth"))
        grey = window(values, centre, width, str(dataset.get("VOILUTFunction") or "LINEAR"))
    else:  # as other 16-bit images are shown: from the darkest to the brightest
        values = values.astype(np.float64)
        grey = (values - values.min()) / max(float(np.ptp(values)), 1e-9) * 255
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        grey = 255 - grey
    return np.asarray(np.round(np.clip(grey, 0, 255)), dtype=np.uint8)


def _first(value: Any) -> float:
    """Of several windows, the first is the one to begin with."""
    return float(value[0] if isinstance(value, Sequence) and not isinstance(value, str) else value)


def _eight_bits(colours: np.ndarray, bits: int) -> np.ndarray:
    if not 1 <= bits <= 16:
        raise ValueError("bits")
    return np.asarray(np.round(colours.astype(np.float64) / (2**bits - 1) * 255).clip(0, 255), dtype=np.uint8)
