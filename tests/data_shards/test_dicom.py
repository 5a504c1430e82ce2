"""DICOM: what a viewer would show, by the standard's own formulas, and nothing that names a patient."""

import io
import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, SecondaryCaptureImageStorage, generate_uid

from data_shards import Manifest, Settings, write_shards
from data_shards.decode import ImageError, decode, open_image
from data_shards.dicom import window
from data_shards.sources import Columns, table_records
from tests.conftest import DATA

SECRETS = {
    "PatientName": "Kowalska^Agnieszka",
    "PatientID": "MRN-7731905",
    "PatientBirthDate": "19611203",
    "StudyDate": "20190417",
    "InstitutionName": "Szpital Wolski",
    "AccessionNumber": "ACC-552817",
    "StudyDescription": "Chest of Kowalska",
}
PRIVATE_SECRET = "private note on 7731905"


def radiograph(**changes: Any) -> pydicom.Dataset:
    """A real chest radiograph as 12-bit DICOM, with the tags of a patient."""
    grey = np.asarray(Image.open(DATA / "radiology" / "images" / "covidcxr_0006.jpg").convert("L").resize((64, 48)))
    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = generate_uid()
    for name, value in SECRETS.items():
        setattr(dataset, name, value)
    dataset.private_block(0x0099, "US", create=True).add_new(1, "LO", PRIVATE_SECRET)
    dataset.Rows, dataset.Columns = grey.shape
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.PixelData = (grey.astype(np.uint16) * 16).tobytes()
    for name, value in changes.items():
        setattr(dataset, name, value)
    return dataset


def encoded(dataset: pydicom.Dataset) -> bytes:
    file = io.BytesIO()
    pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()


def shown(dataset: pydicom.Dataset) -> np.ndarray:
    """One of three equal channels."""
    pixels = np.asarray(open_image(encoded(dataset)))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def stored(dataset: pydicom.Dataset) -> np.ndarray:
    return np.frombuffer(dataset.PixelData, np.uint16).reshape(dataset.Rows, dataset.Columns).astype(np.float64)


# --- what is shown ---


def by_the_standard(x: float, centre: float, width: float, function: str) -> float:
    """PS3.3 C.11.2.1.2.1 and C.11.2.1.3.1-2, case by case as they are printed, for 0..255."""
    if function == "SIGMOID":
        exponent = -4 * (x - centre) / width
        return 255 / (1 + math.exp(exponent)) if exponent < 700 else 0.0
    if function == "LINEAR_EXACT":
        if x <= centre - width / 2:
            return 0.0
        if x > centre + width / 2:
            return 255.0
        return ((x - centre) / width + 0.5) * 255
    if x <= centre - 0.5 - (width - 1) / 2:
        return 0.0
    if x > centre - 0.5 + (width - 1) / 2:
        return 255.0
    return ((x - (centre - 0.5)) / (width - 1) + 0.5) * 255


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(
    ("centre", "width"), [(40.0, 400.0), (-600.0, 1500.0), (2047.5, 4096.0), (10.0, 1.0), (0, 2.5)]
)
def test_a_window_is_that_of_the_standard(function: str, centre: float, width: float) -> None:
    values = np.concatenate([np.arange(-1100, 4200, 7.0), [centre, centre - 0.5, centre + 0.5, centre - width / 2]])
    expected = [by_the_standard(x, centre, width, function) for x in values]
    np.testing.assert_allclose(window(values, centre, width, function), expected, atol=1e-9)


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_rescaled_values_go_through_the_first_window(photometric: str) -> None:
    dataset = radiograph(PhotometricInterpretation=photometric, RescaleSlope="0.5", RescaleIntercept="-100")
    dataset.WindowCenter, dataset.WindowWidth = ["700", "3"], ["1200", "9"]
    rescaled = stored(dataset) * 0.5 - 100
    expected = np.vectorize(by_the_standard)(rescaled, 700, 1200, "LINEAR")
    expected = 255 - expected if photometric == "MONOCHROME1" else expected
    assert np.abs(shown(dataset) - expected).max() <= 0.5
    assert len(np.unique(expected)) > 50


def test_without_a_window_grey_goes_from_its_darkest_to_its_brightest() -> None:
    dataset = radiograph()
    values = stored(dataset)
    expected = (values - values.min()) / (values.max() - values.min()) * 255
    assert np.abs(shown(dataset) - expected).max() <= 0.5


PADDED = (slice(None), slice(0, 20))


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"RescaleSlope": "0.5", "RescaleIntercept": "-100"},
        {"RescaleSlope": "-2", "RescaleIntercept": "7"},
        {"PixelRepresentation": 1, "BitsStored": 16, "HighBit": 15},
        {"WindowCenter": "2000", "WindowWidth": "3900"},
    ],
    ids=["plain", "rescaled", "reversed", "signed", "windowed"],
)
@pytest.mark.parametrize(
    ("padding", "limit", "filled"),
    [(63536, None, [63536]), (0, None, [0]), (4095, None, [4095]), (4000, 4095, [4000, 4095]), (0, 9, [0, 5, 9])],
)
def test_padding_is_black_and_counts_for_no_range(
    photometric: str, how: dict[str, Any], padding: int, limit: int | None, filled: list[int]
) -> None:
    """Outside of it, the picture is that of the file without padding, whichever end of a range is told first."""
    whole = radiograph(PhotometricInterpretation=photometric, **how)
    values = stored(whole) * 0.9 + 20  # none is equal to a value of padding
    values[PADDED] = values[:, 20:40]
    whole.PixelData = values.astype(np.uint16).tobytes()
    values[PADDED] = np.resize(filled, (48, 20))
    for first, second in [(padding, limit), *([] if limit is None else [(limit, padding)])]:
        padded = radiograph(PhotometricInterpretation=photometric, **how)
        padded.PixelData = values.astype(np.uint16).tobytes()
        kind = "SS" if how.get("PixelRepresentation") else "US"
        for name, value in (("PixelPaddingValue", first), ("PixelPaddingRangeLimit", second)):
            if value is not None:
                signed = value - 2**16 if kind == "SS" and value >= 2**15 else value
                padded.add_new(pydicom.datadict.tag_for_keyword(name) or 0, kind, signed)
        assert (shown(padded)[PADDED] == 0).all()
        np.testing.assert_array_equal(shown(padded)[:, 20:], shown(whole)[:, 20:])
    assert len(np.unique(shown(whole))) > 50


def test_padding_that_states_its_sign_wrong_is_still_padding() -> None:
    """-2000 as it is written where it should be signed and is not."""
    dataset = radiograph(PixelRepresentation=1, BitsStored=16, HighBit=15)
    values = stored(dataset).astype(np.int16)
    values[PADDED] = -2000
    dataset.PixelData = values.tobytes()
    dataset.add_new("PixelPaddingValue", "US", 63536)
    assert (shown(dataset)[PADDED] == 0).all()
    assert shown(dataset)[:, 20:].min() == 0


def test_nothing_but_padding_is_no_picture() -> None:
    dataset = radiograph(PixelPaddingValue=7)
    dataset.PixelData = np.full((48, 64), 7, np.uint16).tobytes()
    with pytest.raises(ImageError, match="no pixel has a finite value"):
        shown(dataset)


@pytest.mark.parametrize(
    "name", ["RescaleSlope", "RescaleIntercept", "WindowCenter", "PixelPaddingValue", "PixelSpacing"]
)
def test_an_empty_value_changes_nothing(name: str) -> None:
    dataset = radiograph(WindowWidth="1200")
    expected = shown(dataset)
    setattr(dataset, name, None)
    np.testing.assert_array_equal(shown(dataset), expected)
    dataset = radiograph(RescaleIntercept="-100", RescaleSlope=None, WindowCenter="600", WindowWidth="1200")
    other = radiograph(RescaleIntercept="-100", RescaleSlope="1", WindowCenter="600", WindowWidth="1200")
    np.testing.assert_array_equal(shown(dataset), shown(other))


@pytest.mark.parametrize(
    ("how", "size"),
    [
        ({"PixelAspectRatio": ["2", "1"]}, (64, 96)),
        ({"PixelAspectRatio": ["1", "2"]}, (128, 48)),
        ({"PixelAspectRatio": ["1", "1"], "PixelSpacing": ["2", "1"]}, (64, 48)),
        ({"PixelSpacing": ["0.5", "0.25"]}, (64, 96)),
        ({"ImagerPixelSpacing": ["0.1", "0.15"]}, (96, 48)),
        ({"PixelSpacing": ["0.143", "0.143"]}, (64, 48)),
        ({"PixelSpacing": ["0.143", "0.1436"]}, (64, 48)),  # measured, not meant
        ({"PixelAspectRatio": ["0", "0"]}, (64, 48)),
    ],
)
def test_pixels_that_are_not_square_are_made_so(how: dict[str, Any], size: tuple[int, int]) -> None:
    """The side along which they are longer grows: vertical comes first (PS3.3 C.7.6.3.1.7)."""
    plain, image = open_image(encoded(radiograph())), open_image(encoded(radiograph(**how)))
    assert image.size == size
    assert np.abs(np.asarray(image.resize((64, 48)), float) - np.asarray(plain, float)).mean() < 3


def test_a_data_set_without_its_preamble_is_the_same_picture(tmp_path: Path) -> None:
    whole = encoded(radiograph(WindowCenter="700", WindowWidth="1200"))
    expected = np.asarray(open_image(whole))
    bare = io.BytesIO()
    dataset = pydicom.dcmread(io.BytesIO(whole))
    for is_implicit, is_little in ((True, True), (False, True), (False, False)):
        bare = io.BytesIO()
        values = stored(radiograph()).astype("<u2" if is_little else ">u2").tobytes()
        dataset.PixelData = values
        copy = pydicom.Dataset({element.tag: element for element in dataset})
        pydicom.dcmwrite(bare, copy, implicit_vr=is_implicit, little_endian=is_little)
        np.testing.assert_array_equal(np.asarray(open_image(bare.getvalue())), expected)
    for data in (whole[128:], whole[132:]):
        np.testing.assert_array_equal(np.asarray(open_image(data)), expected)
    for name in ("ExplVR_BigEndNoMeta.dcm", "ExplVR_LitEndNoMeta.dcm"):
        with pytest.raises(ImageError, match="DICOM"):  # they are plans, without pixels
            open_image(read(name))


def test_a_table_of_values_of_interest_is_looked_up() -> None:
    table = pydicom.Dataset()
    table.LUTDescriptor = [4096, 0, 10]
    table.LUTData = [int(1023 * (i / 4095) ** 2) for i in range(4096)]
    table["LUTData"].VR = "US"
    dataset = radiograph(VOILUTSequence=[table])
    expected = np.floor(1023 * (stored(dataset) / 4095) ** 2) / 1023 * 255
    assert np.abs(shown(dataset) - expected).max() <= 0.5


def test_signed_values_keep_their_sign() -> None:
    dataset = radiograph(PixelRepresentation=1, BitsStored=16, HighBit=15, WindowCenter="-200", WindowWidth="900")
    values = (stored(dataset) - 1500).astype(np.int16)
    dataset.PixelData = values.tobytes()
    expected = np.vectorize(by_the_standard)(values.astype(np.float64), -200, 900, "LINEAR")
    assert np.abs(shown(dataset) - expected).max() <= 0.5


def test_colours_are_those_of_the_picture() -> None:
    """The same real picture, as pydicom's own files hold it: RGB, run-length encoded, as YBR, and as JPEG."""
    plain = np.asarray(open_image(read("SC_rgb_dcmtk_+eb+cr.dcm"))).astype(int)
    assert plain.shape == (100, 100, 3)
    for name, tolerance in (
        ("SC_rgb_rle.dcm", 0.2),
        ("SC_ybr_full_422_uncompressed.dcm", 2),
        ("SC_rgb_jpeg_dcmtk.dcm", 3),
    ):
        assert np.abs(np.asarray(open_image(read(name))).astype(int) - plain).mean() <= tolerance, name


def test_a_palette_is_applied() -> None:
    data = read("examples_palette.dcm")
    dataset = pydicom.dcmread(io.BytesIO(data))
    table = np.frombuffer(dataset.RedPaletteColorLookupTableData, "<u2")
    red = table[np.asarray(dataset.pixel_array)] / 65535 * 255
    assert np.abs(np.asarray(open_image(data))[..., 0] - red).max() <= 1


def test_compressed_grey_is_that_of_the_uncompressed_file() -> None:
    plain = np.asarray(open_image(read("MR_small.dcm")))
    for name in ("MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm"):
        np.testing.assert_array_equal(np.asarray(open_image(read(name))), plain)


def read(name: str) -> bytes:
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str), name
    return Path(path).read_bytes()


# --- what is refused ---


def many_frames() -> bytes:
    return read("SC_rgb_rle_2frame.dcm")


def vast() -> bytes:
    """Run-length encoded zeros: small in the file, and never to be unpacked."""
    dataset = radiograph(Rows=60_000, Columns=60_000)
    dataset.file_meta.TransferSyntaxUID = RLELossless
    dataset.PixelData = pydicom.encaps.encapsulate([bytes(100)])
    dataset["PixelData"].is_undefined_length = True
    return encoded(dataset)


def without_decoder() -> bytes:
    return read("JPEGLSNearLossless_08.dcm")


REFUSED: dict[Callable[[], bytes], str] = {
    many_frames: "multi-frame: 2 frames",
    vast: "too large: 60000 x 60000 pixels",
    without_decoder: "unreadable: no decoder for JPEG-LS .*: install",
    lambda: read("rtplan.dcm"): "unreadable: DICOM file without pixels",
    lambda: read("MR_truncated.dcm"): r"unreadable: damaged or unusual DICOM file \(ValueError\)",
    lambda: read("image_dfl.dcm"): "unreadable: deflated",
    lambda: encoded(radiograph(WindowCenter="4", WindowWidth="0")): "unreadable: damaged",
    lambda: encoded(radiograph(BurnedInAnnotation="YES")): "burned-in annotation: the file says",
}


@pytest.mark.parametrize("make", REFUSED)
def test_what_cannot_be_shown_says_why(make: Callable[[], bytes]) -> None:
    with pytest.raises(ImageError, match=REFUSED[make]):
        decode(make(), 16)


# --- what stays behind ---


def test_nothing_but_pixels_gets_into_shards_manifest_and_quarantine(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    """Nor into a log or a warning. Searched for in every byte: good files, one with burned-in names, and files whose
    damage quotes their tags."""
    datasets = {f"good{i}": radiograph() for i in range(3)}
    datasets["named"] = radiograph(BurnedInAnnotation="YES")
    contents = {name: encoded(dataset) for name, dataset in datasets.items()}
    good = contents["good0"]
    contents["bad-kind"] = good.replace(b"DA\x08\x0019611203", b"IS\x08\x0019611203").replace(
        b"MONOCHROME2", b"MRN-7731905"
    )
    windowed = encoded(radiograph(WindowCenter="77777777", WindowWidth="10"))
    contents["bad-window"] = windowed.replace(b"77777777", b"Kowalska")  # pydicom's error would quote it
    contents["bad-rows"] = good.replace(b"US\x02\x00\x30\x00", b"DS\x02\x0077")
    contents["cut"] = good[: len(good) // 2]
    for name, content in contents.items():
        (tmp_path / f"{name}.dcm").write_bytes(content)
    rows = "".join(f"{name},a chest radiograph\n" for name in contents)
    (tmp_path / "t.csv").write_text(f"image,caption\n{rows}")
    records = table_records(str(tmp_path / "t.csv"), str(tmp_path), Columns())
    recwarn.clear()
    manifest = write_shards(records, str(tmp_path / "out"), Settings("set", {"train": 1}), source={"uri": "t"})
    said = "".join([*capfd.readouterr(), caplog.text, *(str(warning.message) for warning in recwarn)])

    assert manifest.conversions == {"DICOM": 3}
    assert manifest.quarantined == {"burned-in annotation": 1, "unreadable": 4}
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(written) >= 3
    images = 0
    for name, content in written.items():
        for secret in (*SECRETS.values(), *SECRETS["PatientName"].split("^"), PRIVATE_SECRET, "7731905"):
            assert secret.encode() not in content, f"{secret} in {name}"
            assert secret not in said
        start = content.find(b"\x89PNG")
        while start >= 0:
            assert chunks(content, start) == {b"IHDR", b"IDAT", b"IEND"}
            images += 1
            start = content.find(b"\x89PNG", start + 1)
    assert images == 3
    quarantine = [json.loads(line) for line in written["quarantine.jsonl"].decode().splitlines()]
    assert {q["source_id"] for q in quarantine} == {"named", "bad-kind", "bad-window", "bad-rows", "cut"}
    assert Manifest.load(str(tmp_path / "out")) == manifest


def chunks(data: bytes, start: int) -> set[bytes]:
    """Kinds of the chunks of the PNG there, which keeps text in some of other kinds."""
    found, at = set(), start + 8
    while b"IEND" not in found:
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        assert zlib.crc32(data[at + 4 : at + 8 + length]) == int.from_bytes(data[at + 8 + length :][:4], "big")
        found.add(kind)
        at += 12 + length
    return found
